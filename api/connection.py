"""A client's connection: what has arrived of its next request, and what it has not yet taken of its
last answer.
"""

import contextlib
import copy
import ctypes
import functools
import io
import re
import socket
import struct
import threading
import time
import types
from collections.abc import Callable
from typing import Any

from gunicorn import SERVER, util
from gunicorn.http import get_parser, wsgi
from gunicorn.workers.gthread import TConn

from api.application import Direct
from api.errors import RequestError

# Seconds for which nobody looks whether a client is still there: one that closes its sending side
# behind a request looks like one that has gone, and may wait for as long as that.
GONE_AFTER = 1.0
_MAX_HEAD = 65_536
_MAX_CHUNK_LINE, _MAX_TRAILER = 4096, 8192
_MAX_DIGITS = 18  # of a Content-Length
LIMIT_REQUEST_FIELDS, LIMIT_REQUEST_FIELD_SIZE = 64, 8190
# The fields that are looked at, and where they go in an environ: those on which depends what a
# request is (gunicorn looks at some, the application at others), and those that only its log line
# and its answer's head depend on. There is no need to know any other.
_TELLING = {
    b"connection": "HTTP_CONNECTION",
    b"content-type": "CONTENT_TYPE",
    b"authorization": "HTTP_AUTHORIZATION",
    b"x-api-key": "HTTP_X_API_KEY",
    b"x-forwarded-proto": "HTTP_X_FORWARDED_PROTO",
    b"x-forwarded-protocol": "HTTP_X_FORWARDED_PROTOCOL",
    b"x-forwarded-ssl": "HTTP_X_FORWARDED_SSL",
}
_VARYING = {
    b"content-length": "CONTENT_LENGTH",
    b"user-agent": "HTTP_USER_AGENT",
    b"x-request-id": "HTTP_X_REQUEST_ID",
    b"traceparent": "HTTP_TRACEPARENT",
    b"x-cloud-trace-context": "HTTP_X_CLOUD_TRACE_CONTEXT",
    b"x-forwarded-for": "HTTP_X_FORWARDED_FOR",
}
_READ = {*_TELLING.values(), *_VARYING.values()}
# gunicorn's own parser sees the head afterwards and refuses whatever of it is not HTTP.
_FRAMING = re.compile(
    rb"\r\n(content-length|transfer-encoding|expect):([^\r\n]*)(?=\r\n)", re.IGNORECASE
)
# A head without anything that needs a second look: each line is what it seems to be.
_PLAIN = re.compile(
    rb"[A-Z]+ /[!-~]* HTTP/1\.1\r\n(?:[-!#$%&'*+.^`|~0-9A-Za-z]+:[\t -~]*\r\n)+\r\n"
)
_FIELD = re.compile(rb"\r\n([^:\r\n]+):([^\r\n]*)")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)(?=\r\n)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[^\r\n]*close", re.IGNORECASE)
_CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,16})[ \t]*(?:;[^\r\n]*)?")


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


