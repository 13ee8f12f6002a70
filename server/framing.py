"""From bytes to requests: httptools (llhttp) parses, this module adds what RFC 9112 demands beyond
it and the limits of a head.
"""

import re
import time

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser

from server.limits import Limits
from server.messages import HttpError, Request, decoded_path

# Fields that must not be repeated: two readers of such a request could see two different ones.
_SINGLE = frozenset(
    ("authorization", "content-length", "content-type", "host", "transfer-encoding", "x-api-key")
)
# RFC 9110 section 6.5.1: no trailer may change how a message is framed, routed or read.
_NO_TRAILERS = _SINGLE | {"connection", "content-encoding", "expect", "te", "trailer", "upgrade"}
_HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
_TARGET = re.compile(r'/[!"$-~]*')  # no fragment
_ABSOLUTE = re.compile(r'[Hh][Tt][Tt][Pp][Ss]?://[^/?#@]+([/?][!"$-~]*)?')
_CLOSE = re.compile(r"(?:^|,)\s*close\s*(?:,|$)", re.IGNORECASE)
_MAX_DIGITS = 18  # of a Content-Length
# Bytes that a chunked body may have beside its data: for each chunk, and in all for extensions and
# trailers.
_CHUNK_OVERHEAD, _MAX_EXTENSIONS = 32, 4_096
# Bytes given to the parser at once: it may find 150 pipelined requests in them, 1 ms of work.
PIECE = 4_096


def bad_request(message: str) -> HttpError:
    """An error for a message that is not HTTP as RFC 9110 and RFC 9112 define it."""
    return HttpError(400, "validation", message)


