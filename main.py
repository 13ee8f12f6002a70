"""The WSGI application: `gunicorn main:app`. Puts settings, models and routes together."""

import atexit
import gc
import logging
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from flask import Flask

import settings as configuration
from api import auth, docs, errors, health, images, logs, metrics, native, openai, tasks, tei
from api.application import Application
from api.service import Embedders, Service
from api.watch import Watch
from embeddings import Float32, TextEmbedder, TextLimits, VectorCache
from engine.queue import Queue
from engine.bundle import PARITY_FLOOR, Bundle, Precision, discover
from engine.choice import text_engine
from engine.errors import BundleError, EmbedderError
from engine.models import Models
from image_embeddings import ImageEmbedder, ImageLimits, probe_picture
from settings import Settings
from tokens import load_tokenizer

log = logging.getLogger(__name__)

OPEN_PATHS = ("/health", "/health/ready", "/healthcheck", *docs.PATHS)

# Seconds after which a ready service prepares for lone texts, on all cores: not beside the requests
# that have waited for its start.
WIDEN_AFTER = 1.0
PROBE_TIMEOUT = 60  # seconds; a short REQUEST_TIMEOUT must not end the start on a busy machine
# With which a worker begins: Python specialises what has been run some eight times.
WARM_UP_REQUESTS = 20
_NO_LIMITS = ImageLimits(1, 1 << 30, 1 << 30, 1 << 30)


