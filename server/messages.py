"""What the server and the application say to each other: requests, responses, and refusals."""

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote

OWN = "warm-up"  # the `client` of the worker's own requests, which are not counted or logged


class HttpError(Exception):
    """A request that fails in HTTP's own terms. The application writes it in the client's dialect.

    `field` names the part of the request's body that is wrong. `reason` is what the metrics count
    where the status does not tell.
    """

    def __init__(
        self,
        status: int,
        error_type: str,
        message: str,
        *,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.error_type, self.field = status, error_type, field
        self.headers, self.reason = headers or {}, reason


@dataclass(slots=True)
class Request:
    """A request that has arrived in full, or that broke off (`refuse` gets those)."""

    method: str = "-"
    target: str = ""  # as sent, in origin form
    path: str = ""  # the target's, percent-decoded
    version: str = "1.1"
    headers: dict[str, str] = field(default_factory=dict)  # names in lower case
    body: bytes | bytearray = b""
    length: int = 0  # bytes of the body; over `Limits.max_body` the body is not read
    client: str = "-"  # address
    arrived: float = 0.0  # `time.perf_counter` at its last byte
    keep_alive: bool = False  # whether the client wants the connection kept
    id: str = ""  # of this request, set by the application
    caller: str | None = None  # name of its API key, set by the application once it is checked
    refused: str | None = None  # what the metrics count where the status does not tell
    # Headers for its response that the application's views set while they work on it.
    notes: dict[str, str] = field(default_factory=dict)
    trace: Any = None  # of api/traces.py
    # Whether the client has closed the connection, so that nobody waits for a response.
    gone: Callable[[], bool] = lambda: False

    @property
    def query(self) -> str:
        """What follows the first question mark of the target, as sent."""
        return self.target.partition("?")[2]

    @property
    def media_type(self) -> str:
        """Content-Type without its parameters, in lower case; empty when there is none."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


def decoded_path(target: str) -> str:
    """The path of a request target, percent-decoded."""
    path = target.partition("?")[0]
    return unquote(path, errors="replace") if "%" in path else path


@dataclass(slots=True)
class Response:
    """A response. The server adds Server, Date, Connection and Content-Length."""

    body: bytes = b""
    status: int = 200
    content_type: str = "application/json"
    headers: list[tuple[str, str]] = field(default_factory=list)


# The request that the calling task or thread works on; set by the application.
current: ContextVar[Request] = ContextVar("current")


class Loop(Protocol):
    """What the application may ask of the event loop, in the loop's thread."""

    def call_soon(self, call: Callable[[], None]) -> object:
        """Make a call in the next turn of the loop."""

    def when_readable(self, file: int, call: Callable[[], None]) -> None:
        """Make a call whenever a file descriptor is readable."""

    def busy_threads(self) -> int:
        """How many calls run in threads (`server.tasks.in_thread`)."""


class Application(Protocol):
    """What the worker serves. All but `respond` is called in the event loop's thread and may not
    wait; `respond` runs as a task (server/tasks.py) and may."""

    def start(self, workers: int, loop: "Loop") -> None:
        """Begin to load, after the fork; `workers` processes share the machine."""

    def respond(self, request: Request) -> Response:
        """Answer a request. Raises nothing."""

    def refuse(self, request: Request, error: HttpError) -> Response:
        """Write an error that the server found; the request may be incomplete."""

    def sent(self, request: Request, response: Response, error: HttpError | None) -> None:
        """A response has been handed to the connection; `error` if it came from `refuse`."""

    def dropped(self, request: Request) -> None:
        """`respond` has returned after `refuse` had answered the request."""

    def warm_up(self) -> Iterable[bytes]:
        """Requests to send to itself before the service is ready."""

    def tick(self) -> None:
        """Called about once a second."""

    def stop(self) -> None:
        """Time is short: end what still waits."""

    def close(self) -> None:
        """All is answered: end the threads."""
