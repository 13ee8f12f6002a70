"""The service's own dialect: POST /embeddings and /embeddings/batch."""

import time

from flask import Blueprint, Response, g, request

from api.codec import json_response, read_json
from api.schemas import EmbedText, EmbedTexts
from embeddings import TextEmbedder
from engine.models import Models


def blueprint(models: Models[TextEmbedder], timeout: float) -> Blueprint:
    """The native routes; a request gives up after `timeout` seconds."""
    routes = Blueprint("native", __name__)

    def embed(texts: list[str], options: EmbedText | EmbedTexts) -> list[object]:
        deadline = time.monotonic() + timeout
        embedder = models.get(options.model, deadline)
        embedded = embedder.embed(
            texts, deadline=deadline, prompt_name=options.prompt_name, dimensions=options.dimensions
        )
        return [embedding.vector for embedding in embedded]

    @routes.post("/embeddings")
    def one() -> Response:
        g.input_path = "$.text"
        body = read_json(request, EmbedText)
        return json_response({"embeddings": embed([body.text], body)})

    @routes.post("/embeddings/batch")
    def many() -> Response:
        g.input_path = "$.texts[{}]"
        body = read_json(request, EmbedTexts)
        return json_response({"embeddings": [[vector] for vector in embed(body.texts, body)]})

    return routes
