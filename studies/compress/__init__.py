"""Narrower networks: python -m studies.compress --help."""
