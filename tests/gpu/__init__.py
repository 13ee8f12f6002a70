"""Measures the torch engine on a machine with a GPU: `python -m tests.gpu.measure --help`."""
