"""Errors in the domain's terms. Only `api/errors.py` knows the HTTP status of each."""


class EmbedderError(Exception):
    """Base class of what the service raises on purpose; `str(error)` is written for the caller.

    `field` names the option of the request that is wrong, where it is one.
    """

    field: str | None = None


class InvalidInput(EmbedderError):
    """The caller sent something that cannot be embedded.

    `field` is the request's option that is wrong, such as "dimensions". None means the inputs: the
    one at `index` in the list that was sent, or all of them together where that is None too.
    """

    def __init__(self, message: str, index: int | None = None, *, field: str | None = None) -> None:
        super().__init__(message)
        self.index, self.field = index, field

    def at(self, path: str) -> "InvalidInput":
        """The same error, with the place of the inputs.

        Args:
            path: where the inputs stand in the request's body, `{}` for their index, such as
                "$.texts[{}]".
        """
        if self.field is not None:
            return self
        message = str(self) if self.index is None else f"{path.format(self.index)}: {self}"
        return type(self)(message, self.index, field=path.removeprefix("$.").partition("[")[0])


class InputTooLarge(InvalidInput):
    """An input, or the request, is over a limit on bytes or tokens."""


class ModelNotFound(EmbedderError):
    """No model of this name is served here. `field` is the request's option that named it."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class WrongAlias(EmbedderError):
    """An alias of MODEL_ALIASES that cannot mean anything: its model or its prompt is not there, or
    it is the name of a model.
    """


class ModelNotReady(EmbedderError):
    """The model was still loading at the request's deadline."""


class ModalityNotSupported(EmbedderError):
    """The model does not take this kind of input, such as a picture for a text model."""


class TaskNotSupported(EmbedderError):
    """The model is for another task, such as a reranker that is asked for a vector."""


class QueueFull(EmbedderError):
    """The queue is over its limit. `retry_after`: seconds after which to send the request again."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OverQuota(QueueFull):
    """The tenant has used what it may (KEY_LIMITS)."""


class DeadlineExceeded(EmbedderError):
    """The request waited longer than REQUEST_TIMEOUT."""


class CallerGone(EmbedderError):
    """The client has closed its connection; the rest of its request is not computed."""


class ShuttingDown(EmbedderError):
    """The service shuts down before the request was computed."""


class EngineFailed(EmbedderError):
    """The engine failed on a batch with an input of this request."""


class BundleError(EmbedderError):
    """A bundle is missing, damaged, or of a version this code does not read."""


class PrecisionUnavailable(EmbedderError):
    """This CPU, or this bundle, cannot run the precision that was asked for."""


class DeviceUnavailable(EmbedderError):
    """This machine, or this bundle, cannot serve on the device that was asked for."""
