"""Ollama's dialect: /api/embed and what its clients ask around it. Its errors' form is in
api/errors.py.

https://github.com/ollama/ollama/blob/main/docs/api.md
"""

import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec
from flask import Blueprint, Response

from api.codec import encode_vector, read_json
from api.endpoint import endpoint
from api.images import refuse_pictures
from api.service import Embedders, Service, TextModel
from embeddings import TextEmbedder, TextEmbedding
from engine.bundle import Manifest
from engine.models import Models, Target
from server.messages import HttpError, Request, current

# What /api/version tells: the API is this version's. Some clients want a smallest one.
OLLAMA_VERSION = "0.13.3"
RUNNING = "Ollama is running"  # clients look for a server by GET or HEAD /
NEVER = "9999-12-31T23:59:59Z"  # when a model is unloaded
LATEST = ":latest"  # the tag that a name without one means
_LEVELS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "int8": "I8"}  # ggml's names
_ABSENT = {
    "POST": ("/generate", "/chat", "/pull", "/push", "/create", "/copy", "/blobs/<digest>"),
    "GET": ("/blobs/<digest>",),
    "DELETE": ("/delete",),
}


Find = Callable[[str | None], str | None]


class _Options(msgspec.Struct, kw_only=True):
    """`keep_alive` and `options` have no effect: a model stays loaded, and embeds in one way."""

    model: str | None = None  # absent or empty: the default model
    truncate: bool | None = None  # absent: true
    dimensions: int | None = None  # absent or 0: as many as the model has
    prompt_name: str | None = None  # not in Ollama
    keep_alive: float | str | None = None
    options: dict[str, Any] | None = None


class OllamaEmbedRequest(_Options, kw_only=True):
    """No input, or an empty one, only waits for the model."""

    input: str | list[str] | None = None


class OllamaPromptRequest(_Options, kw_only=True):
    """An empty prompt only waits for the model."""

    prompt: str | None = None


class OllamaShowRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    name: str | None = None  # what `model` was called in early versions
    verbose: bool | None = None  # no effect, as the next three
    system: str | None = None
    template: str | None = None
    options: dict[str, Any] | None = None


class OllamaEmbeddings(msgspec.Struct):
    """Durations are nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int  # for which the request waited for the model
    prompt_eval_count: int  # tokens


class OllamaEmbedding(msgspec.Struct):
    embedding: list[float]


class OllamaDetails(msgspec.Struct):
    parent_model: Literal[""]
    format: Literal["bundle"]
    family: str
    families: list[str]
    parameter_size: Literal[""]  # not known
    quantization_level: str
    context_length: int
    embedding_length: int


class OllamaModel(msgspec.Struct):
    name: str
    model: str
    modified_at: str
    size: int  # bytes
    digest: str
    details: OllamaDetails
    capabilities: list[Literal["embedding"]]


class OllamaModels(msgspec.Struct):
    models: list[OllamaModel]


class OllamaRunningModel(msgspec.Struct):
    name: str
    model: str
    size: int
    digest: str
    details: OllamaDetails
    expires_at: str
    size_vram: int
    context_length: int


class OllamaRunningModels(msgspec.Struct):
    models: list[OllamaRunningModel]


class OllamaShown(msgspec.Struct):
    details: OllamaDetails
    model_info: dict[str, str | int]
    capabilities: list[Literal["embedding"]]
    modified_at: str


class OllamaVersion(msgspec.Struct):
    version: str


def blueprint(service: Service) -> Blueprint:
    """Ollama's routes."""
    routes = Blueprint("ollama", __name__)
    find = finder(service.models)
    _add_embedding(routes, service, find)
    _add_models(routes, service, find)

    @routes.get("/api/version")
    @endpoint(OllamaVersion)
    def version() -> object:
        """The version of Ollama whose API this is."""
        return {"version": OLLAMA_VERSION}

    @routes.get("/")
    def running() -> Response:
        return Response(RUNNING, content_type="text/plain; charset=utf-8")

    def absent(digest: str = "") -> Response:
        raise HttpError(
            *(501, "not_supported"),
            f"{current.get().path} is not served: this service embeds and does not generate, and "
            "its models are baked into it; it has POST /api/embed, /api/embeddings and /api/show, "
            "GET /api/tags, /api/ps and /api/version",
        )

    for method, paths in _ABSENT.items():
        for path in paths:
            routes.add_url_rule(f"/api{path}", "absent", absent, methods=[method])
    return routes


