"""The parts of benchmark_embeddings.py: loads, the HTTP client, a service of its own, the engine in
process, sentence-transformers beside it, advice for Cloud Run, tables and pictures.
"""
