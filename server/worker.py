"""The gunicorn worker: an event loop, its listeners and connections, timeouts, and the drain."""

import asyncio
import contextlib
import ctypes
import functools
import gc
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import uvloop
from gunicorn.workers.base import Worker as BaseWorker

from server.connection import Connection
from server.limits import Limits
from server.messages import OWN, Application, HttpError, Request, Response
from server.spread import Spread
from server.tasks import Tasks

TICK = 0.1  # seconds between two looks at what is due
# Seconds after SIGTERM; gunicorn's graceful_timeout is 9.
DRAIN_IDLE = 2.0  # idle connections are closed; a request that was on its way has arrived by then
DRAIN_WAITING = 6.5  # requests that wait for the engine, or are incomplete, get a 503
DRAIN_WORKING = 8.0  # requests that are being worked on get a 503
DRAIN_ALL = 8.7  # the worker ends
# Seconds for which a connection is left to a worker that holds fewer, and after which the next is.
YIELD, YIELD_MEMORY = 0.002, 0.010
ACCEPT_PAUSE = 0.1  # seconds without accepting after it failed, for example for want of files
LET_GO = 0.1  # seconds between two kept connections that are sent to another worker


class Worker(BaseWorker):  # type: ignore[misc]  # gunicorn has no types
    """The worker class for gunicorn.conf.py, which sets `limits`, `max_wait` (seconds that a
    request may wait for a thread) and `spread`.
    """

    limits = Limits()
    max_wait = 2.5
    spread = Spread(1)
    wsgi: Application

    def init_process(self) -> None:
        # The usual soft limit of 1024 open files leaves too few beside worker_connections.
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        super().init_process()

    def run(self) -> None:
        """Serve until the worker is told to end and all is answered."""
        self.held = self._arriving = 0
        self._connections: dict[Connection, None] = {}  # oldest first
        self._draining_since: float | None = None
        self._let_go_at = self._beat_at = self._yielded_until = 0.0
        self._stopped = self._listening = False
        self._loop = loop = uvloop.new_event_loop()
        asyncio.set_event_loop(loop)
        self._tasks = Tasks(loop, self.cfg.threads, self.max_wait)
        self.wsgi.start(self.cfg.workers, self)
        for listener in self.sockets:
            listener.setblocking(False)
        self._warming = loop.create_task(self._warm_up())
        self._listen()
        # Once the loop runs: uvloop loses a signal that comes before. gunicorn's own handler, which
        # is there until then, leaves a mark that the next tick sees.
        loop.call_soon(loop.add_signal_handler, signal.SIGTERM, self._drain)
        self._tick()
        loop.run_forever()
        self._tasks.close()
        self.wsgi.close()

    async def _warm_up(self) -> None:
        """Send the application's own requests through a connection, one after the other."""
        ours, served = socket.socketpair()
        with contextlib.closing(ours):  # also where SIGTERM cancels this, so that nothing waits
            await self._serve(served, OWN)
            reader, writer = await asyncio.open_connection(sock=ours)
            with contextlib.suppress(asyncio.IncompleteReadError), contextlib.closing(writer):
                for request in self.wsgi.warm_up():
                    writer.write(request)
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                    await reader.readexactly(length)
        gc.freeze()  # what stays for good need not be looked through again and again

    # -- connections

    def _listen(self) -> None:
        if not self._listening and self._draining_since is None:
            self._listening = True
            for listener in self.sockets:
                self._loop.add_reader(listener, self._accept, listener)

    def _pause_listening(self, seconds: float) -> None:
        self._listening = False
        for listener in self.sockets:
            self._loop.remove_reader(listener)
        self._loop.call_later(seconds, self._listen)

    def _accept(self, listener: socket.socket) -> None:
        """Take a connection, or leave it to a worker that holds fewer. If none takes it within
        YIELD seconds, take it.
        """
        now = time.monotonic()
        if self.spread.excess(self.age) > 0 and now > self._yielded_until:
            self._yielded_until = now + YIELD_MEMORY
            self._pause_listening(YIELD)
            return
        self._yielded_until = 0.0
        self._take(listener)
        self.spread.hold(self.age, len(self._connections))

    def _take(self, listener: socket.socket) -> bool:
        """Returns: whether there was a connection to take."""
        try:
            accepted, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False  # another worker was faster, or the client has gone
        except OSError as error:
            self.log.error("cannot accept a connection: %s", error.strerror)
            if self._draining_since is None:
                self._pause_listening(ACCEPT_PAUSE)
            return False
        accepted.setblocking(False)
        # Without this bound the kernel takes megabytes of a response that nobody reads.
        with contextlib.suppress(OSError):  # not every sandbox's kernel has it
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 131_072)
        client = "-"
        if isinstance(address, tuple):
            client = address[0].removeprefix("::ffff:")
        self._arriving += 1
        self._loop.create_task(self._serve(accepted, client)).add_done_callback(self._arrived)
        return True

    def _arrived(self, served: asyncio.Task[None]) -> None:
        self._arriving -= 1

    async def _serve(self, accepted: socket.socket, client: str) -> None:
        make = functools.partial(Connection, self, self._loop, client)
        with contextlib.suppress(OSError):  # the client has gone already
            await self._loop.connect_accepted_socket(make, accepted)

    def opened(self, connection: Connection) -> None:
        """A connection has begun."""
        self._connections[connection] = None
        while len(self._connections) > self.cfg.worker_connections:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Too many connections: drop one that closes, or that has waited longest for its client."""
        *others, newest = self._connections
        waiting = [one for one in others if not one.working]
        oldest = min(waiting, key=lambda one: (not one.closing, one.last_heard), default=newest)
        self._connections.pop(oldest)
        oldest.abort()

    def closed(self, connection: Connection) -> None:
        """A connection has ended."""
        self._connections.pop(connection, None)
        if self._draining_since is not None and not (self._connections or self._arriving):
            self._loop.stop()

    def make_room(self) -> None:
        """Requests take too much memory: refuse the largest that are incomplete."""
        most = self.limits.held_bodies * self.limits.max_body
        error = HttpError(
            *(429, "overloaded"),
            f"{most} bytes of requests are in memory already; send this one again later",
            headers={"Retry-After": "1"},
            reason="memory",
        )
        while self.held > most:
            receiving = [one for one in self._connections if one.receiving]
            largest = max(receiving, key=lambda one: one.held, default=None)
            if largest is None or largest.held <= 65_536:
                break
            largest.refuse(error)

    def keeps_connections(self) -> bool:
        """Whether a connection may be kept for its next request. False while draining. Otherwise
        False once in LET_GO seconds if another worker holds fewer connections: the client connects
        again, to that one.
        """
        if self._draining_since is not None or not self.cfg.keepalive:
            return False
        now = time.monotonic()
        if now < self._let_go_at:
            return True
        self._let_go_at = now + LET_GO
        return self.spread.excess(self.age) < 2 or not self._warming.done()

    # -- what the application asks for

    def call_soon(self, call: Callable[[], None]) -> None:
        """Make a call in the next turn of the loop."""
        self._loop.call_soon(call)

    def when_readable(self, file: int, call: Callable[[], None]) -> None:
        """Make a call whenever a file descriptor is readable."""
        self._loop.add_reader(file, self._tasks.after, call)

    def busy_threads(self) -> int:
        """How many calls run in threads."""
        return self._tasks.busy_threads

    # -- requests

    def work_on(self, request: Request, then: Callable[[Response], None]) -> None:
        """Have the application answer, in a task."""
        if request.client != OWN:
            self.nr += 1
            if self.nr >= self.max_requests and self._draining_since is None:
                self.log.info("starting anew after this request")
                self._drain()
        self._tasks.run(functools.partial(self.wsgi.respond, request), then)

    # -- time

    def _tick(self) -> None:
        """Look for what is due, and tell the master that the worker is alive."""
        self._loop.call_later(TICK, self._tick)
        now = time.monotonic()
        self._tasks.expire()
        for connection in [one for one in self._connections if one.deadline <= now]:
            connection.expire(now)
        if now >= self._beat_at:
            self._beat_at = now + 1
            self.notify()
            self.wsgi.tick()
        if not self.alive or os.getppid() != self.ppid:
            self._drain()
        elif self._draining_since is None:
            self.spread.hold(self.age, len(self._connections))
        if self._draining_since is not None:
            self._go_on_draining(now - self._draining_since)

    def _drain(self) -> None:
        """Accept the connections in the backlog and no more; end when all are answered."""
        if self._draining_since is not None:
            return
        self._draining_since, self.alive = time.monotonic(), False
        self._warming.cancel()
        self.spread.leave(self.age)
        for listener in self.sockets:
            self._loop.remove_reader(listener)
            while self._take(listener):
                pass
            listener.close()

    def _go_on_draining(self, since: float) -> None:
        """Close or refuse what there is no more time for, `since` seconds after the signal."""
        if since >= DRAIN_ALL or not (self._connections or self._arriving):
            self._loop.stop()
        error = HttpError(
            503, "shutting_down", "the service is shutting down", headers={"Retry-After": "1"}
        )
        for connection in list(self._connections):
            if since >= DRAIN_WAITING and connection.receiving:
                connection.refuse(error)
            elif since >= DRAIN_WORKING:
                connection.end_with(error)
            elif since >= DRAIN_IDLE and connection.idle and not connection.has_input():
                connection.close()
        if since >= DRAIN_WAITING and not self._stopped:
            self._stopped = True
            self.wsgi.stop()


_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
# Drops what has SYN set and not ACK, and lets pass what else comes (linux/filter.h; a TCP header
# has its flags at byte 13).
_NO_SYN = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load a byte
        (0x54, 0, 0, 0x12),  # and
        (0x15, 0, 1, 0x02),  # if equal
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0xFFFF_FFFF),  # pass
    )
)


def refuse_new(listener: socket.socket) -> None:
    """Let the kernel make no further connections for a listening socket, in any process, so that
    those it has made can be accepted before the socket is closed: closing resets the rest. Between
    a last accept and a close a busy process may pass milliseconds.

    Clients try again after a second and are refused then.
    """
    code = ctypes.create_string_buffer(_NO_SYN)
    program = struct.pack("HL", len(_NO_SYN) // 8, ctypes.addressof(code))
    with contextlib.suppress(OSError):  # not every sandbox's kernel can
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def drain_gently(arbiter: Any) -> None:
    """At SIGTERM to gunicorn's master, and not at a reload, where other workers go on: refuse new
    connections before any worker stops to accept. Called by gunicorn.conf.py's `when_ready`.
    """
    halt = arbiter.handle_term

    def handle_term() -> None:
        for listener in arbiter.LISTENERS:
            refuse_new(listener)
        halt()

    arbiter.handle_term = handle_term
