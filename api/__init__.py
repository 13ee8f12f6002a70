"""HTTP, and nothing but HTTP: decode, validate, call the embedders, encode."""
