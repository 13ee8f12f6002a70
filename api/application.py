"""Flask, without what this service has no use for and every request would pay for."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from flask import Flask, Request, Response
from werkzeug.routing import MapAdapter

# WSGI's environ of the request that the calling task or thread works on: what views read, since
# api/worker.py calls some of them without Flask.
current: ContextVar[dict[str, Any]] = ContextVar("current")
# Further keys of an environ: where the inputs stand in the body, `{}` for their index, for errors;
# what answers the body of any request with the same head.
INPUT_PATH = "embedder.input_path"
DIRECT = "embedder.direct"
LOADING = "embedder.loading"  # whether the request's model was still to be loaded when it came
Direct = Callable[[], bytes]


class Application(Flask):
    """Routes know no host, and nothing builds URLs; there are no sessions and no signals."""

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """What finds a request's route. Flask would make another one for each application context,
        and look at the request's Host.
        """
        if request is None:
            return None
        return MapAdapter(self.url_map, "", "/", "", "http", request.path, request.method)

    def full_dispatch_request(self) -> Response:
        """What is asked before every request, the view, and the handlers of its errors."""
        try:
            answer = self.preprocess_request() or self.dispatch_request()
        except Exception as error:
            answer = self.handle_user_exception(error)
        return self.make_response(answer)

    def answer_error(self, environ: dict[str, Any], error: Exception) -> Response:
        """What a view is answered with that raised `error` outside of Flask."""
        with self.request_context(environ):
            return self.make_response(self.handle_user_exception(error))
