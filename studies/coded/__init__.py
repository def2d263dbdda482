"""Coded networks, whose error is proven: python -m studies.coded --help."""
