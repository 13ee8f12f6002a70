"""The dialect of text-embeddings-inference (/embed, /, /similarity, /tokenize, /info), and the
plain one that shares its /embed.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from flask import Blueprint

from api.codec import begins, encode_vector, peek
from api.endpoint import VERSION, endpoint
from api.images import refuse_pictures
from api.schemas import (
    FlatSimilarityRequest,
    Info,
    PlainRequest,
    PredictRequest,
    SimilarityRequest,
    TEIEmbedRequest,
    TEIRerankRequest,
    Token,
    TokenizeRequest,
)
from api.scoring import predict, tei_rerank
from api.service import Service, TextModel
from server.messages import HttpError, Request

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}
# One vector a text of `inputs`, or the numbers of a single vector or of similarities.
Numbers = list[list[float] | float]


class _Shape(msgspec.Struct):
    """As much of a body as tells which kind it is."""

    text: msgspec.Raw = msgspec.Raw()
    inputs: msgspec.Raw = msgspec.Raw()
    source_sentence: msgspec.Raw = msgspec.Raw()
    query: msgspec.Raw = msgspec.Raw()
    model: str | None = None


def _embed_body(request: Request) -> type[TEIEmbedRequest | PlainRequest]:
    shape = peek(request, _Shape)
    if _given(shape.text) and _given(shape.inputs):
        raise HttpError(400, "validation", "this route takes `inputs` or `text`, not both")
    return PlainRequest if _given(shape.text) else TEIEmbedRequest


def _given(sent: msgspec.Raw) -> bool:
    return begins(sent, 5) not in (b"", b"null")


Similarity = SimilarityRequest | FlatSimilarityRequest


def _similarity_body(request: Request) -> type[Similarity]:
    shape = peek(request, _Shape)
    flat = _given(shape.source_sentence) and not _given(shape.inputs)
    return FlatSimilarityRequest if flat else SimilarityRequest


Root = TEIEmbedRequest | Similarity | TEIRerankRequest | PredictRequest


def _root_body(service: Service, request: Request) -> type[Root]:
    shape = peek(request, _Shape)
    if _given(shape.query):
        return TEIRerankRequest
    if _given(shape.inputs) and service.task(shape.model) == "classify":
        return PredictRequest
    if begins(shape.inputs, 1) == b"{" or _given(shape.source_sentence):
        return _similarity_body(request)
    return TEIEmbedRequest


def blueprint(service: Service, limits: Mapping[str, int]) -> Blueprint:
    """The routes; `limits` are what /info tells of the configuration."""
    routes = Blueprint("tei", __name__)

    @routes.post("/embed")
    @endpoint(Numbers, TEIEmbedRequest, PlainRequest, choose=_embed_body)
    def embed_inputs(body: TEIEmbedRequest | PlainRequest) -> object:
        """Embed `inputs`, a text or several: a vector for each. Or `text`: its vector alone."""
        if isinstance(body, TEIEmbedRequest):
            return _embed(service, body)
        refuse_pictures(service, body.model, body.text, "text")
        _, (embedding,) = service.embed_texts(
            body.text,
            "text",
            body.model,
            prompt_name=body.prompt_name,
            dimensions=body.dimensions,
        )
        return embedding.vector

    def root_body(request: Request) -> type[Root]:
        return _root_body(service, request)

    @routes.post("/")
    @endpoint(
        list[Any],  # of the four routes' items: OpenAPI's types here cannot be told apart
        TEIEmbedRequest,
        SimilarityRequest,
        FlatSimilarityRequest,
        TEIRerankRequest,
        PredictRequest,
        choose=root_body,
    )
    def embed_or_compare(body: Root) -> object:
        """What /embed, /similarity, /rerank or /predict answers to the same body."""
        if isinstance(body, TEIRerankRequest):
            return tei_rerank(service, body)
        if isinstance(body, PredictRequest):
            return predict(service, body)
        if isinstance(body, TEIEmbedRequest):
            return _embed(service, body)
        return _compare(service, body)

    @routes.post("/similarity")
    @endpoint(list[float], SimilarityRequest, FlatSimilarityRequest, choose=_similarity_body)
    def similarity(body: Similarity) -> object:
        """The cosine of each sentence to the source sentence."""
        return _compare(service, body)

    @routes.post("/tokenize")
    @endpoint(list[list[Token]], TokenizeRequest)
    def tokenize(body: TokenizeRequest) -> object:
        """The tokens of each text, and of the prompt before it."""
        target = service.models.resolve(body.model)
        prompt_name = service.prompt(target, body.prompt_name)
        return service.run(
            target,
            "$.inputs" if isinstance(body.inputs, str) else "$.inputs[{}]",
            lambda embedders, _: embedders.model.tokenize(
                [body.inputs] if isinstance(body.inputs, str) else body.inputs,
                prompt_name=prompt_name,
                add_special_tokens=body.add_special_tokens is not False,
            ),
        )

    @routes.get("/info")
    @endpoint(Info, further={503: None})
    def info() -> object:
        """The default model and the service's limits."""
        ((target, model),) = service.embedders([service.models.resolve()])
        return {**_describe(model), "fingerprint": target.fingerprint, **limits}

    return routes


def _embed(service: Service, body: TEIEmbedRequest) -> object:
    refuse_pictures(service, body.model, body.inputs, "inputs")
    _, embedded = service.embed_texts(
        body.inputs,
        "inputs",
        body.model,
        prompt_name=body.prompt_name,
        dimensions=body.dimensions,
        normalize=body.normalize is not False,
        truncate=body.side,
    )
    return [encode_vector(embedding.vector, None) for embedding in embedded]


def _compare(service: Service, body: Similarity) -> object:
    pair, path = (body.inputs, "inputs.") if isinstance(body, SimilarityRequest) else (body, "")
    refuse_pictures(service, body.model, pair.source_sentence, f"{path}source_sentence")
    refuse_pictures(service, body.model, pair.sentences, f"{path}sentences")
    target = service.resolve(body.model, "embed")
    prompt_name = service.prompt(target, body.prompt_name)
    return service.run(
        target,
        f"$.{path}sentences[{{}}]",
        lambda embedders, waiting: embedders.embedder.similarities(
            pair.sentences,
            pair.source_sentence,
            **waiting,
            prompt_name=prompt_name,
            truncate=body.side,
        ),
    )


def _describe(model: TextModel) -> dict[str, object]:
    manifest, engine = model.manifest, model.engine
    kind: dict[str, object] = {"embedding": {"pooling": "in the model's graph"}}
    if manifest.scorer:
        labels = dict(enumerate(manifest.scorer.labels))
        names = {
            "id2label": {str(number): label for number, label in labels.items()},
            "label2id": {label: number for number, label in labels.items()},
        }
        kind = {"reranker" if manifest.task == "rerank" else "classifier": names}
    return {
        "model_id": manifest.source,
        "model_sha": manifest.revision,
        "model_dtype": _DTYPES[model.precision],
        "model_type": kind,
        "max_input_length": manifest.max_tokens,
        "auto_truncate": False,
        "version": VERSION,
        "engine": engine.backend,
        "instruction_set": engine.isa,
    }