class Socket(socket.socket):
    """A client's socket that threads write to without ever waiting: what the client does not take
    at once stays in `unsent`, for the event loop to send.
    """

    arrived = 0.0  # when the last request had arrived in full, on the clock of `time.perf_counter`

    def __init__(self, accepted: socket.socket) -> None:
        super().__init__(accepted.family, accepted.type, fileno=accepted.detach())
        # Else the kernel takes megabytes, and a client that reads them slowly looks like one that
        # does not read.
        with contextlib.suppress(OSError):  # not every sandbox's kernel can
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 131_072)
        self.unsent = bytearray()
        self.answering = False  # whether any of the answer has been written
        self._ended = False
        self._writing = threading.Lock()

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Take what is to be sent. The head of an answer waits for its body, to go out with it."""
        with self._writing:
            if self._ended:
                return
            self.answering = True
            self.unsent += data

    def flush(self) -> None:
        """Send what the client takes at once."""
        with self._writing, contextlib.suppress(OSError):  # the event loop will meet it again
            if self.unsent and not self._ended:
                self.send_more()

    def end_with(self, data: bytes) -> None:
        """Answer in place of a thread that has not begun to; what it writes later is dropped."""
        with self._writing:
            if not self.answering and not self._ended:
                self._ended = True
                with contextlib.suppress(OSError):
                    self.send(data, socket.MSG_DONTWAIT)
                    self.shutdown(socket.SHUT_WR)

    def peek(self) -> bytes | None:
        """Returns: a byte that is still unread; empty when the client has closed its side; None
        when nothing has come.
        """
        try:
            return self.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def gone(self) -> bool:
        """Whether the client has closed its side, and nothing that it sent is still unread."""
        return self.peek() == b""

    def send_more(self) -> bool:
        """Returns: whether the client has taken any."""
        try:
            del self.unsent[: self.send(self.unsent, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            return False
        return True


class Answer(wsgi.Response):  # type: ignore[misc]
    """What the application answers. Its headers are our own, and are not looked at once more."""

    def __init__(self, request: Any, sock: Socket, cfg: Any, lets_go: Callable[[], bool]) -> None:
        """`lets_go` is asked once, when the head is written: whether the server wants to close."""
        super().__init__(request, sock, cfg)
        self._lets_go = lets_go
        self._closes: bool | None = None

    def should_close(self) -> bool:
        if self._closes is None:
            self._closes = bool(super().should_close()) or self._lets_go()
        return self._closes

    def process_headers(self, headers: list[tuple[str, str]]) -> None:
        self.headers = headers
        for name, value in headers:
            if name == "Content-Length":
                self.response_length = int(value)

    def default_headers(self) -> list[str]:
        major, minor = self.req.version
        connection = "close" if self.should_close() else "keep-alive"
        head = [f"HTTP/{major}.{minor} {self.status}\r\n{server_fields(connection)}"]
        return [*head, "Transfer-Encoding: chunked\r\n"] if self.chunked else head


def server_fields(connection: str) -> str:
    """The fields of an answer that are the server's; `connection` is keep-alive or close."""
    return f"{_server_and_date(int(time.time()))}Connection: {connection}\r\n"


@functools.lru_cache(1)
def _server_and_date(now: int) -> str:
    return f"Server: {SERVER}\r\nDate: {util.http_date(now)}\r\n"


class Heads:
    """What was made of requests' heads, for those that say the same again: to parse one, to write
    WSGI's environ and to find the route costs more than anything else in receiving a request.
    """

    _FEW = 256  # of up to 8 KB, with what was made of them 4 MB at most

    def __init__(self) -> None:
        self._known: dict[tuple[bytes | None, ...], KnownHead] = {}

    def parser(self, cfg: Any, conn: "Connection") -> Any:
        """What gives the connection's request: gunicorn's parser, or what it gave before, which is
        the connection's `known` from now on.
        """
        conn.known = self._known.get(conn.head_key) if conn.head_key else None
        return conn.known or get_parser(cfg, [conn.head], conn.client)

    def environ(self, cfg: Any, conn: "Connection", request: Any) -> dict[str, Any]:
        """WSGI's environ for a whole request, with those fields of its head that are looked at."""
        if conn.known:
            return conn.known.environ(conn)
        request.body = io.BytesIO(conn.body)
        request._expected_100_continue = False  # Connection has sent it
        if conn.chunked:  # RFC 9112 section 7.1.3: decoded, it has a length and no transfer coding
            request.headers = [one for one in request.headers if one[0] != "TRANSFER-ENCODING"]
            request.headers.append(("CONTENT-LENGTH", str(conn.length)))
        made: dict[str, Any]
        _, made = wsgi.create(request, conn.sock, conn.client, conn.server, cfg)
        made["wsgi.multithread"] = True
        del made["wsgi.early_hints"]
        for name in [name for name in made if name.startswith("HTTP_") and name not in _READ]:
            del made[name]
        if "HTTP_X_API_KEY" in made:  # it decides: see api/auth.py
            made.pop("HTTP_AUTHORIZATION", None)
        if conn.head_key:
            if len(self._known) >= self._FEW:
                self._known.clear()
            conn.known = self._known[conn.head_key] = KnownHead(request, made)
        return made


class KnownHead:
    """A head that was seen before; in the place of gunicorn's parser."""

    unreader = types.SimpleNamespace(buf=io.BytesIO())  # nothing is left over
    direct: Direct | None = None  # answers its requests' bodies without Flask

    def __init__(self, request: Any, environ: dict[str, Any]) -> None:
        self._request = copy.copy(request)
        self._request.body = None
        own = {*_VARYING.values(), "REMOTE_ADDR", "REMOTE_PORT", "wsgi.input", "gunicorn.socket"}
        self._environ = {name: value for name, value in environ.items() if name not in own}

    def __next__(self) -> Any:
        return self._request

    def environ(self, conn: "Connection") -> dict[str, Any]:
        """WSGI's environ for a request that says the same in its head."""
        environ = self._environ | conn.varying
        environ["wsgi.input"] = io.BytesIO(conn.body)
        environ["gunicorn.socket"] = conn.sock
        return environ