def create_app(
    settings: Settings | None = None, on_failure: Callable[[str], None] | None = None
) -> Flask:
    """Build the application and start to load its models beside it; it answers at once.

    Args:
        settings: read from the environment when None.
        on_failure: called with one line when a model cannot be loaded; by default the process ends
            with code 3, the one on which gunicorn stops for good instead of starting the worker
            again.

    Raises: SettingsError, BundleError.
    """
    settings = settings or configuration.load(os.environ)
    logs.configure(settings.log_format, settings.log_level, settings.api_keys)
    models: Models[Embedders] = Models(
        discover(pathlib.Path(settings.models_dir)),
        settings.embedding_model or None,
        settings.aliases,
        tasks.event,
    )
    batcher = Queue(
        max_batch_size=settings.max_batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_queue_tokens=settings.max_queue_tokens,
        threads=settings.inference_threads,
        max_queue_seconds=settings.max_queue_seconds,
        event=tasks.event,
    )
    counted = metrics.Metrics(models, batcher)
    cache = VectorCache(settings.cache_size, counted.cached) if settings.cache_size else None
    batcher.start()
    atexit.register(batcher.close)  # called when the threads that are no daemons have ended
    leaving = threading.Event()

    def load_model(bundle: Bundle) -> Embedders:
        pictures = "image" in bundle.manifest.modalities
        images = load_image_embedder(bundle, settings, batcher) if pictures else None
        return Embedders(load_embedder(bundle, settings, batcher, cache), images)

    def load() -> None:
        try:
            models.load(load_model)
            log.info("serving %s", _describe(settings, models))
        except Exception as error:
            if not isinstance(error, EmbedderError):
                log.error("unexpected error while loading", exc_info=error)
            (on_failure or _stop_service)(str(error))
            return
        gc.freeze()  # what stays for good need not be looked through again and again
        if leaving.wait(WIDEN_AFTER):
            return
        try:
            for name in models.bundles:
                models.get(name, math.inf).texts.widen()
        except Exception as error:  # the service is slower without, and as right
            log.warning("a text that is alone will be computed on one core: %s", error)

    # Not a daemon: OpenVINO aborts a process that exits while it compiles.
    threading.Thread(target=load, name="load-models").start()
    app = Application(__name__, static_folder=None)
    # Else `/v1//models` would be redirected, and to an address without a host.
    app.url_map.merge_slashes = False
    app.config["MAX_BODY_SIZE"] = settings.max_body_size
    errors.register(app)
    auth.register(app, settings.api_keys, OPEN_PATHS)
    app.register_blueprint(health.blueprint(models))
    service = Service(models, settings.request_timeout)
    app.register_blueprint(native.blueprint(service))
    app.register_blueprint(images.blueprint(service))
    app.register_blueprint(openai.blueprint(service))
    limits = {
        "max_concurrent_requests": settings.request_threads,
        "max_batch_tokens": settings.max_batch_tokens,
        "max_batch_requests": settings.max_batch_size,
        "max_client_batch_size": settings.max_texts_per_batch,
        "tokenization_workers": settings.request_threads,
    }
    app.register_blueprint(tei.blueprint(service, limits))
    app.register_blueprint(docs.blueprint(OPEN_PATHS))
    app.register_blueprint(metrics.blueprint(counted))
    counted.add_routes(app.url_map)
    requests = logs.RequestLog(settings.log_format, settings.log_level, settings.api_keys)
    app.extensions["watch"] = watch = Watch(app.wsgi_app, counted, requests)
    app.wsgi_app = watch  # type: ignore[method-assign]  # as Flask's documentation has it

    def stop() -> None:
        batcher.stop()
        models.stop()

    def warm_up() -> Generator[bytes]:
        """Requests of our own, which nobody counts or logs: a first one takes three times as long
        as later ones. Half of them have a head and a word that are new, as a client's first request
        may have; the longest come first, since memory is taken once for all that are no longer.
        """
        models.warming = True
        try:
            for number in range(WARM_UP_REQUESTS):
                word, path = (f"word{number}", f"?{number}") if number % 2 else ("text", "")
                texts = "a first text and " * ((WARM_UP_REQUESTS - number) // 2)
                body = f'{{"text": "{texts}its last {word}"}}'
                yield (
                    f"POST /embeddings{path} HTTP/1.1\r\nHost: localhost\r\n"
                    f"X-API-Key: {settings.api_keys[0]}\r\n"
                    f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
                ).encode()
        finally:
            models.warming = False

    # For api/worker.py, which begins with the requests of `warm_up`, brackets each turn of its loop
    # with `batcher`'s hold and release, calls `stop` when time is short, and sets `leaving` when
    # all is answered.
    app.extensions |= {"batcher": batcher, "warm_up": warm_up, "stop": stop, "leaving": leaving}
    return app


def _describe(settings: Settings, models: Models[Embedders]) -> str:
    """The models and the limits, in one line, for the log."""
    served = ", ".join(
        f"{name} ({models.get(name, 0).texts.precision}, {bundle.manifest.dimensions} dimensions, "
        f"{' and '.join(bundle.manifest.modalities)})"
        for name, bundle in models.bundles.items()
    )
    return (
        f"{served}; default {models.default}; {settings.web_concurrency} workers, in each "
        f"{settings.inference_threads} inference threads and {settings.request_threads} requests "
        f"at a time; engine calls of up to {settings.max_batch_size} chunks and "
        f"{settings.max_batch_tokens} tokens; requests of up to {settings.max_texts_per_batch} "
        f"texts, {settings.max_images_per_batch} pictures, {settings.max_request_tokens} tokens "
        f"and {settings.max_body_size} bytes; a queue of {settings.max_queue_tokens} tokens; "
        f"{settings.request_timeout:g} s a request"
    )


def load_embedder(
    bundle: Bundle, settings: Settings, batcher: Queue, cache: VectorCache | None = None
) -> TextEmbedder:
    """Load one model and see that it still gives its probe's vector.

    Raises: BundleError, PrecisionUnavailable.
    """
    started = time.perf_counter()
    tokenizer, pad_id, pad_left = load_tokenizer(bundle)
    engine = text_engine(
        bundle,
        settings.precision,
        pad_id=pad_id,
        pad_left=pad_left,
        streams=settings.inference_threads,
    )
    limits = TextLimits(
        settings.max_texts_per_batch, settings.max_text_size, settings.max_request_tokens
    )
    embedder = TextEmbedder(bundle, tokenizer, engine, batcher, limits, cache)
    probe = bundle.manifest.probe
    (embedding,) = embedder.embed([probe.text], deadline=time.monotonic() + PROBE_TIMEOUT)
    cosine = _check_probe(bundle, engine.precision, "probe text", probe.vector, embedding.vector)
    log.info(
        "model %s ready in %.2f s: %s by %s, %d dimensions, window %d tokens, %d inference "
        "threads, probe cosine %.5f",
        bundle.manifest.name,
        time.perf_counter() - started,
        engine.precision,
        engine.backend,
        bundle.manifest.dimensions,
        bundle.manifest.max_tokens,
        settings.inference_threads,
        cosine,
    )
    return embedder


def load_image_embedder(bundle: Bundle, settings: Settings, batcher: Queue) -> ImageEmbedder:
    """Load a model's image tower and see that it still gives its probe's vector.

    Raises: BundleError, PrecisionUnavailable.
    """
    from engine.openvino_backend import OpenVINOImageEngine, choose_precision  # see text_engine

    precision = choose_precision(settings.precision, bundle)
    engine = OpenVINOImageEngine(bundle, precision, streams=settings.inference_threads)
    limits = ImageLimits(
        settings.max_images_per_batch,
        settings.max_image_size,
        settings.max_image_pixels,
        settings.max_request_tokens,
    )
    # The probe passes whatever limits were set.
    probe = ImageEmbedder(bundle, engine.preprocessing, engine, batcher, _NO_LIMITS)
    (embedding,) = probe.embed([probe_picture()], deadline=time.monotonic() + PROBE_TIMEOUT)
    expected = bundle.manifest.image_probe or []
    _check_probe(bundle, precision, "probe picture", expected, embedding.vector)
    return ImageEmbedder(bundle, engine.preprocessing, engine, batcher, limits)


def _check_probe(
    bundle: Bundle, precision: Precision, what: str, expected: list[float], actual: Float32
) -> float:
    """Returns: the cosine. Raises: BundleError when it is below the precision's floor."""
    lengths = float(np.linalg.norm(expected) * np.linalg.norm(actual))
    cosine = float(np.array(expected, np.float32) @ actual) / lengths if lengths else 0.0
    if not cosine >= PARITY_FLOOR[precision]:
        raise BundleError(
            f"bundle {bundle.path}: at {precision} its {what} is off (cosine {cosine:.5f}, "
            f"at least {PARITY_FLOOR[precision]} expected); bake it again on this kind of machine"
        )
    return cosine


def _stop_service(line: str) -> None:
    log.critical("cannot serve: %s", line)
    logging.shutdown()
    os._exit(3)


def __getattr__(name: str) -> Any:
    # Made when gunicorn asks for it, not when a test or a tool imports this file.
    if name == "app":
        return create_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
