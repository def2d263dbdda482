"""Coded networks, whose error is proven: python -m studies.coded --help."""

from studies.coded.disagreement import certify_by_disagreement
from studies.coded.message import coded_network, decode, encode, prove

__all__ = ['certify_by_disagreement', 'coded_network', 'decode', 'encode', 'prove']