def head_key(head: bytes, address: str) -> tuple[tuple[bytes | None, ...], dict[str, str]]:
    """What a head from `address` is known by: its request line and what its telling fields say.

    Returns: that, and its varying fields, for an environ; nothing for a head that gunicorn's parser
    has to see each time: it would refuse it, merge fields, or read it otherwise than we do.
    """
    if len(head) > LIMIT_REQUEST_FIELD_SIZE or not _PLAIN.fullmatch(head):
        return (), {}
    found = _FIELD.findall(head)
    fields = {name.lower(): value.strip(b" \t") for name, value in found}
    once = len(fields) == len(found) <= LIMIT_REQUEST_FIELDS
    if not once or b"transfer-encoding" in fields or b"expect" in fields:
        return (), {}
    if b"x-api-key" in fields:
        fields.pop(b"authorization", None)  # as `Heads.environ` does
    if fields.get(b"connection", b"").lower() == b"keep-alive":
        del fields[b"connection"]  # HTTP/1.1 means that anyway
    telling = [fields.get(name) for name in _TELLING]
    if any(telling[-3:]):  # of the scheme, on which gunicorn believes some addresses
        telling.append(address.encode())
    varying = {_VARYING[name]: value.decode() for name, value in fields.items() if name in _VARYING}
    return (head.partition(b"\r\n")[0], *telling), varying


