"""The service with three more routes, which raise errors and print, for tests of its log. It is
started instead of gunicorn: `serve(…, prefix=[python, failing_service.py])`.
"""

import logging
import os
import sys
import threading
import warnings

sys.path.insert(0, os.getcwd())

from flask import request  # noqa: E402
from gunicorn.app.wsgiapp import run  # noqa: E402

import main  # noqa: E402
from api.routes import CheckedFlask  # noqa: E402


class FailingApplication(main.Application):
    """The service, with three more routes."""

    def make_flask(self) -> CheckedFlask:
        app = super().make_flask()
        for view in (fail, fail_elsewhere, warn):
            app.add_url_rule(f"/{view.__name__}", view_func=view)
        return app


def fail() -> str:
    raise RuntimeError(f"first line\n2026-01-01 INFO forged {request.headers['X-API-Key']}")


def fail_elsewhere() -> str:
    thread = threading.Thread(target=lambda: 1 // 0)
    thread.start()
    thread.join()
    return "done"


def warn() -> str:
    warnings.warn("a warning", stacklevel=1)
    print("printed", "too", file=sys.stderr)
    logging.getLogger("some.library").warning("%d", "no number")
    logging.getLogger("some.library").warning("said\r\n\x1b[31mforged\u2028%s", "\ud800 é")
    return "done"


main.Application = FailingApplication  # type: ignore[misc]
sys.argv = ["gunicorn", "main:app"]
run()