def _add_embedding(routes: Blueprint, service: Service, find: Find) -> None:
    @routes.post("/api/embed")
    @endpoint(OllamaEmbeddings, OllamaEmbedRequest, read=_reader(OllamaEmbedRequest))
    def embed(body: OllamaEmbedRequest) -> object:
        """Embed one text or several."""
        started = time.monotonic_ns()
        name, loaded = find(body.model), started

        def note_loaded() -> None:
            nonlocal loaded
            loaded = time.monotonic_ns()

        if body.input:
            embedder, embedded = _embed(service, body, name, body.input, "input", note_loaded)
        else:
            embedder, embedded = service.embedder(name), []
            note_loaded()
        return {
            "model": body.model or embedder.manifest.name,
            "embeddings": [encode_vector(embedding.vector, None) for embedding in embedded],
            "total_duration": time.monotonic_ns() - started,
            "load_duration": loaded - started,
            "prompt_eval_count": sum(embedding.tokens for embedding in embedded),
        }

    @routes.post("/api/embeddings")
    @endpoint(OllamaEmbedding, OllamaPromptRequest, read=_reader(OllamaPromptRequest))
    def embed_prompt(body: OllamaPromptRequest) -> object:
        """Embed one text, in the form that /api/embed has superseded."""
        name = find(body.model)
        if not body.prompt:
            service.embedder(name)
            return {"embedding": []}
        _, (embedding,) = _embed(service, body, name, body.prompt, "prompt")
        return {"embedding": encode_vector(embedding.vector, None)}


def _add_models(routes: Blueprint, service: Service, find: Find) -> None:
    models = service.models

    @routes.get("/api/tags")
    @endpoint(OllamaModels, further={503: None})
    def list_models() -> object:
        """List the models that are served, and their aliases."""
        targets = _embedding(*map(models.resolve, models.bundles), *models.aliases)
        listed = [
            {
                **_identify(target),
                "modified_at": target.bundle.manifest.created,
                "details": _details(embedder),
                "capabilities": ["embedding"],
            }
            for target, embedder in service.embedders(targets)
        ]
        return {"models": listed}

    @routes.post("/api/show")
    @endpoint(OllamaShown, OllamaShowRequest, read=_reader(OllamaShowRequest))
    def show_model(body: OllamaShowRequest) -> object:
        """Describe one model, by its name, source or alias."""
        embedder = service.embedder(find(body.model or body.name))
        manifest, family = embedder.manifest, _family(embedder.manifest)
        return {
            "details": _details(embedder),
            "model_info": {
                "general.architecture": family,
                "general.basename": manifest.name,
                f"{family}.context_length": manifest.max_tokens,
                f"{family}.embedding_length": manifest.size,
            },
            "capabilities": ["embedding"],
            "modified_at": manifest.created,
        }

    @routes.get("/api/ps")
    @endpoint(OllamaRunningModels)
    def list_loaded() -> object:
        """List the models that are loaded: all, once the service is ready."""
        targets = filter(models.loaded, _embedding(*map(models.resolve, models.bundles)))
        loaded = [
            {
                **_identify(target),
                "details": _details(embedder),
                "expires_at": NEVER,
                "size_vram": 0,
                "context_length": target.bundle.manifest.max_tokens,
            }
            for target, embedder in service.embedders(targets)
        ]
        return {"models": loaded}


def finder(models: Models[Embedders]) -> Find:
    """Finds the name by which the service knows the model that a request names: Ollama's may be in
    any case, and have the tag LATEST.
    """
    sources = [bundle.manifest.source for bundle in models.bundles.values()]
    aliases = [target.asked for target in models.aliases]
    known = {name.casefold(): name for name in (*sources, *models.bundles, *aliases)}

    def find(asked: str | None) -> str | None:
        if not asked:
            return None
        bare = asked.removesuffix(LATEST)
        for name in (asked, bare, bare + LATEST):
            if models.knows(name):
                return name
        return known.get(asked.casefold()) or known.get(bare.casefold()) or bare

    return find


def _reader(schema: type[msgspec.Struct]) -> Callable[[Request], object]:
    """Reads JSON under whatever Content-Type: Ollama looks at none, and its documentation's curl
    commands send a form's.
    """
    return lambda request: read_json(request, schema, any_type=True)


def _embed(
    service: Service,
    body: _Options,
    model: str | None,
    sent: str | list[str],
    field: str,
    loaded: Callable[[], None] = lambda: None,
) -> tuple[TextEmbedder, list[TextEmbedding]]:
    refuse_pictures(service, model, sent, field)
    return service.embed_texts(
        sent,
        field,
        model,
        prompt_name=body.prompt_name,
        dimensions=body.dimensions or None,
        truncate=None if body.truncate is False else "right",
        loaded=loaded,
    )


def _identify(target: Target) -> dict[str, object]:
    listed = target.asked if ":" in target.asked else target.asked + LATEST
    return {
        "name": listed,
        "model": listed,
        "size": sum(file.size for file in target.bundle.manifest.files.values()),
        "digest": target.fingerprint,
    }


def _family(manifest: Manifest) -> str:
    return "bert" if manifest.encoder else "transformer"


def _embedding(*targets: Target) -> list[Target]:
    """Those that embed: Ollama knows no other task."""
    return [target for target in targets if target.bundle.manifest.task == "embed"]


def _details(embedder: TextModel) -> dict[str, object]:
    manifest = embedder.manifest
    family = _family(manifest)
    return {
        "parent_model": "",
        "format": "bundle",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": _LEVELS[embedder.precision],
        "context_length": manifest.max_tokens,
        "embedding_length": manifest.size,
    }
