"""OpenAI's dialect: /v1/embeddings and /v1/models. Its errors' form is in api/errors.py."""

import datetime

from flask import Blueprint, Response

from api.codec import encode_chunks, encode_vector
from api.errors import RequestError, respond
from api.schemas import OpenAIEmbeddings, OpenAIEmbedRequest, OpenAIModel, OpenAIModels
from api.service import Service, endpoint, listed
from engine.errors import ModalityNotSupported

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
        embedder, deadline = service.embedder(body.model, path)
        if body.modality == "image":
            raise ModalityNotSupported(f"model {embedder.manifest.name} embeds text, not images")
        embedded = embedder.embed(
            texts, deadline=deadline, prompt_name=body.prompt_name, dimensions=body.dimensions
        )
        form = body.encoding_format
        tokens = sum(embedding.tokens for embedding in embedded)
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": encode_vector(embedding.vector, form),
                **({"chunks": encode_chunks(embedding, form)} if body.chunks else {}),
            }
            for index, embedding in enumerate(embedded)
        ]
        return {
            "object": "list",
            "data": data,
            "model": embedder.manifest.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    return routes
