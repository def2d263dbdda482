"""What surrounds a training: command line, machine, files, pictures. Notebooks take `load_network` and `read_metrics`."""

from harness.records import load_network, read_metrics

__all__ = ['load_network', 'read_metrics']
