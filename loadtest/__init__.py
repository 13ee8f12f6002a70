"""Load tests of the service: the parts of benchmark_embeddings.py, and four stress commands (drain,
kill, overload, balance). Both use the same load client and start services in the same way.
"""
