"""Logs: one line a request and one a record, as plain text or as JSON with Cloud Logging's names.
Nothing that a client sent in a body, a query or a key gets into them, but for the names of fields
that were ignored.
"""

import datetime
import io
import logging
import os
import random
import re
import sys
import threading
import traceback
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any

import orjson
from gunicorn.glogging import Logger

from api.headers import IGNORED
from server.messages import Request, current

# https://cloud.google.com/logging/docs/structured-logging#special-payload-fields
_TRACE, _SPAN = "logging.googleapis.com/trace", "logging.googleapis.com/spanId"
_SAMPLED = "logging.googleapis.com/trace_sampled"
_UTC = datetime.UTC
# A line of a pipe arrives whole, whoever else writes, up to 4096 bytes (PIPE_BUF).
_MAX_PATH, _MAX_AGENT, _MAX_IGNORED = 512, 256, 256
_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# W3C Trace Context: version-trace-parent-flags. Google's own: trace/span;o=flag, the span decimal.
_TRACEPARENT = re.compile(
    r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
)
_CLOUD_TRACE = re.compile(r"([0-9a-f]{32})(?:/(\d{1,20}))?(?:;o=(\d))?")
_ADDRESS = re.compile(r"[0-9A-Fa-f.:]{2,45}")


def escape(text: str) -> str:
    r"""`text` with its control characters written as `\n` or `\x1b`: one line, and harmless."""
    if text.isprintable():
        return text
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def request_id(request: Request) -> str:
    """The request's X-Request-Id if it is valid, else a new random id of 32 hex digits."""
    sent = request.headers.get("x-request-id")
    return sent if sent and _ID.fullmatch(sent) else f"{random.getrandbits(128):032x}"


def trace_fields(headers: Mapping[str, str], project: str) -> dict[str, object]:
    """What links an entry to its trace and to Cloud Run's own entry for the request. A trace's name
    needs the project; without it the id goes into a field of our own.
    """
    fields: dict[str, object] = {}
    if found := _TRACEPARENT.match(headers.get("traceparent", "")):
        trace, span, sampled = found[1], found[2], int(found[3], 16) & 1 == 1
    elif found := _CLOUD_TRACE.match(headers.get("x-cloud-trace-context", "")):
        trace, span, sampled = found[1], f"{int(found[2] or 0):016x}", found[3] == "1"
    else:
        return fields
    if not project:
        return {"traceId": trace}
    fields[_TRACE] = f"projects/{project}/traces/{trace}"
    if len(span) == 16 and span.strip("0"):
        fields[_SPAN] = span
    fields[_SAMPLED] = sampled
    return fields


def _stamp(when: datetime.datetime) -> str:
    return when.isoformat(timespec="milliseconds")[:-6] + "Z"


def _entry(
    severity: str, message: str, when: datetime.datetime, fields: dict[str, object]
) -> bytes:
    """A record as Cloud Logging takes it."""
    entry = {"severity": severity, "message": message, "time": when, **fields}
    return orjson.dumps(entry, option=orjson.OPT_UTC_Z)


class Formatter(logging.Formatter):
    """Every record as one JSON object, or as text whose further lines are indented, so that none
    looks like a record. Configured keys are blotted out.
    """

    def __init__(self, *, json: bool, keys: Sequence[str], project: str) -> None:
        super().__init__()
        self._json, self._keys, self._project = json, keys, project

    def blot(self, text: str, known: str = "") -> str:
        """Replace configured keys by `***`, except those that `known` (the record's own format
        string) contains anyway.
        """
        for key in self._keys:
            if key in text and key not in known:
                text = text.replace(key, "***")
        return text

    def format(self, record: logging.LogRecord) -> str:
        # What the code itself says stays, such as `gunicorn`, where it comes apart from the rest.
        message = escape(self.blot(record.getMessage(), str(record.msg) if record.args else ""))
        if record.exc_info and record.exc_info[0]:
            # Cloud Error Reporting looks for it in `message`.
            trace = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n").split("\n")
            lines = [escape(line) for line in self.blot("\n".join(trace)).split("\n")]
            message = "\n".join([message, *lines])
        request = current.get(None)
        name = "gunicorn" if record.name == "gunicorn.error" else record.name
        when = datetime.datetime.fromtimestamp(record.created, _UTC)
        if not self._json:
            known = f" (request {request.id})" if request and request.id else ""
            body = message.replace("\n", "\n    ")
            return f"{_stamp(when)} {record.levelname} {name}: {body}{known}"
        fields: dict[str, object] = {"logger": name}
        if request and request.id:
            fields |= {"requestId": request.id, **trace_fields(request.headers, self._project)}
        return _entry(record.levelname, message, when, fields).decode()


def _write(line: bytes) -> None:
    """One write, so that lines of several workers do not mix. A log nobody can take is lost."""
    try:
        os.write(2, line)
    except OSError:
        pass


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # a wrong argument, say; logging's own way would print a trace
            record.msg, record.args, record.exc_info = "cannot be logged: %r", (error,), None
            line = self.format(record)
        _write(line.encode(errors="backslashreplace") + b"\n")


