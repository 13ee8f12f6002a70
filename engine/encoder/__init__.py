"""Our own engine for transformers, which encode texts: C code and its Python binding."""
