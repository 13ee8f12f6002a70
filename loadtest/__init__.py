"""The parts of benchmark_embeddings.py: load client, measurements, report."""
