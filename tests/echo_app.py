"""An application that echoes each request as JSON, for tests of the server alone."""

import base64
import json
from collections.abc import Iterable

from server.messages import HttpError, Loop, Request, Response


class Echo:
    """Implements `server.messages.Application`."""

    def __call__(self) -> None:
        """gunicorn demands that an application can be called; the worker does not call it."""

    def start(self, workers: int, loop: Loop) -> None: ...

    def respond(self, request: Request) -> Response:
        if request.length > len(request.body):  # over the limit, and so not read
            return self.refuse(request, HttpError(413, "too_large", "the body is too large"))
        echo = {
            "method": request.method,
            "target": request.target,
            "body": base64.b64encode(request.body).decode(),
        }
        return Response(json.dumps(echo).encode())

    def refuse(self, request: Request, error: HttpError) -> Response:
        body = json.dumps({"error": str(error), "error_type": error.error_type}).encode()
        return Response(body, error.status, headers=list(error.headers.items()))

    def sent(self, request: Request, response: Response, error: HttpError | None) -> None: ...

    def dropped(self, request: Request) -> None: ...

    def warm_up(self) -> Iterable[bytes]:
        return ()

    def tick(self) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


app = Echo()
