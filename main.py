"""The service: `gunicorn main:app`. Puts settings, models, routes and the server together."""

import atexit
import dataclasses
import functools
import logging
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from wsgiref.types import StartResponse

import settings as configuration
from api import (
    cl100k,
    cohere,
    docs,
    health,
    images,
    logs,
    metrics,
    native,
    ollama,
    openai,
    scoring,
    tei,
    traces,
)
from api.auth import KeyCheck
from api.compression import Bodies, Compression
from api.cors import Cors
from api.routes import CheckedFlask, Router, register_errors
from api.service import Embedders, Service, note_truncated
from embeddings import Float32, TextEmbedder, Truncation, VectorCache
from engine.bundle import Bundle, Task, discover
from engine.choice import image_engine, right_engine, text_engine
from engine.errors import BundleError, EmbedderError
from engine.models import Models
from engine.protocol import Engine
from engine.queue import Queue
from engine.quota import Quota, QuotaLimits
from limits import ImageLimits, TextLimits
from probes import certify, check_probe, of_the_service, say_what_int8_costs
from server import tasks
from server.limits import Limits
from server.messages import Loop
from scores import TextScorer
from settings import Settings
from tokens import load_tokenizer

if TYPE_CHECKING:
    from image_embeddings import ImageEmbedder

# By a model's task: the route, and what stands before the text in the body.
_WARM_UP: dict[Task, tuple[str, str]] = {
    "embed": ("/embeddings", '"text"'),
    "classify": ("/classify", '"text"'),
    "rerank": ("/rerank", '"documents": ["a document"], "query"'),
}

M = TypeVar("M", TextEmbedder, TextScorer)

log = logging.getLogger(__name__)

OPEN_PATHS = (*health.PATHS, *docs.PATHS)

# Seconds after which a ready service prepares to compute lone texts on all cores, so that this does
# not compete with the requests that waited for the start.
WIDEN_AFTER = 1.0
# A request is refused unread if so many bytes a token would be too much; texts have fewer, about 5.
BYTES_PER_TOKEN, BYTES_PER_TOKEN_OF_PICTURES = 8, 2048
# Requests of its own with which a worker begins: Python specialises code that has run eight times.
WARM_UP_REQUESTS = 20


