"""Liveness and readiness. Both open without a key."""

from typing import Any

from flask import Blueprint

from api.codec import write_json
from api.endpoint import endpoint
from api.schemas import Ready, Status
from engine.models import Models
from server.messages import Response, current

PATHS = ("/health", "/health/ready", "/healthcheck")


def blueprint(models: Models[Any]) -> Blueprint:
    """GET /health, /healthcheck: the process listens. GET /health/ready: every model has given its
    probe's vector.
    """
    routes = Blueprint("health", __name__)

    @routes.get("/health")
    @routes.get("/healthcheck", endpoint="healthcheck")
    @endpoint(Status)
    def health() -> object:
        """Whether the process listens."""
        return {"status": "ok"}

    @routes.get("/health/ready")
    @endpoint(Ready, further={503: Status})
    def ready() -> object:
        """Whether every model is loaded and has given its probe's vector."""
        manifest = models.bundle().manifest
        if not models.ready:
            return Response(write_json({"status": "loading"}), 503, headers=[("Retry-After", "1")])
        current.get().notes["X-Model"] = models.resolve().version
        images = "image" in manifest.modalities
        return {"status": "ready", "model": manifest.name, "supports_images": images}

    return routes
