"""What can go wrong below HTTP. `api/errors.py` alone knows which status each of these becomes."""


class EmbedderError(Exception):
    """Base of everything the service raises on purpose; `str(error)` is meant for the caller's
    eyes.
    """


class InvalidInput(EmbedderError):
    """The caller sent something that cannot be embedded.

    `field` is the request's option that is wrong, such as "dimensions". None means the inputs: the
    one at `index` in the list that was sent, or all of them together where that is None too.
    """

    def __init__(self, message: str, index: int | None = None, *, field: str | None = None) -> None:
        super().__init__(message)
        self.index, self.field = index, field


class InputTooLarge(InvalidInput):
    """An input, or all of them together, passes a limit on bytes or tokens."""


class ModelNotFound(EmbedderError):
    """No model of this name is served here. `field` is the request's option that named it."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ModelNotReady(EmbedderError):
    """The model was still loading when the request's time ran out."""


class ModalityNotSupported(EmbedderError):
    """The model does not take what was sent: a picture, for a model of texts."""


class QueueFull(EmbedderError):
    """More work waits than MAX_QUEUE_TOKENS allows; `retry_after` says in how many seconds to come
    back.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(EmbedderError):
    """The request waited longer than REQUEST_TIMEOUT."""


class CallerGone(EmbedderError):
    """Nobody waits for this request's answer any more; what of it was not computed is left out."""


class ShuttingDown(EmbedderError):
    """The service ends before this request's turn would have come."""


class EngineFailed(EmbedderError):
    """The engine raised while it computed a batch that held this request's input."""


class BundleError(EmbedderError):
    """A bundle is missing, damaged, or of a version this code does not read."""


class PrecisionUnavailable(EmbedderError):
    """This CPU, or this bundle, cannot run the precision that was asked for."""