class Application:
    """What a worker serves, as server.messages.Application. Nothing is loaded, and no thread is
    started, before `start`, so that gunicorn's `--preload` works.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ
        self._leaving = threading.Event()
        self._starting = threading.Lock()  # other servers' threads may come at once
        self._router: Router | None = None

    def start(self, workers: int = 1, loop: Loop | None = None) -> None:
        """Build the service and begin to load its models in a thread; it answers at once.

        Args:
            workers: processes that share the machine's cores.
            loop: the calling thread's, which serves the queue from now on; None for other servers.

        Raises: SettingsError, BundleError, ModelNotFound, WrongAlias.
        """
        self.settings = settings = configuration.load(
            {**self._environ, "WEB_CONCURRENCY": str(workers)}
        )
        logs.configure(settings.log_format, settings.log_level, settings.secrets)
        self.models = make_models(settings)
        quotas = make_quotas(settings)
        self.queue = make_queue(settings, loop.busy_threads if loop else lambda: 0, quotas)
        self.metrics = metrics.Metrics(self.models, self.queue)
        self.flask = self.make_flask()
        self.metrics.add_routes(self.flask.url_map)
        metrics.name_keys(name for name, _ in settings.keys)
        self.metrics.add_keys()
        self.traces = traces.make(self._environ)
        bodies = Bodies(settings.max_body_size, Limits().held_bodies * settings.max_body_size)
        paths = [rule.rule for rule in self.flask.url_map.iter_rules()]
        self._router = Router(
            self.flask,
            KeyCheck(settings.keys, OPEN_PATHS),
            settings.max_body_size,
            self.queue,
            self.metrics,
            logs.RequestLog(settings.log_format, settings.log_level, settings.secrets, paths),
            bodies,
            Compression(settings.compress_from, docs.PATHS),
            quotas,
            BYTES_PER_TOKEN_OF_PICTURES if self.models.take_pictures else BYTES_PER_TOKEN,
            Cors(settings.origins) if settings.origins else None,
            self.traces,
        )
        self.respond, self.refuse = self._router.respond, self._router.refuse
        self.sent, self.dropped = self._router.sent, self._router.dropped
        self.flask.check, self.flask.decoded = self._router.check, bodies.decoded
        if loop:
            self.queue.attach(loop.call_soon)
            loop.when_readable(self.queue.fileno(), self.queue.collect)
        else:
            self.queue.start()
            atexit.register(self.close)
        # Not a daemon: OpenVINO aborts a process that exits while it compiles.
        threading.Thread(target=self._load, name="load-models").start()

    def make_flask(self) -> CheckedFlask:
        """All routes. What is added to Flask here (CORS, `after_request`) works on every one."""
        settings = self.settings
        app = CheckedFlask(__name__, static_folder=None)
        # Else `/v1//models` would be redirected, and to an address without a host.
        app.url_map.merge_slashes = False
        register_errors(app)
        service = Service(self.models, settings.request_timeout)
        taken = settings.openai_token_ids == "cl100k_base"
        token_ids = cl100k.Table(configuration.CL100K_TABLE) if taken else None
        limits = {
            "max_concurrent_requests": settings.request_threads,
            "max_batch_tokens": settings.max_batch_tokens,
            "max_batch_requests": settings.max_batch_size,
            "max_client_batch_size": settings.max_inputs,
            "tokenization_workers": settings.request_threads,
        }
        for blueprint in (
            health.blueprint(self.models),
            native.blueprint(service, own_limits(settings)),
            images.blueprint(service),
            openai.blueprint(service, token_ids, settings.max_body_size, text_limits(settings)),
            ollama.blueprint(service),
            tei.blueprint(service, limits),
            scoring.blueprint(service, own_limits(settings)),
            cohere.blueprint(service),
            docs.blueprint(OPEN_PATHS),
            metrics.blueprint(self.metrics),
        ):
            app.register_blueprint(blueprint)
        return app

    def _load(self) -> None:
        settings, models = self.settings, self.models
        cached = self.metrics.cached
        cache = VectorCache(settings.cache_size, cached) if settings.cache_size else None
        truncation = Truncation(settings.truncation == "honour", self._truncated)

        try:
            models.load(
                lambda bundle: load_embedders(bundle, settings, self.queue, cache, truncation)
            )
            log.info("serving %s", _describe(settings, models))
        except Exception as error:
            if self._leaving.is_set():
                return
            if not isinstance(error, EmbedderError):
                log.error("unexpected error while loading", exc_info=error)
            _stop_service(str(error))
            return
        if self._leaving.wait(WIDEN_AFTER):
            return
        try:
            for name in models.bundles:
                models.get(name, math.inf).model.widen()
        except Exception as error:  # slower, but still correct
            log.warning("a text that is alone will be computed on one core: %s", error)

    def _truncated(self, texts: int) -> None:
        """So many texts of the current request were cut."""
        note_truncated(texts)
        self.metrics.truncated(texts)

    def warm_up(self) -> Iterator[bytes]:
        """Requests of our own: a first one takes three times as long as later ones. Half of them
        have a new target and a new word, as a client's first request may have. The longest come
        first, so that memory is allocated once.
        """
        self.models.warming = True
        path, field = _WARM_UP[self.models.bundle().manifest.task]
        try:
            for number in range(WARM_UP_REQUESTS):
                word, query = (f"word{number}", "?" + "&" * number) if number % 2 else ("text", "")
                texts = "a first text and " * ((WARM_UP_REQUESTS - number) // 2)
                body = f'{{{field}: "{texts}its last {word}"}}'
                yield (
                    f"POST {path}{query} HTTP/1.1\r\nHost: localhost\r\n"
                    f"X-API-Key: {self.settings.api_keys[0]}\r\n"
                    f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
                ).encode()
        finally:
            self.models.warming = False

    def tick(self) -> None:
        """Called about once a second."""
        self.metrics.sample()

    def stop(self) -> None:
        """Fail what still waits for the engine or for a model."""
        self._leaving.set()
        self.queue.stop()
        self.models.stop()

    def close(self) -> None:
        """Compute what waits, and end the threads."""
        self._leaving.set()
        self.queue.close()
        if self.traces:
            self.traces.close()

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """The service as a WSGI application, for other servers than our own."""
        with self._starting:
            if self._router is None:
                self.start()
        assert self._router
        return self._router(environ, start_response)


def _describe(settings: Settings, models: Models[Embedders]) -> str:
    """The models and the limits, in one line, for the log."""
    served = ", ".join(
        f"{name} ({models.get(name, 0).model.precision}, {_size(bundle)}, "
        f"{' and '.join(bundle.manifest.modalities)})"
        for name, bundle in models.bundles.items()
    )
    return (
        f"{served}; default {models.default}; {settings.web_concurrency} workers, in each "
        f"{settings.inference_threads} inference threads and {settings.request_threads} requests "
        f"at a time; engine calls of up to {settings.max_batch_size} chunks and "
        f"{settings.max_batch_tokens} tokens; requests of up to {settings.max_texts_per_batch} "
        f"texts ({settings.max_inputs} in the dialects of other services), "
        f"{settings.max_images_per_batch} pictures, {settings.max_request_tokens} tokens "
        f"and {settings.max_body_size} bytes; a queue of {settings.max_queue_tokens} tokens; "
        f"{settings.request_timeout:g} s a request"
    )


def _size(bundle: Bundle) -> str:
    """What a bundle gives, for the log."""
    manifest = bundle.manifest
    if manifest.scorer:
        return f"task {manifest.task}, labels {', '.join(manifest.scorer.labels)}"
    return f"{manifest.size} dimensions"


def make_models(settings: Settings) -> Models[Embedders]:
    """The bundles of MODELS_DIR, not loaded. Raises: BundleError, ModelNotFound, WrongAlias."""
    bundles = discover(pathlib.Path(settings.models_dir))
    return Models(bundles, settings.embedding_model or None, settings.aliases, tasks.event)


def make_quotas(settings: Settings) -> dict[str | None, Quota]:
    """The limits of keys, by name, of which this process takes its part."""
    return {
        name: Quota(name, QuotaLimits(**limits), workers=settings.web_concurrency)
        for name, limits in settings.limits_of_keys.items()
    }


def make_queue(
    settings: Settings,
    others: Callable[[], int] = lambda: 0,
    quotas: Mapping[str | None, Quota] | None = None,
) -> Queue:
    """The queue of all models, not started. `others`: threads that are busy with other work."""
    return Queue(
        max_batch_size=settings.max_batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_queue_tokens=settings.max_queue_tokens,
        threads=settings.inference_threads,
        max_queue_seconds=settings.max_queue_seconds,
        event=tasks.event,
        others=others,
        tenants=len({name for name, _ in settings.keys}),
        quotas=quotas,
    )


def text_limits(settings: Settings) -> TextLimits:
    """The limits of the dialects of other services."""
    return TextLimits(settings.max_inputs, settings.max_text_size, settings.max_request_tokens)


def own_limits(settings: Settings) -> TextLimits:
    """The limits of the service's own routes."""
    return dataclasses.replace(
        text_limits(settings),
        max_texts=settings.max_texts_per_batch,
        count_setting="MAX_TEXTS_PER_BATCH",
    )


