"""Liveness and readiness. Both open without a key."""

from typing import Any

from flask import Blueprint, Response

from api.codec import json_response
from engine.models import Models


def blueprint(models: Models[Any]) -> Blueprint:
    """GET /health: the process listens. GET /health/ready: every model has given its probe's
    vector.
    """
    routes = Blueprint("health", __name__)

    @routes.get("/health")
    def health() -> Response:
        return json_response({"status": "ok"})

    @routes.get("/health/ready")
    def ready() -> Response:
        manifest = models.bundle().manifest
        if not models.ready:
            loading = json_response({"status": "loading"})
            loading.status_code = 503
            loading.headers["Retry-After"] = "1"
            return loading
        images = "image" in manifest.modalities
        return json_response({"status": "ready", "model": manifest.name, "supports_images": images})

    return routes
