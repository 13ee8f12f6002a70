"""gunicorn's threaded worker, with requests received in its event loop: a slow client never holds a
request thread.

gunicorn hands a connection to a thread at its first byte and reads the rest of the request in
there, so as many stalled clients as there are threads silence the service, `/health` with it; and
its event loop waits up to 2 s for each client to close its side. Here a request gets a thread when
all of it has arrived, and nobody waits for a client to close.
"""

import re
import selectors
import socket
import struct
import time
from functools import partial
from typing import Any

import orjson
from gunicorn import util
from gunicorn.http import get_parser
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, TConn, ThreadWorker

RECEIVE_TIMEOUT = 3  # seconds without a byte after which a half-sent request is given up
SEND_TIMEOUT = 15  # seconds after which a client that does not take its answer is given up
CLOSE_TIMEOUT = 2  # seconds a client gets to close its side
LIMIT_REQUEST_FIELDS, LIMIT_REQUEST_FIELD_SIZE = 64, 8190
_MAX_HEAD = (LIMIT_REQUEST_FIELDS + 1) * (
    LIMIT_REQUEST_FIELD_SIZE + 2
)  # gunicorn's parser refuses a longer one
_PIECE = 262_144
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,18})[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)
_EXPECT = re.compile(rb"\r\nexpect:[ \t]*100-continue", re.IGNORECASE)
_LAST_CHUNK = re.compile(rb"\r\n0+[ \t]*(?:;[^\r\n]*)?\r\n(?:[^\r\n]+\r\n)*\r\n\Z")
_MAX_TRAILER = 4096


class Connection(TConn):  # type: ignore[misc]  # gunicorn has no types
    """A client's connection and what has arrived of its next request."""

    def __init__(self, worker: "Worker", sock: socket.socket, client: Any, server: Any) -> None:
        super().__init__(worker.cfg, sock, client, server)
        self._worker = worker
        self.parser: Any = None
        self.received = bytearray()
        self.whole = False  # all of the request being handled had arrived
        self._head = 0  # length of the request's head, once it is known
        self._total: int | None = None  # bytes of head and body; None: chunked
        # Threads find whole requests in memory and should never block; these bound what remains.
        sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", RECEIVE_TIMEOUT, 0)
        )
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", SEND_TIMEOUT, 0))

    def deliverable(self, max_body: int) -> bool:
        """Whether a thread should take the request: it is whole, or so wrong or so large that more
        bytes change nothing.
        """
        received = self.received
        if not self._head:
            end = received.find(b"\r\n\r\n")
            if end < 0:
                return len(received) > _MAX_HEAD
            self._head = end + 4
            head = bytes(received[: self._head])
            length = _LENGTH.search(head)
            self._total = (
                None if _CHUNKED.search(head) else self._head + (int(length[1]) if length else 0)
            )
            if (
                _EXPECT.search(head)
                and len(received) == self._head
                and (self._total or 0) <= self._head + max_body
            ):
                self.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._total is not None:
            self.whole = len(received) >= self._total
            return self.whole or self._total > self._head + max_body
        tail = max(self._head - 2, len(received) - _MAX_TRAILER)
        self.whole = _LAST_CHUNK.search(received, tail) is not None
        return self.whole or len(received) > self._head + max_body + _PIECE

    def deliver(self) -> None:
        """Put what has arrived before gunicorn's parser, and make room for the next request."""
        self.sock.setblocking(True)
        self.initialized = True
        if self.parser is None:
            self.parser = get_parser(self.cfg, self.sock, self.client)
        self.parser.unreader.unread(bytes(self.received))
        self.received.clear()
        self._head, self._total = 0, None

    def close(self, graceful: bool = False) -> None:
        if graceful:
            self._worker.close_later(self.sock)
        else:
            util.close(self.sock)


