"""OpenAI's dialect: /v1/embeddings and /v1/models. Its errors' form is in api/errors.py."""

import datetime
from collections.abc import Sequence

from flask import Blueprint, Response

from api.codec import encode_chunks, encode_vector
from api.errors import RequestError, respond
from api.images import picture_bytes
from api.schemas import OpenAIEmbeddings, OpenAIEmbedRequest, OpenAIModel, OpenAIModels
from api.service import Service, endpoint, listed
from api.tasks import in_thread
from embeddings import TextEmbedding
from engine.errors import InvalidInput
from image_embeddings import ImageEmbedding

_TOKEN_IDS = (
    "; token ids belong to another model's tokenizer: send the text itself, as a string or a list "
    "of strings (LangChain: check_embedding_ctx_length=False)"
)


def blueprint(service: Service) -> Blueprint:
    """OpenAI's routes."""
    routes = Blueprint("openai", __name__, url_prefix="/v1")

    def describe(name: str) -> dict[str, object]:
        embedder, _ = service.embedder(name)
        manifest = embedder.manifest
        return {
            "id": manifest.name,
            "object": "model",
            "created": int(datetime.datetime.fromisoformat(manifest.created).timestamp()),
            "owned_by": manifest.source.rpartition("/")[0] or "local",
            "dimensions": manifest.dimensions,
            "max_tokens": manifest.max_tokens,
            "modalities": manifest.modalities,
            "revision": manifest.revision,
            "precision": embedder.precision,
        }

    @routes.get("/models")
    @endpoint(OpenAIModels, further={503: None})
    def list_models() -> object:
        """List the models that are served."""
        return {"object": "list", "data": [describe(name) for name in service.models.bundles]}

    @routes.get("/models/<path:model>")
    @endpoint(OpenAIModel, further={503: None})
    def retrieve_model(model: str) -> object:
        """Describe one model, by its name, source or alias."""
        return describe(model)

    @routes.errorhandler(RequestError)
    def with_advice(error: RequestError) -> Response:
        message = str(error)
        token_ids = "$.input[" in message and ("got `int`" in message or "got `array`" in message)
        return respond(error.status, error.error_type, message + token_ids * _TOKEN_IDS)

    @routes.post("/embeddings")
    @endpoint(OpenAIEmbeddings, OpenAIEmbedRequest, further={501: None})
    def create_embedding(body: OpenAIEmbedRequest) -> object:
        """Embed one text or several. `user` is taken and has no effect."""
        texts, path = listed(body.input, "input")
        if body.modality == "image":
            return embed_images(body, texts, path)
        embedder, waiting = service.embedder(body.model, path)
        embedded = embedder.embed(
            texts, **waiting, prompt_name=body.prompt_name, dimensions=body.dimensions
        )
        form = body.encoding_format
        chunks = [encode_chunks(embedding, form) for embedding in embedded if body.chunks]
        return answer(body, embedder.manifest.name, embedded, chunks)

    def embed_images(body: OpenAIEmbedRequest, uris: list[str], path: str) -> object:
        if body.chunks or body.prompt_name is not None:
            raise InvalidInput("chunks and prompt_name are for texts, not for pictures")
        embedder, waiting = service.image_embedder(body.model, path)
        pictures = [picture_bytes(uri, index) for index, uri in enumerate(uris)]
        embedded = in_thread(
            lambda: embedder.embed(pictures, **waiting, dimensions=body.dimensions)
        )
        return answer(body, embedder.manifest.name, embedded, [])

    def answer(
        body: OpenAIEmbedRequest,
        model: str,
        embedded: Sequence[TextEmbedding | ImageEmbedding],
        chunks: list[list[dict[str, object]]],
    ) -> object:
        tokens = sum(embedding.tokens for embedding in embedded)
        data: list[dict[str, object]] = [
            {
                "object": "embedding",
                "index": index,
                "embedding": encode_vector(embedding.vector, body.encoding_format),
            }
            for index, embedding in enumerate(embedded)
        ]
        for entry, pieces in zip(data, chunks):
            entry["chunks"] = pieces
        return {
            "object": "list",
            "data": data,
            "model": model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    return routes