class Connection(TConn):  # type: ignore[misc]  # gunicorn has no types
    """A client's connection and what has arrived of its next request."""

    sock: Socket
    known: KnownHead | None
    registered = True  # whether the event loop looks for what the client sends

    def __init__(
        self,
        cfg: Any,
        sock: Socket,
        client: Any,
        server: Any,
        close_later: Callable[[Socket], None],
    ) -> None:
        """`close_later` closes a socket once its client has done so too."""
        super().__init__(cfg, sock, client, server)
        self._close_later = close_later
        self.held = 0  # bytes that count for HELD_BODIES
        self.received = bytearray()  # what is not yet sorted into head and body
        # The last head with a key: up to the value of its Content-Length, from there on, its key
        # and its varying fields.
        self._usual: tuple[bytes, bytes, tuple[bytes | None, ...], dict[str, str]] = (
            b"",
            b"",
            (),
            {},
        )
        self._remote = {"REMOTE_ADDR": ""}  # for an environ; of a Unix socket's client
        if isinstance(client, tuple):
            self._remote = {"REMOTE_ADDR": client[0], "REMOTE_PORT": str(client[1])}
        self.begin()

    def begin(self) -> None:
        """Forget the last request."""
        self.head, self.body = b"", bytearray()
        self.length = 0  # of the body; of a chunked one, what its chunks have announced so far
        self.chunked = False
        self.head_key: tuple[bytes | None, ...] = ()
        self.varying: dict[str, str] = {}
        self.known = None
        self.sock.answering = False
        self._searched = 0  # how far `received` holds no end of the head

    def environ(self) -> dict[str, Any]:
        """As much of WSGI's environ as has arrived, for a request that no application sees."""
        head = (self.head or self.received).decode("latin-1").rpartition("\r\n")[0]
        line, *fields = head.split("\r\n")
        environ = {"REMOTE_ADDR": self.client[0]}
        method, _, rest = line.partition(" ")
        target, _, environ["SERVER_PROTOCOL"] = rest.partition(" ")
        if target.startswith("/"):
            environ["REQUEST_METHOD"] = method
            environ["PATH_INFO"] = util.unquote_to_wsgi_str(target.partition("?")[0])
        for field in fields:
            name, _, value = field.partition(":")
            environ["HTTP_" + name.upper().replace("-", "_")] = value.strip()
        environ["CONTENT_LENGTH"] = str(self.length)
        return environ

    @property
    def persistent(self) -> bool:
        """Whether the client may send a further request after this one."""
        return self.head.partition(b"\r\n")[0].endswith(b"HTTP/1.1") and not _CLOSE.search(
            self.head
        )

    def complete(self, max_body: int) -> bool:
        """Sort what was received into head and body.

        Returns: whether nothing more is needed: the request is whole, or its `length` is over
        `max_body`.
        Raises: RequestError for broken framing; OSError when the client has gone.
        """
        if not self.head and not self._begin_as_usual():
            end = self.received.find(b"\r\n\r\n", self._searched)
            if end < 0:
                if len(self.received) > _MAX_HEAD:
                    raise RequestError(
                        431, "validation", f"request line and headers pass {_MAX_HEAD} bytes"
                    )
                self._searched = max(0, len(self.received) - 3)
                return False
            self.head = bytes(self.received[: end + 4])
            del self.received[: end + 4]
            self._begin_body(max_body)
        if self.chunked:
            return self.length > max_body or self._take_chunks(max_body)
        if len(self.received) < self.length:
            return self.length > max_body
        self.body = self.received[: self.length]
        del self.received[: self.length]
        return True

    def _begin_as_usual(self) -> bool:
        """Take a head that is the last one but for the length of the body.

        Returns: whether it is such a one.
        """
        start, rest, key, varying = self._usual
        if not start or not self.received.startswith(start):
            return False
        end = self.received.find(b"\r\n", len(start), len(start) + _MAX_DIGITS + 2)
        length = self.received[len(start) : end]
        if end < 0 or not length.isdigit() or not self.received.startswith(rest, end):
            return False
        self.head = bytes(self.received[: end + len(rest)])
        del self.received[: end + len(rest)]
        self.length = int(length)
        self.head_key, self.varying = key, {**varying, "CONTENT_LENGTH": length.decode()}
        return True

    def _begin_body(self, max_body: int) -> None:
        framed, continues = False, False
        for name, sent in _FRAMING.findall(self.head):
            name, value = name.lower(), sent.strip(b" \t")
            if name == b"expect":
                continues = continues or value.lower() == b"100-continue"
                continue
            if framed:
                raise RequestError(
                    400, "validation", "send one Content-Length or Transfer-Encoding"
                )
            framed = True
            if name == b"content-length":
                if not value.isdigit() or len(value) > _MAX_DIGITS:
                    raise RequestError(400, "validation", "Content-Length is not a number of bytes")
                self.length = int(value)
            elif value.lower() == b"chunked":
                self.chunked = True
            else:
                raise RequestError(400, "validation", "Transfer-Encoding may only be chunked")
        self.head_key, varying = head_key(self.head, self._remote["REMOTE_ADDR"])
        self.varying = self._remote | varying
        if self.head_key and (found := _LENGTH.search(self.head)):
            start, rest = self.head[: found.start(1)], self.head[found.end(1) :]
            self._usual = start, rest, self.head_key, self.varying
        if (
            continues
            and self.head.partition(b"\r\n")[0].endswith(b"HTTP/1.1")
            and not self.received
            and (self.chunked or 0 < self.length <= max_body)
        ):
            self.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n", socket.MSG_DONTWAIT)

    def _take_chunks(self, max_body: int) -> bool:
        """Move whole chunks into `body`; True at the last one, or when they pass `max_body`."""
        received, at = self.received, 0
        try:
            while True:
                line_end = received.find(b"\r\n", at, at + _MAX_CHUNK_LINE)
                if line_end < 0 and len(received) - at < _MAX_CHUNK_LINE:
                    return False
                line = _CHUNK_LINE.fullmatch(received, at, line_end) if line_end >= 0 else None
                if line is None:
                    raise RequestError(400, "validation", "a chunk does not begin with its size")
                size = int(line[1], 16)
                self.length = len(self.body) + size
                if self.length > max_body:
                    return True
                if not size:
                    end = received.find(b"\r\n\r\n", line_end, line_end + _MAX_TRAILER)
                    if end < 0 and len(received) - line_end < _MAX_TRAILER:
                        return False
                    # Whoever takes a bare LF for a line end sees other requests than we do.
                    if end < 0 or b"\n" in received[line_end:end].replace(b"\r\n", b""):
                        raise RequestError(400, "validation", "the chunks' trailer is broken")
                    at = end + 4
                    return True
                start, end = line_end + 2, line_end + 2 + size
                if received[end : end + 2] != b"\r\n"[: max(0, len(received) - end)]:
                    raise RequestError(400, "validation", "a chunk is longer than its size says")
                if len(received) < end + 2:
                    return False
                self.body += received[start:end]
                at = end + 2
        finally:
            del received[:at]

    def close(self, graceful: bool = False) -> None:
        if graceful:
            self._close_later(self.sock)
        else:
            util.close(self.sock)
