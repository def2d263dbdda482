"""Narrower networks: python -m studies.compress --help, and docs/compress.md."""

from measures.masks import drop_dead
from studies.compress.files import load, save
from studies.compress.linear import compress_layer
from studies.compress.narrow import balance, compress

__all__ = ['balance', 'compress', 'compress_layer', 'drop_dead', 'load', 'save']
