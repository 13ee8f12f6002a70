"""OpenAI's dialect: /v1/embeddings and /v1/models. Its errors' form is in api/errors.py."""

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
from flask import Blueprint

from api.codec import encode_chunks, encode_vector
from api.endpoint import endpoint
from api.images import are_pictures, decode_pictures
from api.schemas import OpenAIEmbeddings, OpenAIEmbedRequest, OpenAIModel, OpenAIModels
from api.service import Service
from embeddings import TextEmbedder, TextEmbedding
from engine.errors import InvalidInput

if TYPE_CHECKING:
    from image_embeddings import ImageEmbedding

_TOKEN_IDS = (
    "Expected `str`, got token ids; token ids belong to another model's tokenizer: send the text "
    "itself, as a string or a list of strings (LangChain: check_embedding_ctx_length=False)"
)


def blueprint(service: Service) -> Blueprint:
    """OpenAI's routes."""
    routes = Blueprint("openai", __name__, url_prefix="/v1")

    @routes.get("/models")
    @endpoint(OpenAIModels, further={503: None})
    def list_models() -> object:
        """List the models that are served."""
        models = [_describe(service.embedder(name)) for name in service.models.bundles]
        return {"object": "list", "data": models}

    @routes.get("/models/<path:model>")
    @endpoint(OpenAIModel, further={503: None})
    def retrieve_model(model: str) -> object:
        """Describe one model, by its name, source or alias."""
        return _describe(service.embedder(model))

    @routes.post("/embeddings")
    @endpoint(OpenAIEmbeddings, OpenAIEmbedRequest, further={501: None})
    def create_embedding(body: OpenAIEmbedRequest) -> object:
        """Embed one text or several. `user` is taken and has no effect."""
        sent = check_texts(body.input)
        if sees_pictures(body, texts := [sent] if isinstance(sent, str) else sent):
            return _embed_images(service, body, texts)
        embedder, embedded = service.embed_texts(
            sent,
            "input",
            body.model,
            prompt_name=body.prompt_name,
            dimensions=body.dimensions,
        )
        form = body.encoding_format
        chunks = [encode_chunks(embedding, form) for embedding in embedded if body.chunks]
        return _write(body, embedder.manifest.name, embedded, chunks)

    return routes


def check_texts(sent: str | list[str | int | list[int]]) -> str | list[str]:
    """What `input` holds, if it is a text or several.

    Raises: InvalidInput for token ids.
    """
    if isinstance(sent, str):
        return sent
    for index, text in enumerate(sent):
        if not isinstance(text, str):
            raise InvalidInput(_TOKEN_IDS, index).at("$.input[{}]")
    return sent  # type: ignore[return-value]  # no other is left


def sees_pictures(body: OpenAIEmbedRequest, texts: list[str]) -> bool:
    """Whether `input` holds pictures: as `modality` says, else as their data URIs look.

    Raises: InvalidInput for a mix of both.
    """
    try:
        return body.modality == "image" or (body.modality is None and are_pictures(texts))
    except InvalidInput as error:
        raise error.at("$.input[{}]") from None


def _embed_images(service: Service, body: OpenAIEmbedRequest, uris: list[str]) -> object:
    if body.chunks or body.prompt_name is not None:
        raise InvalidInput("chunks and prompt_name are for texts, not for pictures")
    service.require_images(body.model)
    path = "$.input" if isinstance(body.input, str) else "$.input[{}]"
    pictures = decode_pictures(uris, path)
    embedder, embedded = service.embed_images(pictures, path, body.model, body.dimensions)
    return _write(body, embedder.manifest.name, embedded, [])


def _write(
    body: OpenAIEmbedRequest,
    model: str,
    embedded: "Sequence[TextEmbedding | ImageEmbedding]",
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


def _describe(embedder: TextEmbedder) -> dict[str, object]:
    manifest, engine = embedder.manifest, embedder.engine
    parity = engine.measured or manifest.parity[engine.backend][engine.precision]
    certificate = msgspec.structs.asdict(parity)
    return {
        "id": manifest.name,
        "object": "model",
        "created": int(datetime.datetime.fromisoformat(manifest.created).timestamp()),
        "owned_by": manifest.source.rpartition("/")[0] or "local",
        "dimensions": manifest.size,
        "max_dimensions": manifest.dimensions,
        "max_tokens": manifest.max_tokens,
        "modalities": manifest.modalities,
        "prompts": manifest.prompts,
        "default_prompt": manifest.default_prompt,
        "revision": manifest.revision,
        "engine": engine.backend,
        "precision": embedder.precision,
        "certificate": certificate | {"measured": "start" if engine.measured else "bake"},
    }
