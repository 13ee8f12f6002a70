"""gunicorn's threaded worker, with requests received and answers sent in its event loop: a slow
client never holds a request thread.

gunicorn hands a connection to a thread at its first byte, and the thread waits for the rest of the
request and until the client has taken the answer. So as many stalled clients as there are threads
silence the service, `/health` with it; and its event loop waits up to 2 s for each client to close
its side. Here a request gets a thread when all of it has arrived, head and decoded body in memory,
and a thread leaves behind what the client does not take at once.
"""

import io
import resource
import selectors
import socket
import time
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

from gunicorn import util
from gunicorn.http import errors, get_parser
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, ThreadWorker

from api.connection import Connection, Socket
from api.errors import RequestError, respond
from api.logs import request_id
from api.watch import Watch

RECEIVE_TIMEOUT = 3  # seconds without a byte after which a half-sent request is given up
SEND_TIMEOUT = 5  # seconds after which a client that takes no more of its answer is given up
CLOSE_TIMEOUT = 2  # seconds a client gets to close its side
# How many bodies of MAX_BODY_SIZE may be held at once, half-sent ones and those that wait for a
# thread. They are taken before any key is looked at, so something else must bound them.
HELD_BODIES = 4
LIMIT_REQUEST_FIELDS, LIMIT_REQUEST_FIELD_SIZE = 64, 8190
_PIECE = 65_536
# What gunicorn answers to what its parser refuses; all else is 500.
_FAULTS: dict[type, int] = {
    errors.ParseException: 400,
    errors.ForbiddenProxyRequest: 403,
    errors.LimitRequestLine: 414,
    errors.ExpectationFailed: 417,
    errors.LimitRequestHeaders: 431,
    errors.ConfigurationProblem: 500,
    errors.InvalidResponseHeader: 500,
    errors.InvalidResponseHeaderName: 500,
    errors.UnsupportedTransferCoding: 501,
}


