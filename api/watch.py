"""Around the application: every request gets an id, and is counted and logged once its answer has
been sent.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication

from api.application import current
from api.logs import RequestLog, request_id
from api.metrics import PROBES, Metrics

OWN = "warm-up"  # REMOTE_ADDR of the requests with which api/worker.py begins


class Watch:
    """WSGI middleware. Requests of the service's own pass it unseen."""

    def __init__(self, app: WSGIApplication, metrics: Metrics, log: RequestLog) -> None:
        self.metrics = metrics
        self._app, self._log = app, log

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        answer = self.begin(environ)
        known = request_id(environ)

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            answer.status = int(status[:3])
            for name, value in headers:
                if name == "Content-Length":
                    answer.size = int(value)
            headers.append(("X-Request-Id", known))
            return start_response(status, headers, *error)

        try:
            answer.body = self._app(environ, start)
        except BaseException:
            self.ended(answer)
            raise
        return answer

    def begin(self, environ: dict[str, Any]) -> "Answered":
        """The calling task or thread begins to work on a request. When its answer has been sent,
        what is returned is to be closed, with the answer's status and size.
        """
        current.set(environ)
        if environ.get("REMOTE_ADDR") != OWN:
            self.metrics.begin()
        return Answered(self, environ)

    def ended(self, answer: "Answered") -> None:
        """An answer has been sent, or given up."""
        current.set({})  # else a thread would keep the last body that it had
        environ = answer.environ
        if environ.get("REMOTE_ADDR") == OWN:
            return
        seconds = time.perf_counter() - answer.arrived
        path: str = environ["PATH_INFO"]
        self.metrics.end(path, answer.status, seconds)
        if path in PROBES:
            self._log.write(environ, answer.status, answer.size, seconds, level=logging.DEBUG)
        else:
            self._log.write(environ, answer.status, answer.size, seconds)

    def refused(
        self,
        environ: dict[str, Any],
        status: int,
        size: int,
        why: str,
        reason: str | None = None,
    ) -> None:
        """The server answered in place of the application.

        Args:
            environ: as much of WSGI's as there is.
            size: bytes of the answer's body.
            why: for the log, in a word.
            reason: one of `metrics.REASONS`, where the status does not tell.
        """
        if environ.get("REMOTE_ADDR") == OWN:
            return
        self.metrics.refused(environ.get("PATH_INFO", ""), status, reason)
        self._log.write(environ, status, size, None, why=why)


class Answered:
    """An answer's body, as WSGI has it: the server calls `close` when it has sent it."""

    __slots__ = ("_watch", "arrived", "body", "environ", "size", "status")

    def __init__(self, watch: Watch, environ: dict[str, Any]) -> None:
        self._watch, self.environ = watch, environ
        # Where api/worker.py has received it; it may have waited for a thread since.
        arrived: float = getattr(environ.get("gunicorn.socket"), "arrived", 0.0)
        self.arrived = arrived or time.perf_counter()
        self.body: Iterable[bytes] = ()
        self.status, self.size = 500, 0

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.body)

    def close(self) -> None:
        try:
            if hasattr(self.body, "close"):
                self.body.close()
        finally:
            self._watch.ended(self)