class _Lines(io.TextIOBase):
    """A standard stream whose lines become records: gunicorn prints some itself."""

    def __init__(self) -> None:
        self._held = ""

    def write(self, text: str) -> int:
        *lines, self._held = (self._held + text).split("\n")
        for line in filter(str.strip, lines):
            logging.getLogger("print").warning("%s", line)
        return len(text)


def configure(form: str, level: str, keys: Sequence[str]) -> None:
    """Send all records, warnings and uncaught exceptions of this process, and of those it forks, to
    standard error.

    Args:
        form: "json" or "text".
        level: the least severe that is written.
        keys: what must never be.
    """
    handler = _Handler()
    project = os.environ.get("GOOGLE_CLOUD_PROJECT", "")
    handler.setFormatter(Formatter(json=form == "json", keys=keys, project=project))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    if form == "json":
        sys.stdout = sys.stderr = _Lines()
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _uncaught(
        args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback
    )


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log = logging.getLogger("python")
    log.critical("uncaught exception", exc_info=(kind, error, trace))


def last_line(form: str, message: str) -> str:
    """A message to end a start with, before any configuration is known to be right."""
    if form != "json":
        return message
    return _entry("CRITICAL", message, datetime.datetime.now(_UTC), {}).decode()


class GunicornLogger(Logger):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's own records, handled as all others are. Its access log stays off."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True


class RequestLog:
    """One line a request, written after its answer was sent.

    It goes past `logging`: a JSON line costs about 6 us, a record through a logger 20.
    """

    def __init__(
        self, form: str, level: str, keys: Sequence[str], paths: Collection[str] = ()
    ) -> None:
        """Args:
        keys: what is never written.
        paths: those of the service's routes, which are written in any case.
        """
        self._json, self._paths = form == "json", frozenset(paths)
        self._level = getattr(logging, level.upper())
        self._keys = tuple(keys)
        self._project = os.environ.get("GOOGLE_CLOUD_PROJECT", "")
        # Cloud Run's front end adds the client's address as the last; elsewhere it can be forged.
        self._front_end = "K_SERVICE" in os.environ

    def write(
        self,
        request: Request,
        status: int,
        size: int,
        seconds: float | None,
        *,
        level: int = logging.INFO,
        why: str = "",
    ) -> None:
        """Args:
        request: it may be incomplete.
        size: bytes of the response's body.
        seconds: from the request's last byte to the response; None where it was never whole.
        level: info becomes warning for a status of 4xx, error for 5xx.
        why: what was wrong, in a word.
        """
        if status >= 400 and level == logging.INFO:
            level = logging.ERROR if status >= 500 else logging.WARNING
        if level < self._level:
            return
        severity = logging.getLevelName(level)
        # Without the query, which may hold a key.
        path = request.path
        if path not in self._paths:
            path = self._clean(path or "-", _MAX_PATH)
        named = request.caller and not request.caller.startswith("#")
        address = self._address(request)
        now = datetime.datetime.now(_UTC)
        line = f"{request.method} {path} {status}"
        if seconds is not None:
            line += f" {seconds * 1000:.1f} ms"
        if why:
            line += f" {why}"
        ignored = request.notes.get(IGNORED, "")
        if ignored:
            ignored = self._clean(ignored, _MAX_IGNORED)
            line += f" ignored {ignored}"
        if not self._json:
            line = f"{_stamp(now)} {severity} {line} {size} bytes {address} {request.id}"
            _write(f"{line} key={request.caller}\n".encode() if named else f"{line}\n".encode())
            return
        http = {
            "requestMethod": request.method,
            "requestUrl": path,
            "status": status,
            "requestSize": str(request.length),
            "responseSize": str(size),
            "userAgent": self._clean(request.headers.get("user-agent", ""), _MAX_AGENT),
            "remoteIp": address,
            "protocol": f"HTTP/{request.version}",
        }
        if seconds is not None:
            http["latency"] = f"{seconds:.6f}s"
        fields: dict[str, object] = {"httpRequest": http, "requestId": request.id}
        if ignored:
            fields["ignoredFields"] = ignored
        if named:
            fields["keyName"] = request.caller
        if "traceparent" in request.headers or "x-cloud-trace-context" in request.headers:
            fields |= trace_fields(request.headers, self._project)
        _write(_entry(severity, line, now, fields) + b"\n")

    def _clean(self, sent: str, limit: int) -> str:
        """What a client sent, fit for a line: cut, escaped, and without any configured key."""
        for key in self._keys:
            if key in sent:
                return "***"  # before it is cut: a part of a key says much of it
        return escape(sent if len(sent) <= limit else sent[:limit] + "…")

    def _address(self, request: Request) -> str:
        if self._front_end:
            last = request.headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
            if _ADDRESS.fullmatch(last):
                return last
        return request.client