class Worker(ThreadWorker):  # type: ignore[misc]
    """The worker class for gunicorn.conf.py. `max_body_size` is set there, in bytes.

    A connection is in one place at a time, and the event loop alone moves it: `_waiting` for its
    client to send or to take more, with a thread, in gunicorn's `keepalived_conns`, or `_closing`.
    """

    max_body_size = 33_554_432

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting: dict[Connection, float] = {}  # when to give up on each; oldest first
        self._closing: dict[Socket, float] = {}
        self._held = 0
        self._stopping_since: float | None = None

    def init_process(self) -> None:
        self.cfg.set("sendfile", False)  # it would overtake what is `unsent`
        # The usual soft limit of 1024 open files leaves too few beside worker_connections.
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        super().init_process()

    def accept(self, listener: socket.socket) -> None:
        try:
            accepted, client = listener.accept()
        except OSError:
            return  # another worker was faster, or the client has gone, or no file can be opened
        self.nr_conns += 1
        conn = Connection(
            self.cfg, Socket(accepted), client, listener.getsockname(), self.close_later
        )
        # Front ends open connections ahead of need: until its first byte a new one counts as kept
        # alive.
        self._waiting[conn] = time.monotonic() + self.cfg.keepalive
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._receive, conn))

    def on_client_socket_readable(self, conn: Connection, client: Socket) -> None:
        """A kept-alive connection has the beginning of its next request."""
        self._await_request(conn)
        self._receive(conn, client)

    def _await_request(self, conn: Connection) -> None:
        self.keepalived_conns.remove(conn)
        self._waiting[conn] = time.monotonic() + RECEIVE_TIMEOUT
        self.poller.modify(conn.sock, selectors.EVENT_READ, partial(self._receive, conn))

    def _receive(self, conn: Connection, sock: Socket) -> None:
        try:
            data = sock.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            self._drop(conn)
            return
        if data:
            self._received(conn, data)
        elif conn.held:
            message = "the request broke off: the client closed before all of it had arrived"
            self._refuse(conn, RequestError(400, "validation", message))
        else:
            self._drop(conn)

    def _received(self, conn: Connection, data: bytes) -> None:
        conn.received += data
        conn.held += len(data)
        self._held += len(data)
        self._waiting[conn] = time.monotonic() + RECEIVE_TIMEOUT
        try:
            complete = conn.complete(self.max_body_size)
        except RequestError as error:
            self._refuse(conn, error)
        except OSError:
            self._drop(conn)
        else:
            if complete:
                self._forget(conn)
                conn.sock.arrived = time.perf_counter()
                conn.initialized = True
                conn.parser = get_parser(self.cfg, [conn.head], conn.client)
                self.enqueue_req(conn)

    def handle_request(self, req: Any, conn: Connection) -> bool:
        """Runs in a thread, as `_keepalive_after` does."""
        req._expected_100_continue = False  # Connection has sent it
        req.body = io.BytesIO(conn.body)
        if conn.chunked:  # RFC 9112 section 7.1.3: decoded, it has a length and no transfer coding
            req.headers = [field for field in req.headers if field[0] != "TRANSFER-ENCODING"]
            req.headers.append(("CONTENT-LENGTH", str(conn.length)))
        if conn.length > self.max_body_size:
            req.force_close()  # the rest of the body is still to come, or never will
        return bool(super().handle_request(req, conn))

    def _keepalive_after(self, conn: Connection, keepalive: bool) -> bool:
        return keepalive  # no body is left on the socket

    def finish_request(self, conn: Connection, fs: Any) -> None:
        conn.begin()
        self._release(conn)
        if conn.sock.unsent:
            self._waiting[conn] = time.monotonic() + SEND_TIMEOUT
            self.poller.register(conn.sock, selectors.EVENT_WRITE, partial(self._send, conn, fs))
            return
        pipelined = bytes(conn.received)
        conn.received.clear()
        super().finish_request(conn, fs)
        if pipelined and self.keepalived_conns and self.keepalived_conns[-1] is conn:
            self._await_request(conn)
            self._received(conn, pipelined)

    def _send(self, conn: Connection, fs: Any, sock: Socket) -> None:
        try:
            if sock.send_more():
                self._waiting[conn] = time.monotonic() + SEND_TIMEOUT
        except OSError:
            self._drop(conn)
            return
        if not sock.unsent:
            self._forget(conn)
            self.finish_request(conn, fs)

    def _forget(self, conn: Connection) -> None:
        del self._waiting[conn]
        self.poller.unregister(conn.sock)

    def _release(self, conn: Connection) -> None:
        self._held -= conn.held
        conn.held = 0

    def _drop(self, conn: Connection) -> None:
        self._forget(conn)
        self._release(conn)
        self.nr_conns -= 1
        conn.close()

    def _refuse(
        self, conn: Connection, error: RequestError, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer in place of the application, which never sees the request."""
        environ = conn.environ()
        self._forget(conn)
        self._release(conn)
        path = environ.get("PATH_INFO", "")
        response = respond(error.status, error.error_type, str(error), headers, path)
        response.headers["X-Request-Id"] = request_id(environ)
        head = f"HTTP/1.1 {response.status}\r\nConnection: close\r\n{response.headers}"
        conn.sock.sendall(head.encode() + response.data)
        self.nr_conns -= 1
        conn.close(graceful=True)
        self._watch.refused(environ, error.status, len(response.data), error.error_type)

    def handle_error(self, req: Any, client: Socket, addr: Any, exc: Exception) -> None:
        """Answer what gunicorn's parser refuses, in gunicorn's form. The log gets the kind of fault
        and not, as gunicorn's would, what was sent: it may hold a key.
        """
        status = next((_FAULTS[kind] for kind in type(exc).__mro__ if kind in _FAULTS), 500)
        fault = "" if status == 500 else str(exc)
        util.write_error(client, status, HTTPStatus(status).phrase, fault)
        if status == 500:  # the application has been counted already
            self.log.error("error around the application", exc_info=exc)
        else:
            self._watch.refused({"REMOTE_ADDR": addr[0]}, status, len(fault), type(exc).__name__)

    @property
    def _watch(self) -> Watch:
        watch: Watch = self.wsgi.extensions["watch"]
        return watch

    def notify(self) -> None:
        """Called once a turn of the event loop, at least each second."""
        super().notify()
        self._watch.metrics.sample()

    def murder_pending(self) -> None:
        """Give up on clients that wait too long, or do not close, or are too many. Called once a
        turn of the event loop.
        """
        now = time.monotonic()
        if not self.alive and self._stopping_since is None:
            self._stopping_since = now
        for conn, until in list(self._waiting.items()):
            idle = not conn.held and not conn.sock.unsent
            if idle and self._stopping_since is not None:
                until = min(until, self._stopping_since + STOP_KEEPALIVE_LINGER)
            if until > now:
                continue
            if conn.held:
                message = f"nothing more of the request arrived for {RECEIVE_TIMEOUT} s"
                self._refuse(conn, RequestError(408, "timeout", message))
            else:
                self._drop(conn)
        for sock, until in list(self._closing.items()):
            if until <= now:
                self._close_now(sock)
        self._make_room()

    def _make_room(self) -> None:
        """Let go of the largest half-sent requests when memory is short, and of the oldest
        connections when there are too many to accept another.
        """
        limit = HELD_BODIES * self.max_body_size
        while self._held > limit and self._waiting:
            largest = max(self._waiting, key=lambda conn: conn.held)
            if largest.held <= _PIECE:
                break
            message = f"requests of {limit} bytes are in memory already; come back with this one"
            self._refuse(largest, RequestError(429, "overloaded", message), {"Retry-After": "1"})
        while self.nr_conns >= self.worker_connections:
            if self._closing:
                self._close_now(next(iter(self._closing)))
            elif self._waiting:
                self._drop(next(iter(self._waiting)))
            else:
                break

    def close_later(self, sock: Socket) -> None:
        """Half-close, then throw away what still comes until the client closes too (RFC 9112
        section 9.6).

        To close at once with bytes unread would reset the connection and could cost the client its
        answer.
        """
        try:
            sock.setblocking(False)
            sock.shutdown(socket.SHUT_WR)
            self.poller.register(sock, selectors.EVENT_READ, self._drain)
        except OSError:
            util.close(sock)
            return
        self._closing[sock] = time.monotonic() + CLOSE_TIMEOUT
        self.nr_conns += 1  # gunicorn has counted it out, but it is open

    def _drain(self, sock: Socket) -> None:
        try:
            if sock.recv(_PIECE):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._close_now(sock)

    def _close_now(self, sock: Socket) -> None:
        del self._closing[sock]
        self.poller.unregister(sock)
        util.close(sock)
        self.nr_conns -= 1
