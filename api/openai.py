"""OpenAI's dialect: /v1/embeddings and /v1/models. Its errors' form is in api/errors.py."""

import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import msgspec
from flask import Blueprint

from api import cl100k
from api.codec import encode_chunks, encode_vector
from api.endpoint import endpoint
from api.images import are_pictures, decode_pictures
from api.schemas import OpenAIEmbeddings, OpenAIEmbedRequest, OpenAIModel, OpenAIModels
from api.service import Service, TextModel
from embeddings import TextEmbedding
from engine.errors import InputTooLarge, InvalidInput
from engine.models import Target
from limits import TextLimits
from server.messages import current
from server.tasks import in_thread

if TYPE_CHECKING:
    from image_embeddings import ImageEmbedding

_TOKEN_IDS = (
    "Expected `str`, got token ids; token ids belong to another model's tokenizer: send the text "
    "itself, as a string or a list of strings (LangChain: check_embedding_ctx_length=False)"
)
_KINDS: dict[type, str] = {str: "a text", int: "a token id", list: "a list of token ids"}


def blueprint(
    service: Service, table: cl100k.Table | None, max_bytes: int, limits: TextLimits
) -> Blueprint:
    """OpenAI's routes.

    Args:
        table: turns token ids into text; None where they are not taken.
        max_bytes: most bytes of text that a request's token ids may stand for.
        limits: of a request's texts.
    """
    routes = Blueprint("openai", __name__, url_prefix="/v1")

    @routes.get("/models")
    @endpoint(OpenAIModels, further={503: None})
    def list_models() -> object:
        """List the models that are served, and their aliases."""
        models = service.models
        targets = (*map(models.resolve, models.bundles), *models.aliases)
        data = [_describe(target, embedder) for target, embedder in service.embedders(targets)]
        return {"object": "list", "data": data}

    @routes.get("/models/<path:model>")
    @endpoint(OpenAIModel, further={503: None})
    def retrieve_model(model: str) -> object:
        """Describe one model, by its name, source or alias."""
        ((target, embedder),) = service.embedders([service.models.resolve(model)])
        return _describe(target, embedder)

    @routes.post("/embeddings")
    @endpoint(OpenAIEmbeddings, OpenAIEmbedRequest, further={501: None})
    def create_embedding(body: OpenAIEmbedRequest) -> object:
        """Embed one text or several, which may be token ids of cl100k_base, or pictures as data
        URIs. `user` is taken and has no effect.
        """
        sent = read_input(body.input, table, max_bytes, limits)
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


def read_input(
    sent: str | list[str | int | list[int]],
    table: cl100k.Table | None,
    max_bytes: int,
    limits: TextLimits,
) -> str | list[str]:
    """The text or the texts of `input`, which may be token ids: one list is a text, several are
    several.

    Args:
        table, max_bytes, limits: as `blueprint` takes them.

    Raises: InvalidInput for a list of different things, for token ids that are not taken or stand
    for no text, and for too many lists of them; InputTooLarge for more than `max_bytes` of text.
    """
    if isinstance(sent, str):
        return sent
    kind: type = type(sent[0]) if sent else str
    if kind is str or (kind is list and table is not None):
        # Before each is looked at: 9 million empty lists, 27 MB, took 33 s.
        try:
            limits.check_count(len(sent))
        except InvalidInput as error:
            raise error.at("$.input") from None
    for index, each in enumerate(sent):
        if type(each) is not kind:
            message = f"{_KINDS[type(each)]} beside {_KINDS[kind]}; send one kind in a request"
            raise InvalidInput(message, index).at("$.input[{}]")
    if kind is str:
        return cast(list[str], sent)
    if table is None:
        raise InvalidInput(_TOKEN_IDS, 0).at("$.input[{}]")
    if not table.loaded:
        in_thread(table.load, current.get().caller)
    if kind is int:
        return _decode(table, {"$.input": cast(list[int], sent)}, max_bytes)[0]
    rows = cast(list[list[int]], sent)
    return _decode(table, {f"$.input[{row}]": ids for row, ids in enumerate(rows)}, max_bytes)


def _decode(table: cl100k.Table, lists: Mapping[str, Sequence[int]], max_bytes: int) -> list[str]:
    """The texts of lists of token ids, by their places in the body."""
    total = 0
    for place, ids in lists.items():
        try:
            total += table.size(ids)
        except InvalidInput as error:
            raise error.at(f"{place}[{{}}]") from None
        if total > max_bytes:
            raise InputTooLarge(
                f"{place}: the token ids up to here stand for {total} bytes of text; the limit is "
                f"{max_bytes} (MAX_BODY_SIZE)",
                field="input",
            )
    return [*map(table.text, lists.values())]


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
        "model": body.model or model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _describe(target: Target, embedder: TextModel) -> dict[str, object]:
    manifest = target.bundle.manifest
    engine = embedder.engine
    parity = engine.measured or manifest.parity[engine.backend][engine.precision]
    certificate = msgspec.structs.asdict(parity)
    if parity.tau is None:
        del certificate["tau"]
    return {
        "id": target.asked,
        "object": "model",
        "created": int(datetime.datetime.fromisoformat(manifest.created).timestamp()),
        "owned_by": manifest.source.rpartition("/")[0] or "local",
        "alias_of": manifest.name if target.alias else None,
        "prompt_name": target.prompt,
        "fingerprint": target.fingerprint,
        "task": manifest.task,
        "labels": manifest.scorer.labels if manifest.scorer else None,
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