class Framer:
    """Parses one connection's requests. `requests` holds those that are complete; `error` is what
    ended the parsing, after them.
    """

    def __init__(self, limits: Limits, client: str) -> None:
        self._limits, self._client = limits, client
        self.requests: list[Request] = []
        self.error: HttpError | None = None
        self.wants_continue = False  # the client waits for "100 Continue" to send the body
        self._parser = HttpRequestParser(self)
        self._begin()

    # -- what the connection asks

    @property
    def pending(self) -> bool:
        """Whether there is something behind the requests that were taken."""
        return bool(self.requests or self.error or self._begun)

    @property
    def in_head(self) -> bool:
        """Whether a request has begun and its head is incomplete."""
        return self._begun and not self._head_done

    @property
    def in_body(self) -> bool:
        """Whether a head is complete and its body is not."""
        return self._begun and self._head_done

    def partial(self) -> Request:
        """What is known of the request that is incomplete."""
        if not self._request.target:
            self._request.target = self._url.decode("latin-1")
            self._request.path = decoded_path(self._request.target)
            if self._url:
                self._request.method = self._parser.get_method().decode("latin-1")
        return self._request

    def feed(self, data: memoryview) -> int:
        """Parse until a request is complete or `data` ends. Returns: how many bytes were used."""
        at = 0
        while at < len(data) and not self.requests and not self.error:
            piece = data[at : at + PIECE]
            at += len(piece)
            try:
                self._feed(piece)
            except HttpError as error:
                self.error = error
            except HttpParserUpgrade as upgrade:
                at += upgrade.args[0] - len(piece)
                self._ignore_upgrade()
            except HttpParserCallbackError as error:
                if not isinstance(error.__context__, HttpError):
                    raise
                self.error = error.__context__
            except HttpParserError as error:
                self.error = bad_request(f"the request is not valid HTTP: {error}")
        return at

    def _feed(self, piece: memoryview) -> None:
        """Raises: HttpError where a part without a callback of its own is too long."""
        if self.in_body:
            self._received += len(piece)
        else:
            self._head_size += len(piece)
        self._parser.feed_data(piece)
        if self.in_head and self._head_size > self._limits.max_head:
            raise self._too_large_head()
        overhead = self._received - len(self._body)
        if self.in_body and overhead > _MAX_EXTENSIONS + _CHUNK_OVERHEAD * self._chunks:
            raise bad_request(f"chunk extensions and trailers pass {_MAX_EXTENSIONS} bytes")

    def _ignore_upgrade(self) -> None:
        """Go on in HTTP/1.1 after a request that asks for another protocol (RFC 9110 section 7.8).

        llhttp stops there and httptools skips the body, so a new parser gets a head with the same
        framing, and reads the body.
        """
        request, self._parser = self._request, HttpRequestParser(self)
        self._replayed, self._head_done = True, False
        chunked = "transfer-encoding" in request.headers
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {request.length}"
        self._parser.feed_data(f"POST / HTTP/1.1\r\n{framing}\r\n\r\n".encode())

    # -- what httptools calls

    def on_message_begin(self) -> None:
        """The first byte of a request; llhttp skips empty lines before it."""
        self._begun = True

    def _begin(self) -> None:
        self._request = Request(client=self._client)
        self._url = b""
        self._body = bytearray()
        self._begun = self._head_done = self._replayed = False
        # Bytes: of the target and the fields, of whole pieces of the head, of those of the body.
        self._fields = self._head_bytes = self._head_size = self._received = self._chunks = 0

    def on_url(self, url: bytes) -> None:
        """A part of the request target."""
        self._url += url
        if len(self._url) > self._limits.max_field:
            raise HttpError(
                414, "validation", f"the request target passes {self._limits.max_field} bytes"
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field, or one of a chunked body's trailer."""
        key, headers = name.decode("latin-1").lower(), self._request.headers
        if self._head_done:
            if key in _NO_TRAILERS:
                raise bad_request(f"the trailer has a field {key}, which belongs in the head")
            return
        if self._replayed:
            return
        self._fields += 1
        size = len(name) + len(value)
        self._head_bytes += size + 4
        if self._fields > self._limits.max_fields:
            raise HttpError(
                431, "validation", f"the head has more than {self._limits.max_fields} fields"
            )
        if size > self._limits.max_field:
            raise HttpError(
                431, "validation", f"a header field passes {self._limits.max_field} bytes"
            )
        text = value.decode("latin-1").strip(" \t")
        if key not in headers:
            headers[key] = text
        elif key in _SINGLE:
            raise bad_request(f"the head has {key} twice; send it once")
        else:
            headers[key] += f", {text}"

    def on_headers_complete(self) -> None:
        """The end of a head. Raises: HttpError for one that is not served."""
        self._head_done = True
        if self._replayed:
            return
        request, headers = self._request, self._request.headers
        request.method = self._parser.get_method().decode("latin-1")
        request.version = self._parser.get_http_version()
        if self._head_bytes + len(self._url) > self._limits.max_head:
            raise self._too_large_head()
        if request.version not in ("1.0", "1.1"):
            raise bad_request(f"HTTP/{request.version} is not served; send HTTP/1.1")
        request.target = _origin_form(request.method, self._url)
        request.path = decoded_path(request.target)
        host = headers.get("host")
        if (host is None and request.version == "1.1") or (host and not _HOST.fullmatch(host)):
            raise bad_request("the head needs one valid Host")
        chunked = self._frame(request)
        expect = headers.get("expect")
        if expect is not None and request.version == "1.1":
            if expect.lower() != "100-continue":
                raise HttpError(417, "validation", "Expect may only be 100-continue")
            self.wants_continue = chunked or 0 < request.length <= self._limits.max_body
        if request.length > self._limits.max_body:
            self._stop_reading()

    def _frame(self, request: Request) -> bool:
        """Set the length of the body. Returns: whether it is chunked."""
        headers = request.headers
        length, coding = headers.get("content-length"), headers.get("transfer-encoding")
        if coding is not None:
            if request.version == "1.0" or coding.lower() != "chunked":
                raise bad_request("Transfer-Encoding may only be chunked, in HTTP/1.1")
            if length is not None:
                raise bad_request("send Content-Length or Transfer-Encoding, not both")
        elif length is not None:
            if not length.isdecimal() or len(length) > _MAX_DIGITS:
                raise bad_request("Content-Length is not a number of bytes")
            request.length = int(length)
        return coding is not None

    def on_chunk_header(self) -> None:
        """The size of a chunk."""
        self._chunks += 1

    def on_body(self, data: bytes) -> None:
        """A part of the body, decoded."""
        self.wants_continue = False
        self._body += data
        if len(self._body) > self._limits.max_body:
            self._request.length = len(self._body)
            self._stop_reading()

    def on_message_complete(self) -> None:
        """The end of a request, or of the head of one that asks for another protocol."""
        request = self._request
        if not self._replayed:
            request.keep_alive = self._keeps_alive()
            if self._parser.should_upgrade():
                return  # see `_ignore_upgrade`: the body is still to come
        self.wants_continue = False
        request.body, request.length = self._body, len(self._body)
        self._complete()

    def _keeps_alive(self) -> bool:
        # For HTTP/1.0 llhttp overlooks a "close" beside a "keep-alive".
        connection = self._request.headers.get("connection")
        if connection and _CLOSE.search(connection):
            return False
        keeps: bool = self._parser.should_keep_alive()
        return keeps

    def _complete(self) -> None:
        self._request.arrived = time.perf_counter()
        self.requests.append(self._request)
        self._begin()

    def _stop_reading(self) -> None:
        """Hand over a request whose body is too large to be read."""
        self._complete()
        raise HttpError(413, "too_large", "the body is over the limit")

    def _too_large_head(self) -> HttpError:
        most = self._limits.max_head
        return HttpError(431, "validation", f"request line and header fields pass {most} bytes")


def _origin_form(method: str, url: bytes) -> str:
    """A request target as a path and a query.

    Raises: HttpError for a target that names neither.
    """
    target = url.decode("latin-1")
    if _TARGET.fullmatch(target) or target == "*" and method == "OPTIONS":
        return target
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None or method == "CONNECT":
        raise bad_request("the request target must be a path that begins with /")
    rest = absolute[1] or "/"
    return rest if rest.startswith("/") else f"/{rest}"
