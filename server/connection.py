"""One client's connection: requests in, one at a time, and responses out."""

import asyncio
import contextlib
import fcntl
import functools
import http
import sys
import termios
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Protocol, cast

from server.framing import Framer
from server.limits import Limits
from server.messages import Application, HttpError, Request, Response

_UNREAD = 65_536  # bytes that may wait behind the request that is worked on
_ONE_WRITE = 16_384  # bytes of a body that is sent together with its head
# A client that closes its sending side behind a request counts as gone only after so many seconds:
# it may still wait for the response.
GONE_AFTER = 1.0
_PROGRESS_EVERY = 2.0  # seconds between two looks at what a client has taken
_LOOK_AGAIN = 0.1  # seconds for which an idle connection stays whose client has just sent something


class Owner(Protocol):
    """What a connection needs of its worker."""

    wsgi: Application
    limits: Limits
    held: int  # bytes of requests that are not answered yet, of all connections

    def opened(self, connection: "Connection") -> None: ...

    def closed(self, connection: "Connection") -> None: ...

    def work_on(self, request: Request, then: Callable[[Response], None]) -> None:
        """Have the application answer; `then` gets the response, now or later."""

    def make_room(self) -> None:
        """`held` is over its limit: refuse the largest requests that are incomplete."""

    def keeps_connections(self) -> bool:
        """Whether a connection may be kept open for its next request."""


