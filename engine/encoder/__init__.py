"""Our own engine for transformers that encode texts and pictures: C code and its Python binding."""
