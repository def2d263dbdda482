"""Studies of trained networks: python -m studies.NAME --help."""