class Connection(asyncio.Protocol):
    """A connection is idle, receives a request, works on one, sends a response or closes. `expire`
    is called when its `deadline` has passed.
    """

    def __init__(self, owner: Owner, loop: asyncio.AbstractEventLoop, client: str) -> None:
        self._owner, self._loop, self._limits = owner, loop, owner.limits
        self._framer = Framer(owner.limits, client)
        self._unread = b""  # what came behind the request that is worked on
        self._request: Request | None = None  # the one that is worked on
        self._ended: float | None = None  # when the client closed its sending side
        self._closing = self._paused = self._lost = self._in_body = False
        self._writable = True
        self._phase_ends = 0.0  # of the head or the body that is being received
        self._taken = (0, 0)  # what the client had not taken of its response, at the last look
        self._stalled_since = 0.0
        wait = max(owner.limits.keepalive, owner.limits.head_timeout)  # for a first byte
        self._idle_until = time.monotonic() + wait
        self.held = 0  # bytes, its part of the owner's
        self.last_heard = time.monotonic()  # when the client sent something
        self.deadline = self._idle_until

    # -- asyncio's events

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._fd: int = transport.get_extra_info("socket").fileno()
        self._owner.opened(self)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self.last_heard = time.monotonic()
        if self._request or self._unread or not self._writable:
            self._unread += data
            self._bound_unread()
        else:
            self._read(data)

    def _bound_unread(self) -> None:
        if len(self._unread) > _UNREAD and not self._paused and self._ended is None:
            self._paused = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        """The client has closed its sending side; a request before that is still answered."""
        if self._closing:
            return False
        self._ended = time.monotonic()
        framer = self._framer
        if not (self._request or self._unread or framer.requests or framer.error):
            self._end_of_input()
        return True

    def _end_of_input(self) -> None:
        if self.receiving:
            message = "the request broke off: the client closed before all of it had arrived"
            self.refuse(HttpError(400, "validation", message))
        else:
            self.close()

    def pause_writing(self) -> None:
        self._writable = False
        self._watch_progress()

    def resume_writing(self) -> None:
        self._writable = True
        if not self._request:
            self._loop.call_soon(self._go_on)

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = self._lost = True
        self._unread = b""
        if not self._request:  # else its body is still in use
            self._release()
        self._owner.closed(self)

    # -- a request

    def _read(self, data: bytes) -> None:
        """Parse what has come, and begin to work on a request when it is complete."""
        framer = self._framer
        used = framer.feed(memoryview(data))
        self._unread = data[used:] if used < len(data) else b""
        self.held += used
        self._owner.held += used
        self._bound_unread()
        if framer.requests:
            self._begin(framer.requests.pop(0))
        elif framer.error:
            self.refuse(framer.error)
        else:
            self._wait()

    def _wait(self) -> None:
        """Set the deadline for the rest of a request, if one has begun."""
        limits, framer, now = self._limits, self._framer, time.monotonic()
        if framer.wants_continue:
            framer.wants_continue = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if framer.in_body:
            if not self._in_body:
                self._in_body, self._phase_ends = True, now + limits.body_timeout
        elif not framer.in_head:
            self._release()  # of empty lines before a request
            return
        elif not self._phase_ends:
            self._phase_ends = now + limits.head_timeout
        self.deadline = min(now + limits.receive_timeout, self._phase_ends)
        if self._owner.held > limits.held_bodies * limits.max_body:
            self._owner.make_room()

    def _begin(self, request: Request) -> None:
        self._phase_ends, self._in_body, self.deadline = 0.0, False, float("inf")
        self._request = request
        look = time.monotonic() + GONE_AFTER
        request.gone = lambda: self._lost or (self._ended is not None and time.monotonic() > look)
        self._owner.work_on(request, functools.partial(self._respond, request))

    def _respond(self, request: Request, response: Response) -> None:
        """Send the response to the request that was worked on."""
        if self._request is not request:  # `end_with` has answered it
            self._owner.wsgi.dropped(request)
            return
        self._request = None
        keep = request.keep_alive and self._owner.keeps_connections()
        self._send(request, response, keep)
        self._owner.wsgi.sent(request, response, None)
        if not keep:
            self.close()
        elif self._unread or self._ended is not None or self._framer.pending:
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Take the next request, one in each turn of the event loop: others have theirs between."""
        if self._request or self._closing or not self._writable:
            return
        framer = self._framer
        if framer.requests:
            self._begin(framer.requests.pop(0))
        elif framer.error:
            self.refuse(framer.error)
        elif self._unread:
            unread, self._unread = self._unread, b""
            self._read(unread)
        elif self._ended is not None:
            self._end_of_input()
        else:
            self._wait()
        if self._paused and len(self._unread) <= _UNREAD and not self._closing:
            self._paused = False
            self._transport.resume_reading()

    def end_with(self, error: HttpError) -> None:
        """Answer in place of the application, which is too late."""
        if self._request and not self._closing:
            self.refuse(error, self._request)

    def refuse(self, error: HttpError, request: Request | None = None) -> None:
        """Answer in place of the application, and close."""
        request, self._request = request or self._framer.partial(), None
        response = self._owner.wsgi.refuse(request, error)
        self._send(request, response, keep=False)
        self._owner.wsgi.sent(request, response, error)
        self.close()

    # -- a response

    def _send(self, request: Request, response: Response, keep: bool) -> None:
        self._release()
        self.deadline = self._idle_until = time.monotonic() + self._limits.keepalive
        if self._transport.is_closing():
            return
        body = response.body
        fields = "".join([f"{name}: {value}\r\n" for name, value in response.headers])
        head = (
            f"{status_line(response.status)}{server_and_date(int(time.time()))}"
            f"Connection: {'keep-alive' if keep else 'close'}\r\n"
            f"Content-Type: {response.content_type}\r\nContent-Length: {len(body)}\r\n{fields}\r\n"
        ).encode("latin-1", "replace")
        if request.method == "HEAD" or not body:
            self._transport.write(head)
        elif len(body) <= _ONE_WRITE:
            self._transport.write(head + body)
        else:  # not copied: many connections may send the same bytes
            self._transport.write(head)
            self._transport.write(body)
            self._watch_progress()

    def _watch_progress(self) -> None:
        self._taken, self._stalled_since = self._left(), time.monotonic()
        self.deadline = self._stalled_since + _PROGRESS_EVERY

    def _left(self) -> tuple[int, int]:
        """Bytes of the response that are here, and that the kernel has and the client has not
        acknowledged."""
        return self._transport.get_write_buffer_size(), self._ioctl(termios.TIOCOUTQ)

    def _release(self) -> None:
        """The bytes that were parsed are not needed any more."""
        self._owner.held -= self.held
        self.held = 0

    # -- the end

    @property
    def working(self) -> bool:
        """Whether the application works on a request of it."""
        return self._request is not None

    def has_input(self) -> bool:
        """Whether something has arrived that the event loop has not read yet."""
        return self._ioctl(termios.FIONREAD) > 0

    def _ioctl(self, request: int) -> int:
        """What the kernel says of the socket; 0 where it has no answer."""
        with contextlib.suppress(OSError, ValueError):
            answer = fcntl.ioctl(self._fd, request, b"\0\0\0\0")
            return int.from_bytes(answer, sys.byteorder)
        return 0

    @property
    def closing(self) -> bool:
        """Whether its last response is on its way, or it waits for its client to close."""
        return self._closing

    @property
    def idle(self) -> bool:
        """Whether it waits for the first byte of a request, with all responses taken."""
        return not (
            self._request
            or self._unread
            or self._framer.pending
            or self._transport.get_write_buffer_size()
        )

    @property
    def receiving(self) -> bool:
        """Whether a request has begun and is incomplete, and none is worked on before it."""
        framer = self._framer
        busy = self._closing or self._request or framer.requests
        return not busy and (framer.in_head or framer.in_body)

    def expire(self, now: float) -> None:
        """Its deadline has passed."""
        left = self._left()
        if left[0] and left != self._taken:
            self._taken, self._stalled_since = left, now
        if left[0] and now - self._stalled_since < self._limits.send_timeout:
            self.deadline = now + _PROGRESS_EVERY
        elif left[0] or self._closing:
            self._transport.abort()
        elif self.receiving:
            limits = self._limits
            message = f"nothing more of the request arrived for {limits.receive_timeout:g} s"
            if self._phase_ends <= now:
                part = "body" if self._framer.in_body else "head"
                most = limits.body_timeout if self._framer.in_body else limits.head_timeout
                message = f"the {part} of the request took longer than {most:g} s"
            self.refuse(HttpError(408, "timeout", message))
        elif now < self._idle_until or self.has_input():
            self.deadline = max(self._idle_until, now + _LOOK_AGAIN)
        else:
            self.close()

    def abort(self) -> None:
        """Close at once, whatever is on its way."""
        self._transport.abort()

    def close(self) -> None:
        """Half-close, then drop what still comes until the client closes too (RFC 9112, 9.6).

        To close at once with bytes unread would reset the connection, and could cost the client its
        response.
        """
        if self._closing:
            return
        self._closing, self._unread = True, b""
        self._release()
        if self._ended is not None or not self._transport.can_write_eof():
            self._transport.close()
            return
        if self._paused:
            self._transport.resume_reading()
        with contextlib.suppress(OSError):
            self._transport.write_eof()
        self._watch_progress()
        self.deadline = time.monotonic() + self._limits.close_timeout


@functools.cache
def status_line(status: int) -> str:
    """As HTTP/1.1 writes it; 499 has no phrase in Python."""
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = "Client Closed Request"
    return f"HTTP/1.1 {status} {phrase}\r\n"


@functools.lru_cache(1)
def server_and_date(now: int) -> str:
    """The fields of a response that are the server's, for this second of Unix time."""
    return f"Server: gunicorn\r\nDate: {formatdate(now, usegmt=True)}\r\n"
