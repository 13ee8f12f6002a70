"""Content-Encoding: compressed bodies of requests, and compressed responses where clients ask."""

import functools
import threading
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from server.messages import HttpError, Request, Response
from server.tasks import Busy, in_thread

_GZIP, _ZLIB, _RAW = 31, 15, -15  # zlib's `wbits`
_KNOWN = {"gzip": _GZIP, "x-gzip": _GZIP, "deflate": _ZLIB}
_TAKEN = "gzip, deflate"
_MOST = 3  # codings of one body: each may cost as much as a body of the full size
# Parts of a gzip body, as parallel compressors write them; each needs a decompressor of its own.
_MAX_MEMBERS = 1000
_PIECE = 65_536  # bytes that are decoded at a time, and that come of it at a time
# Larger responses are compressed in a thread: this much takes 2 ms (Emerald Rapids).
_MAX_INLINE = 131_072
_TEXTS = ("application/json", "text/")  # what becomes smaller


class Bodies:
    """Decodes the bodies of requests. All that are in memory at a time take only so much of it."""

    def __init__(self, limit: int, total: int) -> None:
        """Bytes: of one decoded body (MAX_BODY_SIZE), and of all at a time."""
        self._limit, self._total = limit, total
        self._held, self._lock = 0, threading.Lock()

    @contextmanager
    def decoded(self, request: Request) -> Iterator[None]:
        """Replace the body by its decoded form, if the request's key was checked. Open routes read
        no body, so theirs stays as it was sent.

        Raises: HttpError: 415 for an unknown coding; 400 for a body that is not what its coding
        says; 413 as soon as it passes the limit; 429 when too much is in memory already.
        """
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            with self._lock:
                if self._held + size > self._total:
                    raise HttpError(
                        *(429, "overloaded"),
                        f"{self._total} bytes of decompressed bodies are in memory already; send "
                        "this request again later",
                        headers={"Retry-After": "1"},
                        reason="memory",
                    )
                self._held += size
            held += size

        try:
            wanted = request.body and request.caller is not None
            for coding in reversed(codings(request)) if wanted else ():
                request.body = decode(request.body, coding, self._limit, hold)
            yield
        finally:
            with self._lock:
                self._held -= held


def codings(request: Request) -> list[str]:
    """The codings of a body in the order in which they were applied. Raises: HttpError 415."""
    sent = request.headers.get("content-encoding", "").lower()
    named = [name for name in map(str.strip, sent.split(",")) if name not in ("", "identity")]
    if unknown := [name for name in named if name not in _KNOWN]:
        message = f"Content-Encoding is {unknown[0]}; the service takes {_TAKEN}"
    elif len(named) > _MOST:
        message = f"Content-Encoding has {len(named)} codings; the service takes up to {_MOST}"
    else:
        return named
    raise HttpError(415, "unsupported_media_type", message, headers={"Accept-Encoding": _TAKEN})


def decode(
    body: bytes | bytearray, coding: str, limit: int, hold: Callable[[int], None]
) -> bytearray:
    """Undo one coding.

    Args:
        limit: bytes of what comes out.
        hold: called with the size of each part before it is kept.

    Raises: HttpError 400 and 413, and what `hold` raises.
    """
    sent, out = memoryview(body), bytearray()
    wbits = _KNOWN[coding]
    # A zlib header (RFC 1950) is a multiple of 31 and names method 8. Many send bare deflate.
    if wbits == _ZLIB and (len(sent) < 2 or sent[0] & 15 != 8 or (sent[0] << 8 | sent[1]) % 31):
        wbits = _RAW
    decoder, at, members = zlib.decompressobj(wbits), 0, 1
    while at < len(sent):
        piece: bytes | memoryview = sent[at : at + _PIECE]
        at += len(piece)
        full = True
        while (piece or full) and not decoder.eof:
            try:
                part = decoder.decompress(piece, _PIECE)
            except zlib.error as error:
                reason = str(error).rpartition(": ")[2]
                raise _broken(coding, f"is not valid {coding}: {reason}") from None
            if len(out) + len(part) > limit:
                raise HttpError(
                    *(413, "too_large"),
                    f"the decompressed body has more than {limit} bytes, the limit (MAX_BODY_SIZE)",
                )
            hold(len(part))
            out += part
            piece, full = decoder.unconsumed_tail, len(part) == _PIECE
        if decoder.eof and (at := at - len(decoder.unused_data)) < len(sent):
            members += 1
            if wbits != _GZIP or bytes(sent[at : at + 2]) != b"\x1f\x8b" or members > _MAX_MEMBERS:
                raise _broken(coding, f"goes on for {len(sent) - at} bytes behind its end")
            decoder = zlib.decompressobj(wbits)
    if not decoder.eof:
        raise _broken(coding, "is cut off: its end is missing")
    return out