def load_embedders(
    bundle: Bundle,
    settings: Settings,
    queue: Queue,
    cache: VectorCache | None = None,
    truncation: Truncation = Truncation(),
) -> Embedders:
    """Load one model for texts, and for pictures where it takes them; or for scores.

    Raises: BundleError, PrecisionUnavailable, DeviceUnavailable.
    """
    if bundle.manifest.scorer:
        return Embedders(None, None, load_scorer(bundle, settings, queue, cache, truncation))
    # First, since more texts are compared than pictures: what is left out for texts is left out for
    # pictures too.
    texts = load_embedder(bundle, settings, queue, cache, truncation)
    pictures = "image" in bundle.manifest.modalities
    return Embedders(texts, load_image_embedder(bundle, settings, queue) if pictures else None)


def load_embedder(
    bundle: Bundle,
    settings: Settings,
    queue: Queue,
    cache: VectorCache | None = None,
    truncation: Truncation = Truncation(),
) -> TextEmbedder:
    """Load one model and see that it still gives its probe's vector.

    Raises: as `load_embedders`; BundleError for one that gives scores.
    """
    if bundle.manifest.scorer:
        raise BundleError(
            f"bundle {bundle.path}: its task is {bundle.manifest.task}, and it gives no vectors"
        )

    def vector(model: TextEmbedder) -> Float32:
        (embedding,) = model.embed([bundle.manifest.probe.text], **of_the_service(bundle))
        return embedding.vector

    return _load_texts(TextEmbedder, vector, bundle, settings, queue, cache, truncation)


