"""Flask, without what this service has no use for and every request would pay for."""

from flask import Flask, Request, Response
from werkzeug.routing import MapAdapter


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