def _broken(coding: str, what: str) -> HttpError:
    message = f"Content-Encoding is {coding}, and the body {what}"
    return HttpError(400, "validation", message)


class Compression:
    """Compresses responses that are large enough for clients that accept it."""

    def __init__(self, smallest: int, static: Collection[str]) -> None:
        """Args:
        smallest: bytes of a body from which it is compressed (COMPRESS_FROM); 0 for never.
        static: paths whose responses are the same bytes each time, and are compressed once.
        """
        self._smallest, self._static = smallest, frozenset(static)

    def apply(self, response: Response, request: Request) -> Response:
        """Returns: the response, compressed where that is worth it. A large one stays as it is when
        no thread is free.
        """
        size = len(response.body)
        if not self._smallest or size < self._smallest:
            return response
        if not response.content_type.startswith(_TEXTS):
            return response
        response.headers.append(("Vary", "Accept-Encoding"))
        coding = accepted_coding(request.headers.get("accept-encoding", ""))
        if coding is None:
            return response
        once = request.path in self._static
        call = functools.partial(_compress_once if once else compress, response.body, coding)
        try:
            large = size > _MAX_INLINE
            response.body = in_thread(call, request.caller, wait=False) if large else call()
        except Busy:
            return response  # uncompressed, which costs no time
        response.headers.append(("Content-Encoding", coding))
        return response


def accepted_coding(accepted: str) -> str | None:
    """The coding that a client likes best of those that the service writes, by its Accept-Encoding
    (RFC 9110 section 12.5.3); None where it prefers none.
    """
    weights: dict[str, float] = {}
    for part in accepted.lower().split(","):
        name, *parameters = part.split(";")
        pairs = (parameter.partition("=") for parameter in parameters)
        sent = next((value for key, _, value in pairs if key.strip() == "q"), "1")
        try:
            weight = float(sent)
        except ValueError:
            weight = 0.0
        weights[name.strip()] = weight if 0 <= weight <= 1 else 0.0
    best = max(("gzip", "deflate"), key=lambda name: weights.get(name, weights.get("*", 0.0)))
    weight = weights.get(best, weights.get("*", 0.0))
    return best if weight > 0 and weight >= weights.get("identity", 0.0) else None


def compress(
    body: bytes, coding: str, level: int = 1, strategy: int = zlib.Z_HUFFMAN_ONLY
) -> bytes:
    """Vectors are random digits, in which there is nothing to find twice. So only their characters
    get shorter codes: 45 % of the size at 75 MB/s, where level 1 takes 44 % at 56 MB/s and level 6
    40 % at 11 MB/s; base64 75 % at 79 MB/s, where level 1 takes 76 % at 25 MB/s (Emerald Rapids,
    a shared core).
    """
    writer = zlib.compressobj(level, zlib.DEFLATED, _KNOWN[coding], strategy=strategy)
    return writer.compress(body) + writer.flush()


@functools.lru_cache(16)
def _compress_once(body: bytes, coding: str) -> bytes:
    return compress(body, coding, 9, zlib.Z_DEFAULT_STRATEGY)
