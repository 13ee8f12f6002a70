"""gunicorn's threaded worker, with requests received and answers sent in its event loop: a slow
client never holds a request thread.

gunicorn hands a connection to a thread at its first byte, and the thread waits for the rest of the
request and until the client has taken the answer. So as many stalled clients as there are threads
silence the service, `/health` with it; and its event loop waits up to 2 s for each client to close
its side. Here a request is worked on when all of it has arrived, head and decoded body in memory,
and what the client does not take of the answer at once is left to the event loop.

Short requests need no thread: they are tasks in the event loop (api/tasks.py). Others get a thread
of gunicorn's pool. That has a queue without end, in which a request waits unseen; here it is
bounded in length and time, and beyond that a request is answered 429 without a thread.
"""

import contextlib
import itertools
import resource
import selectors
import socket
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

from gunicorn import util
from gunicorn.http import errors
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, ThreadWorker

from api.application import DIRECT, Direct
from api.codec import JSON
from api.connection import GONE_AFTER, Answer, Connection, Heads, Socket, server_fields
from api.errors import RequestError, respond
from api.logs import request_id
from api.spread import Spread
from api.tasks import Loop
from api.watch import OWN, Watch
from engine.queue import Queue

RECEIVE_TIMEOUT = 3  # seconds without a byte after which a half-sent request is given up
SEND_TIMEOUT = 5  # seconds after which a client that takes no more of its answer is given up
CLOSE_TIMEOUT = 2  # seconds a client gets to close its side
# How many bodies of MAX_BODY_SIZE may be held at once, half-sent ones and those that wait for a
# thread. They are taken before any key is looked at, so something else must bound them.
HELD_BODIES = 4
QUEUED_PER_THREAD = 3  # requests that wait for a thread, for each thread there is
_PICTURES = b"POST /embeddings/image"  # how requests begin that hold some
# Seconds after SIGTERM when what still waits is answered 503. Kept connections are open for 2 s
# (STOP_KEEPALIVE_LINGER), and what arrives on them has some seconds then; the rest of
# graceful_timeout is for engine calls that run, and for clients to take their answers.
STOP_COMPUTING = 6.5
STOP_WAITING = 8.0  # seconds after SIGTERM when 503 answers even what a thread still works on
YIELD, YIELD_MEMORY = 0.002, 0.010  # seconds a connection is left for a worker that holds fewer
LOOK_AROUND = 0.1  # seconds between two looks for what is due, in a busy event loop
LET_GO = 0.1  # seconds between two kept connections that are sent to another worker
_PIECE = 65_536
# Requests with bodies up to this size are handled in the event loop's own thread, which a full one
# takes some 3 ms. Larger ones and pictures get a thread of the pool.
MAX_TASK_BODY = 16_384
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
    """The worker class for gunicorn.conf.py. `max_body_size` (bytes), `max_wait` (seconds) and
    `spread` are set there.

    A connection is in one place at a time, and the event loop alone moves it: `_waiting` for its
    client to send or to take more, `_queued` for a thread, `_started` with a thread or as a task,
    `_kept` alive for its next request, or `_closing`.
    """

    max_body_size = 33_554_432
    max_wait = 5.0  # for a thread
    spread = Spread(1)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting: dict[Connection, float] = {}  # when to give up on each; oldest first
        self._kept: dict[Connection, float] = {}  # until when; the first ends first
        self._keepalive: float = self.cfg.keepalive  # seconds
        self._closing: dict[Socket, float] = {}
        self._queued: dict[Connection, float] = {}  # since when; oldest first
        self._started: set[Connection] = set()  # those with a thread
        self._threads = self._free_threads = self.cfg.threads
        self._held = 0
        self._heads = Heads()
        self._soon: list[Callable[[], None]] = []  # what this turn of the loop ends with
        self._stopping_since: float | None = None
        self._stopped = False
        # Until when listeners are left to others, and until when they have been for long enough.
        self._yield_until = self._yielded_until = 0.0
        self._let_go_at = self._looked_around = 0.0
        self._looks = True  # whether this turn of the event loop looks for what is due

    def init_process(self) -> None:
        self.cfg.set("sendfile", False)  # it would overtake what is `unsent`
        # The usual soft limit of 1024 open files leaves too few beside worker_connections.
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        super().init_process()

    def run(self) -> None:
        self._batcher: Queue = self.wsgi.extensions["batcher"]
        self._loop = Loop(self.tpool)
        self.poller.register(self._loop, selectors.EVENT_READ, Loop.heard)
        self._batcher.others = lambda: self._threads - self._free_threads
        self._batcher.attach(self._soon.append)
        self.poller.register(self._batcher, selectors.EVENT_READ, Queue.collect)
        self._warm_up(self.wsgi.extensions["warm_up"]())
        super().run()
        self.wsgi.extensions["leaving"].set()

    def _warm_up(self, requests: Generator[bytes]) -> None:
        """Have requests of our own answered, one after the other, on a connection of our own: all
        of the way that a client's take.
        """
        ours, own = socket.socketpair()
        own.setblocking(False)
        conn = self._take(ours, (OWN, 0), self.sockets[0].getsockname())

        def go_on(own: socket.socket) -> None:
            answer = b""
            with contextlib.suppress(OSError):
                answer = own.recv(_PIECE)
            well = answer.startswith(b"HTTP/1.1 200 ") and conn in self._kept
            request = next(requests, None) if well else None
            if request:
                self.nr -= 1  # gunicorn's max_requests counts those of clients
                own.send(request)
                return
            requests.close()
            self.poller.unregister(own)
            own.close()

        self.poller.register(own, selectors.EVENT_READ, go_on)
        self.nr -= 1
        own.send(next(requests))

    def set_accept_enabled(self, enabled: bool) -> None:
        if enabled and (not self.alive or time.monotonic() < self._yield_until):
            return
        self.spread.hold(self.age, self.nr_conns)
        super().set_accept_enabled(enabled)
        if not enabled and not self.alive and self._stopping_since is None:
            self._stop_listening()

    def _stop_listening(self) -> None:
        """Take the connections that the kernel has made already, and let it refuse the next."""
        self._stopping_since = time.monotonic()
        self.spread.leave(self.age)
        for listener in self.sockets:
            while self._accept(listener):
                pass
            listener.close()

    def is_parent_alive(self) -> bool:
        if self._looks and not super().is_parent_alive():
            self.alive = False
        return bool(self.alive)

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        self._go_on()  # with what the last turn has computed
        now = time.monotonic()
        if now < self._yield_until:
            timeout = self._yield_until - now
        elif self._stopping_since is not None or self._loop.waiting:
            timeout = min(timeout, LOOK_AROUND)
        events = self.poller.select(timeout)
        for key, _ in events:
            key.data(key.fileobj)
        now = time.monotonic()
        self._looks = now > self._looked_around + LOOK_AROUND
        if self._looks:
            self._looked_around = now
            self._loop.give_up()
        self._go_on()

    def _go_on(self) -> None:
        self._loop.go_on()
        while self._soon:
            self._soon.pop()()

    def accept(self, listener: socket.socket) -> None:
        """Take a connection, or leave it to a worker that holds fewer. What nobody has taken after
        YIELD seconds is taken anyway: the other may be busy, or dead.
        """
        now = time.monotonic()
        if self.spread.excess(self.age) > 0 and now > self._yielded_until:
            self._yield_until, self._yielded_until = now + YIELD, now + YIELD_MEMORY
            self.set_accept_enabled(False)
            return
        self._yielded_until = 0.0
        self._accept(listener)
        self.spread.hold(self.age, self.nr_conns)

    def _accept(self, listener: socket.socket) -> bool:
        try:
            accepted, client = listener.accept()
        except OSError:
            return False  # another was faster, or the client has gone, or no file can be opened
        self._take(accepted, client, listener.getsockname())
        return True

    def _take(self, accepted: socket.socket, client: Any, server: Any) -> Connection:
        """Look after a connection from now on."""
        self.nr_conns += 1
        conn = Connection(self.cfg, Socket(accepted), client, server, self.close_later)
        # Front ends open connections ahead of need: until its first byte a new one counts as kept
        # alive.
        self._waiting[conn] = time.monotonic() + self._keepalive
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._receive, conn))
        return conn

    def _receive(self, conn: Connection, sock: Socket) -> None:
        if conn not in self._waiting and conn not in self._kept:
            # The client closes, or sends its next request, while this one is worked on.
            self._ignore(conn)
            return
        try:
            data = sock.recv(_PIECE, socket.MSG_DONTWAIT)
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
        self._kept.pop(conn, None)
        self._waiting[conn] = time.monotonic() + RECEIVE_TIMEOUT
        try:
            complete = conn.complete(self.max_body_size)
        except RequestError as error:
            self._refuse(conn, error)
        except OSError:
            self._drop(conn)
        else:
            if complete:
                del self._waiting[conn]
                conn.sock.arrived = time.perf_counter()
                conn.initialized = True
                conn.parser = self._heads.parser(self.cfg, conn)
                self.enqueue_req(conn)

    def enqueue_req(self, conn: Connection) -> None:
        """Work on a whole request: here, or in a thread, now or when its turn comes; or refuse
        it. One with a body will want the engine: when that is full, it is not even read.
        """
        if conn.length and (full := self._batcher.full()):
            self._turn_away(conn, str(full), full.retry_after)
        elif conn.length <= MAX_TASK_BODY and not conn.head.startswith(_PICTURES):
            self._started.add(conn)
            self._loop.run(partial(self.handle, conn), partial(self._ended, conn))
        elif self._free_threads:
            self._free_threads -= 1
            self._start(conn)
        elif len(self._queued) < QUEUED_PER_THREAD * self._threads:
            self._queued[conn] = time.monotonic()
        else:
            self._turn_away(
                conn, f"all {self._threads} threads are busy, and {len(self._queued)} wait"
            )

    def _ended(self, conn: Connection, keep: bool) -> None:
        self._started.remove(conn)
        self._finish(conn, keep)

    def _start(self, conn: Connection) -> None:
        self._started.add(conn)
        future = self.tpool.submit(self.handle, conn)
        future.add_done_callback(
            lambda future: self.method_queue.defer(self._done, conn, future.result())
        )

    def _done(self, conn: Connection, keep: bool) -> None:
        self._free_threads += 1
        self._ended(conn, keep)
        while self._queued and self._free_threads:
            first = next(iter(self._queued))
            since = self._queued.pop(first)
            if time.monotonic() - since > GONE_AFTER and first.sock.gone():
                self.log.debug("a client has gone before its request had a thread")
                self._drop(first)
                continue
            self._free_threads -= 1
            self._start(first)

    def _turn_away(self, conn: Connection, reason: str, retry_after: int = 1) -> None:
        """Refuse a whole request for want of time; `retry_after` is in seconds. The connection is
        kept where it can be: to open another would cost more than the refusal.
        """
        keep = (
            self.alive
            and conn.persistent
            and conn.length <= self.max_body_size  # else the rest of the body is still to come
            and not conn.received  # pipelined ones would be refused one within the other
            and len(self._kept) < self.max_keepalived
        )
        error = RequestError(429, "overloaded", f"{reason}; come back with this request")
        if not self.alive:
            error = RequestError(503, "shutting_down", f"{reason}; the service is shutting down")
        kept = "keep-alive" if keep else "close"
        self._answer(conn, error, {"Retry-After": str(retry_after)}, kept)
        self._finish(conn, keep)

    def handle(self, conn: Connection) -> bool:
        """Answer a request, in a thread or as a task. Returns: whether to keep the connection."""
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("starting anew after this request")
            self.alive = False
        known = conn.known
        if not known or not known.direct or conn.length > self.max_body_size:
            return bool(super().handle(conn))
        try:
            return self._answer_directly(conn, known.environ(conn), known.direct)
        except Exception as error:
            self.handle_error(None, conn.sock, conn.client, error)
            return False

    def _answer_directly(self, conn: Connection, environ: dict[str, Any], direct: Direct) -> bool:
        """Answer a request whose head has been through gunicorn's parser and Flask's routing, with
        the API key and all else that is to be asked of a head, and was well then.
        """
        answer = self._watch.begin(environ)
        try:
            try:
                body, fields = direct(), f"Content-Type: {JSON}\r\n"
                status, answer.status = "200 OK", 200
            except Exception as error:
                response = self.wsgi.answer_error(environ, error)
                body, status, answer.status = response.data, response.status, response.status_code
                del response.headers["Content-Length"]
                fields = str(response.headers).removesuffix("\r\n")
            answer.size = len(body)
            keep = not self._lets_go()
            head = (
                f"HTTP/1.1 {status}\r\n{server_fields('keep-alive' if keep else 'close')}{fields}"
                f"Content-Length: {len(body)}\r\nX-Request-Id: {request_id(environ)}\r\n\r\n"
            )
            conn.sock.sendall(head.encode() + body)  # `_finish` sends it
        finally:
            answer.close()
        return keep

    def handle_request(self, req: Any, conn: Connection) -> bool:
        """gunicorn's own, but for its hooks and its access log."""
        answer = Answer(req, conn.sock, self.cfg, self._lets_go)
        if conn.length > self.max_body_size:
            answer.force_close()  # the rest of the body is still to come, or never will
        environ = self._heads.environ(self.cfg, conn, req)
        try:
            body = self.wsgi(environ, answer.start_response)
            try:
                for part in body:
                    answer.write(part)
                answer.close()
            finally:
                body.close()
        except Exception:
            if not answer.headers_sent:
                raise
            self.log.exception("error behind an answer")
            answer.force_close()
        conn.sock.flush()
        if conn.known and answer.status_code == 200 and conn.persistent:
            conn.known.direct = environ.get(DIRECT)
        return not answer.should_close()

    def _lets_go(self) -> bool:
        """Whether to close a kept connection: at the end, when too many are kept, and so that it
        comes back to a worker that holds fewer.
        """
        full = len(self._kept) >= self.max_keepalived
        if full or not self.alive or not self._keepalive:
            return True
        now = time.monotonic()
        if now < self._let_go_at:
            return False
        self._let_go_at = now + LET_GO
        return self.spread.excess(self.age) >= 2

    def _keepalive_after(self, conn: Connection, keepalive: bool) -> bool:
        return keepalive  # no body is left on the socket

    def _finish(self, conn: Connection, keep: bool) -> None:
        """Send what is left of an answer, then keep the connection for the next request or close
        it.
        """
        conn.begin()
        self._release(conn)
        conn.sock.flush()
        if conn.sock.unsent:
            self._ignore(conn)
            self._waiting[conn] = time.monotonic() + SEND_TIMEOUT
            self._look_for(conn, selectors.EVENT_WRITE, partial(self._send, conn, keep))
        elif not keep:
            self._ignore(conn)
            self.nr_conns -= 1
            conn.close(graceful=True)
        else:
            if not conn.registered:
                self._look_for(conn, selectors.EVENT_READ, partial(self._receive, conn))
            self._kept[conn] = time.monotonic() + self._keepalive
            if conn.received:
                pipelined = bytes(conn.received)
                conn.received.clear()
                self._received(conn, pipelined)

    def _look_for(self, conn: Connection, event: int, call: Callable[[Socket], None]) -> None:
        self.poller.register(conn.sock, event, call)
        conn.registered = True

    def _ignore(self, conn: Connection) -> None:
        """Look no more for what a connection's client does."""
        if conn.registered:
            self.poller.unregister(conn.sock)
            conn.registered = False

    def _send(self, conn: Connection, keep: bool, sock: Socket) -> None:
        try:
            if sock.send_more():
                self._waiting[conn] = time.monotonic() + SEND_TIMEOUT
        except OSError:
            self._drop(conn)
            return
        if not sock.unsent:
            self._forget(conn)
            self._finish(conn, keep)

    def _forget(self, conn: Connection) -> None:
        """The connection is nowhere from now on."""
        self._waiting.pop(conn, None)
        self._kept.pop(conn, None)
        self._ignore(conn)

    def _release(self, conn: Connection) -> None:
        self._held -= conn.held
        conn.held = 0

    def _drop(self, conn: Connection) -> None:
        self._forget(conn)
        self._release(conn)
        self.nr_conns -= 1
        conn.close()

    def _refuse(
        self,
        conn: Connection,
        error: RequestError,
        headers: Mapping[str, str] | None = None,
        reason: str | None = None,
    ) -> None:
        """Answer in place of the application, which never sees the request."""
        self._forget(conn)
        self._release(conn)
        self._answer(conn, error, headers, "close", reason)
        self.nr_conns -= 1
        conn.close(graceful=True)

    def _answer(
        self,
        conn: Connection,
        error: RequestError,
        headers: Mapping[str, str] | None,
        connection: str,
        reason: str | None = None,
    ) -> None:
        environ = conn.environ()
        body, head = _response(environ, error, headers, connection)
        conn.sock.sendall(head + body)
        conn.sock.flush()
        self._watch.refused(environ, error.status, len(body), error.error_type, reason)

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
        """Tell the master that the worker is alive. Called once a turn of the event loop."""
        if self._looks:
            super().notify()
            self._watch.metrics.sample()

    def murder_keepalived(self, force: bool = False) -> None:
        """Close kept connections whose time is over; not one whose next request has come while the
        event loop was busy.
        """
        if not self._looks and not force:
            return
        now = time.monotonic()
        lingered = (
            self._stopping_since is not None and now >= self._stopping_since + STOP_KEEPALIVE_LINGER
        )
        for conn, until in [*self._kept.items()] if force or lingered else self._expired(now):
            if force or not conn.sock.peek():
                self._drop(conn)

    def _expired(self, now: float) -> list[tuple[Connection, float]]:
        return [*itertools.takewhile(lambda kept: kept[1] <= now, self._kept.items())]

    def murder_pending(self) -> None:
        """Give up on clients that wait too long, or do not close, or are too many. Called once a
        turn of the event loop.
        """
        self._make_room()
        if not self._looks:
            return
        now = time.monotonic()
        if self.alive:
            self.spread.hold(self.age, self.nr_conns)
        if self._stopping_since is not None:
            if not self._stopped and now >= self._stopping_since + STOP_COMPUTING:
                self._stopped = True
                self.wsgi.extensions["stop"]()
            if now >= self._stopping_since + STOP_WAITING:
                error = RequestError(503, "shutting_down", "the service is shutting down")
                for conn in self._started:
                    body, head = _response(conn.environ(), error, {"Retry-After": "1"}, "close")
                    conn.sock.end_with(head + body)
        for conn, since in list(self._queued.items()):
            if now - since < self.max_wait and not self._stopped:
                break
            del self._queued[conn]
            self._turn_away(conn, f"no thread was free for {now - since:.1f} s")
        for conn, until in list(self._waiting.items()):
            idle = not conn.held and not conn.sock.unsent
            if idle and self._stopping_since is not None:
                until = min(until, self._stopping_since + STOP_KEEPALIVE_LINGER)
            if until > now and not (conn.held and self._stopped) or idle and conn.sock.peek():
                continue
            if conn.held and self._stopped:
                message = "the service is shutting down, and not all of the request has arrived"
                self._refuse(conn, RequestError(503, "shutting_down", message))
            elif conn.held:
                message = f"nothing more of the request arrived for {RECEIVE_TIMEOUT} s"
                self._refuse(conn, RequestError(408, "timeout", message))
            else:
                self._drop(conn)
        for sock, until in list(self._closing.items()):
            if until <= now:
                self._close_now(sock)

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
            error = RequestError(429, "overloaded", message)
            self._refuse(largest, error, {"Retry-After": "1"}, "memory")
        while self.alive and self.nr_conns >= self.worker_connections:
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


def _response(
    environ: dict[str, Any],
    error: RequestError,
    headers: Mapping[str, str] | None,
    connection: str,
) -> tuple[bytes, bytes]:
    """Returns: an answer's body and its head."""
    path = environ.get("PATH_INFO", "")
    response = respond(error.status, error.error_type, str(error), headers, path)
    response.headers["X-Request-Id"] = request_id(environ)
    head = f"HTTP/1.1 {response.status}\r\nConnection: {connection}\r\n{response.headers}"
    return bytes(response.data), head.encode()