class Worker(ThreadWorker):  # type: ignore[misc]
    """The worker class for gunicorn.conf.py. `max_body_size` is set there, in bytes."""

    max_body_size = 33_554_432

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receiving: dict[Connection, float] = {}  # when to give up on each
        self._closing: dict[socket.socket, float] = {}
        self._stopping_since: float | None = None

    def accept(self, listener: socket.socket) -> None:
        try:
            sock, client = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self.nr_conns += 1
        connection = Connection(self, sock, client, listener.getsockname())
        # Front ends open connections ahead of need: until its first byte a new one counts as kept
        # alive.
        self._receiving[connection] = time.monotonic() + self.cfg.keepalive
        self.poller.register(sock, selectors.EVENT_READ, partial(self._receive, connection))

    def on_client_socket_readable(self, conn: Connection, client: socket.socket) -> None:
        """A kept-alive connection has the beginning of its next request."""
        self.keepalived_conns.remove(conn)
        self.poller.modify(client, selectors.EVENT_READ, partial(self._receive, conn))
        self._receive(conn, client)

    def enqueue_req(self, conn: Connection) -> None:
        """gunicorn calls this for a connection that holds bytes of a further, pipelined request."""
        conn.sock.setblocking(False)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._receive, conn))
        self._received(conn, conn.parser.unreader.take_buffered())

    def _receive(self, conn: Connection, sock: socket.socket) -> None:
        try:
            data = sock.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            self._forget(conn)
            self._drop(conn)
            return
        if data:
            self._received(conn, data)
        elif (
            conn.received
        ):  # the client has shut its side down: the parser will say what is missing
            self._deliver(conn)
        else:
            self._forget(conn)
            self._drop(conn)

    def _received(self, conn: Connection, data: bytes) -> None:
        conn.received += data
        try:
            deliverable = conn.deliverable(self.max_body_size)
        except OSError:  # the 100 Continue could not be sent
            self._forget(conn)
            self._drop(conn)
            return
        if deliverable:
            self._deliver(conn)
        else:
            self._receiving[conn] = time.monotonic() + RECEIVE_TIMEOUT

    def _deliver(self, conn: Connection) -> None:
        self._forget(conn)
        conn.deliver()
        super().enqueue_req(conn)

    def _forget(self, conn: Connection) -> None:
        self._receiving.pop(conn, None)
        self.poller.unregister(conn.sock)

    def _drop(self, conn: Connection) -> None:
        self.nr_conns -= 1
        conn.close()

    def _keepalive_after(self, conn: Connection, keepalive: bool) -> bool:
        # Of a body refused for its size the rest may never come: no thread waits for it.
        return keepalive and conn.whole and bool(super()._keepalive_after(conn, keepalive))

    def murder_pending(self) -> None:
        """Give up on clients that stopped sending, or do not close. Called once a turn of the event
        loop.
        """
        now = time.monotonic()
        if not self.alive and self._stopping_since is None:
            self._stopping_since = now
        for conn, until in list(self._receiving.items()):
            if not conn.received and self._stopping_since is not None:
                until = min(until, self._stopping_since + STOP_KEEPALIVE_LINGER)
            if until > now:
                continue
            self._forget(conn)
            if conn.received:
                self._time_out(conn)
            else:
                self._drop(conn)
        for sock, until in list(self._closing.items()):
            if until <= now:
                self._close_now(sock)

    def _time_out(self, conn: Connection) -> None:
        message = f"nothing more of the request arrived for {RECEIVE_TIMEOUT} s"
        body = orjson.dumps({"error": message, "error_type": "timeout"})
        try:
            conn.sock.send(
                b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
        except OSError:
            pass
        self.nr_conns -= 1
        conn.close(graceful=True)

    def close_later(self, sock: socket.socket) -> None:
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

    def _drain(self, sock: socket.socket) -> None:
        try:
            if sock.recv(_PIECE):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._close_now(sock)

    def _close_now(self, sock: socket.socket) -> None:
        del self._closing[sock]
        self.poller.unregister(sock)
        util.close(sock)
