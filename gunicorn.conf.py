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
from api.worker import LIMIT_REQUEST_FIELD_SIZE, LIMIT_REQUEST_FIELDS, Worker
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
worker_class = Worker
workers = settings.web_concurrency
threads = settings.request_threads
worker_connections = max(1000, 2 * threads)
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


def child_exit(server: Arbiter, worker: Worker) -> None:
    worker.table.release(worker.row)
