"""How gunicorn runs the service. Configuration and bundles are checked here, once, before any
worker is forked.
"""

import contextlib
import ctypes
import logging
import os
import pathlib
import sys

from gunicorn.arbiter import Arbiter

import settings as configuration
from api import logs, metrics
from api.connection import LIMIT_REQUEST_FIELD_SIZE, LIMIT_REQUEST_FIELDS, refuse_new
from api.spread import Spread
from api.worker import Worker
from engine.bundle import discover
from engine.errors import BundleError, ModelNotFound
from engine.models import Models
from settings import DEFAULT_API_KEY, SettingsError

try:
    settings = configuration.load(os.environ)
    bundles = discover(pathlib.Path(settings.models_dir))
    Models[object](bundles, settings.embedding_model or None, settings.aliases)
    for bundle in bundles:
        bundle.verify()
except (SettingsError, BundleError, ModelNotFound) as error:
    sys.exit(logs.last_line(configuration.log_format(os.environ), f"cannot start: {error}"))

logs.configure(settings.log_format, settings.log_level, settings.api_keys)
log = logging.getLogger("start")
if DEFAULT_API_KEY in settings.api_keys:
    log.warning("VECTOR_EMBEDDER_API_KEY is the default, which everybody knows. Set your own.")
if os.environ.get("TOKENIZER_MODEL"):
    log.warning("TOKENIZER_MODEL is ignored: the bundle holds the model's own tokenizer.")

# glibc raises the size from which freed memory goes back to the system up to 32 MB as it sees large
# blocks freed, and keeps pictures' leftovers: 170-183 MB after 200 to 4 000 pictures, with the size
# fixed 148-150 MB. Other C libraries have no mallopt and no need of it.
with contextlib.suppress(AttributeError, OSError):
    M_MMAP_THRESHOLD = -3  # malloc.h
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 262_144)

bind = f"0.0.0.0:{settings.port}"
Worker.max_body_size = settings.max_body_size
Worker.max_wait = settings.max_queue_seconds / 4  # for a thread; the rest is for the engine
Worker.spread = Spread(settings.web_concurrency)
worker_class = Worker
workers = settings.web_concurrency
threads = settings.request_threads
worker_connections = max(2000, 2 * threads)  # a thousand at once, and the probes
loglevel = settings.log_level
logger_class = logs.GunicornLogger
keepalive = 75  # seconds; longer than the 60 s after which load balancers let go of idle ones
graceful_timeout = 9  # Cloud Run kills 10 s after SIGTERM
timeout = 60  # for a worker whose main loop hangs; requests run beside it and have REQUEST_TIMEOUT
worker_tmp_dir = (
    "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
)  # the heartbeat must not wait for a disk
control_socket_disable = True  # gunicorn 27 would open it under $HOME
limit_request_fields = LIMIT_REQUEST_FIELDS
limit_request_field_size = LIMIT_REQUEST_FIELD_SIZE
metrics.share(workers)


def pre_fork(server: Arbiter, worker: Worker) -> None:
    # A reload makes another table; a worker keeps its own.
    worker.table, worker.row = metrics.table, metrics.table.claim()


def when_ready(server: Arbiter) -> None:
    """Called by gunicorn before it starts workers. At SIGTERM, and not at a reload, where other
    workers go on, new connections end before any worker stops to accept.
    """
    halt = server.handle_term

    def handle_term() -> None:
        for listener in server.LISTENERS:
            refuse_new(listener)
        halt()

    server.handle_term = handle_term


def child_exit(server: Arbiter, worker: Worker) -> None:
    """Called by gunicorn when a worker has ended, however it did."""
    Worker.spread.leave(worker.age)
    worker.table.release(worker.row)