def load_scorer(
    bundle: Bundle,
    settings: Settings,
    queue: Queue,
    cache: VectorCache | None = None,
    truncation: Truncation = Truncation(),
) -> TextScorer:
    """Load one reranker or classifier and see that it still gives its probe's scores.

    Raises: as `load_embedders`.
    """

    def raw(model: TextScorer) -> Float32:
        probe, waiting = bundle.manifest.probe, of_the_service(bundle)
        sent = probe.text if probe.first is None else (probe.first, probe.text)
        (found,) = model.score([sent], deadline=waiting["deadline"], tenant=waiting["tenant"])
        return found.raw

    return _load_texts(TextScorer, raw, bundle, settings, queue, cache, truncation)


def _load_texts(
    kind: type[M],
    compute: Callable[[M], Float32],
    bundle: Bundle,
    settings: Settings,
    queue: Queue,
    cache: VectorCache | None,
    truncation: Truncation,
) -> M:
    """Args:
        compute: what a model gives for the probe.

    Raises: as `load_embedders`.
    """
    started = time.perf_counter()
    tokenizer, pad_id, pad_left = load_tokenizer(bundle)
    make = functools.partial(
        text_engine,
        bundle,
        settings.precision,
        pad_id=pad_id,
        pad_left=pad_left,
        streams=settings.inference_threads,
        isa=settings.encoder_isa,
        device=settings.device,
    )

    def check(engine: Engine) -> float:
        probe = bundle.manifest.probe
        # The probe passes whatever limits were set.
        found = compute(kind(bundle, tokenizer, engine, queue, TextLimits()))
        cosine = check_probe(bundle, engine, "probe text", probe.vector, found)
        certify(bundle, engine, queue)
        return cosine

    engine, cosine = right_engine(bundle, settings.precision, make, check)
    log.info(
        "model %s ready in %.2f s: %s by %s, %s, window %d tokens, %d inference threads, probe "
        "%s %.5f",
        bundle.manifest.name,
        time.perf_counter() - started,
        engine.precision,
        f"{engine.backend} ({engine.isa})" if engine.isa else engine.backend,
        _size(bundle),
        bundle.manifest.max_tokens,
        settings.inference_threads,
        "nearness" if bundle.manifest.scorer else "cosine",
        cosine,
    )
    say_what_int8_costs(bundle, engine)
    return kind(bundle, tokenizer, engine, queue, text_limits(settings), cache, truncation)


def load_image_embedder(bundle: Bundle, settings: Settings, queue: Queue) -> "ImageEmbedder":
    """Load a model's image tower and see that it still gives its probe's vector.

    Raises: as `load_embedders`.
    """
    # Here, since Pillow costs time and memory that a model of texts may do without.
    from image_embeddings import ImageEmbedder, probe_picture

    streams, device = settings.inference_threads, settings.device
    what, expected = "probe picture", bundle.manifest.image_probe or []

    def check(engine: Any) -> float:
        # The probe passes whatever limits were set.
        probe = ImageEmbedder(bundle, engine.preprocessing, engine, queue, ImageLimits())
        (embedding,) = probe.embed([probe_picture()], **of_the_service(bundle))
        return check_probe(bundle, engine, what, expected, embedding.vector)

    isa = settings.encoder_isa
    make = functools.partial(
        image_engine, bundle, settings.precision, streams=streams, isa=isa, device=device
    )
    engine, cosine = right_engine(bundle, settings.precision, make, check)
    limits = ImageLimits(
        settings.max_images_per_batch,
        settings.max_image_size,
        settings.max_image_pixels,
        settings.max_request_tokens,
    )
    if engine.precision not in bundle.manifest.image_parity.get(engine.backend, {}):
        message = "model %s: the bake could not run %s with pictures at %s; the %s's cosine is %.5f"
        log.info(message, bundle.manifest.name, engine.backend, engine.precision, what, cosine)
    return ImageEmbedder(bundle, engine.preprocessing, engine, queue, limits)


def _stop_service(line: str) -> None:
    """End with code 3, on which gunicorn stops for good instead of starting the worker again."""
    log.critical("cannot serve: %s", line)
    logging.shutdown()
    os._exit(3)


def __getattr__(name: str) -> Any:
    # Made when gunicorn asks for it, not when a test or a tool imports this file.
    if name == "app":
        return Application()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
