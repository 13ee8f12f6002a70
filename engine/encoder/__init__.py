"""Our own engine for text models of BERT's architecture: C code and its Python binding."""
