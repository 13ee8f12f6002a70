"""How gunicorn runs the service. Configuration and bundles are checked here, once, before any
worker is forked.
"""

import gc

gc.disable()  # while this imports: all of it stays, and collections cost 30 ms of a start

import contextlib
import ctypes
import logging
import os
import pathlib
import sys

from gunicorn.arbiter import Arbiter

import settings as configuration
from api import logs, metrics, traces
from engine.bundle import discover
from engine.errors import BundleError, ModelNotFound, WrongAlias
from engine.models import Models
from server.limits import Limits
from server.spread import Spread
from server.worker import Worker, drain_gently
from keys import DEFAULT_KEY
from settings import Settings, SettingsError

gc.freeze()  # collections in workers need not look through what they share with the master
gc.enable()

WRONG = (SettingsError, BundleError, ModelNotFound, WrongAlias)


def read() -> tuple[Settings, str]:
    """The settings and the address to listen on; all that they name is there.

    Raises: one of WRONG.
    """
    loaded = configuration.load(os.environ)
    bundles = discover(pathlib.Path(loaded.models_dir))
    Models[object](bundles, loaded.embedding_model or None, loaded.aliases)
    for bundle in bundles:
        bundle.verify()
    return loaded, configuration.listen_address(loaded)


try:
    settings, address = read()
except WRONG as error:
    sys.exit(logs.last_line(configuration.log_format(os.environ), f"cannot start: {error}"))

logs.configure(settings.log_format, settings.log_level, settings.secrets)
metrics.name_keys(name for name, _ in settings.keys)
log = logging.getLogger("start")
if DEFAULT_KEY in settings.api_keys:
    log.warning("VECTOR_EMBEDDER_API_KEY is the default, which everybody knows. Set your own.")
for name, meant in configuration.near_misses(os.environ).items():
    log.warning("%s is not a setting; did you mean %s?", name, meant)
if without := traces.missing(os.environ):
    log.warning("%s", without)
if os.environ.get("TOKENIZER_MODEL"):
    log.warning("TOKENIZER_MODEL is ignored: the bundle holds the model's own tokenizer.")

# glibc raises the size from which freed memory goes back to the system up to 32 MB as it sees large
# blocks freed, and keeps pictures' leftovers: 170-183 MB after 200 to 4 000 pictures, with the size
# fixed 148-150 MB. Other C libraries have no mallopt and no need of it.
with contextlib.suppress(AttributeError, OSError):
    M_MMAP_THRESHOLD = -3  # malloc.h
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 262_144)

usual = Limits()
bind = address
Worker.max_wait = settings.max_queue_seconds / 4  # for a thread; the rest is for the engine
worker_class = Worker
workers = settings.web_concurrency
threads = settings.request_threads
worker_connections = max(2000, 2 * threads)  # a thousand at once, and the probes
loglevel = settings.log_level
logger_class = logs.GunicornLogger
keepalive = int(usual.keepalive)
graceful_timeout = 9  # Cloud Run kills 10 s after SIGTERM
timeout = 60  # for a worker whose event loop hangs; requests have REQUEST_TIMEOUT
worker_tmp_dir = (
    "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
)  # the heartbeat must not wait for a disk
control_socket_disable = True  # gunicorn 27 would open it under $HOME
limit_request_fields = usual.max_fields
limit_request_field_size = usual.max_field


def on_starting(server: Arbiter) -> None:
    """Called by gunicorn when all options are known, of its command line too."""
    cfg = server.cfg
    # Whether the sockets are there already: from the master before a SIGUSR2, or from systemd.
    inherited = {"GUNICORN_FD", "LISTEN_FDS"} & {*os.environ}
    try:
        configuration.load({**os.environ, "WEB_CONCURRENCY": str(cfg.workers)})
        if not inherited:  # else `when_ready` judges them: cfg.address has no part in it
            configuration.refuse_open_door(settings, hosts(server))
    except SettingsError as error:
        log.critical("cannot start: %s", error)
        sys.exit(1)
    if not inherited and not cfg.reuse_port:
        for each in cfg.address:
            if isinstance(each, tuple) and (why := configuration.taken(each)):
                log.critical("cannot start: %s", why)
                sys.exit(1)
    metrics.share(cfg.workers)
    Worker.spread = Spread(cfg.workers)
    Worker.limits = Limits(
        max_body=settings.max_body_size,
        max_fields=cfg.limit_request_fields,
        max_field=cfg.limit_request_field_size,
        keepalive=cfg.keepalive,
    )


def hosts(server: Arbiter) -> list[str]:
    """The addresses that are listened on, those of gunicorn's own options too; once there are
    sockets, theirs, which may have come from systemd or as `fd://`.
    """
    addresses = [listener.getsockname() for listener in server.LISTENERS] or server.cfg.address
    return [address[0] for address in addresses if isinstance(address, tuple)]


def pre_fork(server: Arbiter, worker: Worker) -> None:
    worker.table, worker.row = metrics.table, metrics.table.claim()


def when_ready(server: Arbiter) -> None:
    """Called by gunicorn before it starts workers."""
    try:
        configuration.refuse_open_door(settings, hosts(server))
    except SettingsError as error:
        log.critical("cannot start: %s", error)
        server.halt(exit_status=1)
    drain_gently(server)
    reload = server.handle_hup

    def handle_hup() -> None:
        """gunicorn would end with settings that are wrong."""
        try:
            configuration.refuse_open_door(read()[0], hosts(server))
        except WRONG as error:
            log.error("not reloaded, so the settings are those from before: %s", error)
        else:
            reload()

    server.handle_hup = handle_hup


def child_exit(server: Arbiter, worker: Worker) -> None:
    """Called by gunicorn when a worker has ended, however it did."""
    Worker.spread.leave(worker.age)
    worker.table.release(worker.row)
