"""The HTTP server inside a gunicorn worker: bytes in, bytes out. It knows no route and no model."""
