"""What the dialects share: a model is found, waited for and used within a request's time."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar

from embeddings import TextEmbedder, TextEmbedding
from engine.bundle import Task
from engine.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModalityNotSupported,
    ModelNotFound,
    ModelNotReady,
    TaskNotSupported,
)
from engine.models import Models, Target
from scores import Pair, TextScorer, TextScores
from server.messages import current
from server.tasks import in_thread

if TYPE_CHECKING:  # main.py imports Pillow only for a model that takes pictures
    from image_embeddings import ImageEmbedder, ImageEmbedding

T = TypeVar("T")


TextModel = TextEmbedder | TextScorer


class Embedders(NamedTuple):
    """What a loaded model embeds or scores with: `texts` for the task embed, else `scores`."""

    texts: TextEmbedder | None
    images: "ImageEmbedder | None"
    scores: TextScorer | None = None

    @property
    def model(self) -> TextModel:
        found = self.texts or self.scores
        assert found
        return found

    @property
    def embedder(self) -> TextEmbedder:
        """Of a model whose task is embed."""
        assert self.texts
        return self.texts

    @property
    def scorer(self) -> TextScorer:
        """Of a model whose task is another."""
        assert self.scores
        return self.scores


class Waiting(TypedDict):
    """How long a request waits: what every embedder's `embed` takes."""

    deadline: float  # on the clock of `time.monotonic`
    gone: Callable[[], bool]  # whether its client has closed the connection
    tenant: str | None  # the name of its key, with whose requests it shares


def note_truncated(texts: int) -> None:
    """Tell the client how many texts of its request were cut: the header X-Truncated."""
    notes = current.get().notes
    notes["X-Truncated"] = str(int(notes.get("X-Truncated", 0)) + texts)


class Service:
    """The models as a request sees them."""

    def __init__(self, models: Models[Embedders], timeout: float) -> None:
        """`timeout`: seconds that a request may wait."""
        self.models, self._timeout = models, timeout

    def embedder(self, model: str | None) -> TextEmbedder:
        """A model that embeds, as `resolve` finds it. Waits until it is loaded.

        Raises: ModelNotFound, TaskNotSupported, ModelNotReady.
        """
        target = self.resolve(model, "embed")
        return self.models.wait(target, time.monotonic() + self._timeout).embedder

    def embedders(self, targets: Iterable[Target]) -> list[tuple[Target, TextModel]]:
        """Several models, each with what it embeds or scores texts with. Waits until all are
        loaded, within one request's time.

        Raises: ModelNotReady.
        """
        deadline = time.monotonic() + self._timeout
        return [(target, self.models.wait(target, deadline).model) for target in targets]

    def task(self, model: str | None) -> Task | None:
        """The task of a model; None for one that is not here."""
        try:
            return self.models.bundle(model).manifest.task
        except ModelNotFound:
            return None

    def resolve(self, model: str | None, *tasks: Task) -> Target:
        """A model for one of `tasks`. For None, the default model if it has such a task, else the
        only model that has.

        Raises: ModelNotFound; TaskNotSupported.
        """
        target = self.models.resolve(model)
        manifest = target.bundle.manifest
        if manifest.task in tasks:
            return target
        bundles = self.models.bundles.items()
        able = [name for name, bundle in bundles if bundle.manifest.task in tasks]
        if model is None and len(able) == 1:
            return self.models.resolve(able[0])
        can = f"name one that can in `model`: {', '.join(sorted(able))}"
        if not able:
            can = "no model here can: bake one and serve it too (docs/models.md)"
        wanted = " or ".join(tasks)
        raise TaskNotSupported(
            f"this route is for models of the task {wanted}, and model {manifest.name} is for "
            f"{manifest.task}; {can}"
        )

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        name: str,
        model: str | None,
        **options: Any,
    ) -> tuple[TextScorer, list[TextScores]]:
        """Score documents for a query.

        Args:
            name: where the documents stand in the body, for errors.
            options: further ones, as `TextScorer.rerank` takes them.

        Raises: as `resolve` and `run` do.
        """
        target = self.resolve(model, "rerank")

        def call(embedders: Embedders, waiting: Waiting) -> tuple[TextScorer, list[TextScores]]:
            scorer = embedders.scorer
            return scorer, scorer.rerank(query, documents, **waiting, **options)

        return self.run(target, f"$.{name}[{{}}]", call)

    def score(
        self,
        inputs: Sequence[str | Pair],
        path: str,
        model: str | None,
        *tasks: Task,
        **options: Any,
    ) -> tuple[TextScorer, list[TextScores]]:
        """Score texts and pairs with a model for one of `tasks`.

        Args:
            path: where the inputs stand in the body, `{}` for their index, for errors.
            options: further ones, as `TextScorer.score` takes them.

        Raises: as `resolve` and `run` do.
        """
        target = self.resolve(model, *tasks)

        def call(embedders: Embedders, waiting: Waiting) -> tuple[TextScorer, list[TextScores]]:
            scorer = embedders.scorer
            return scorer, scorer.score(inputs, **waiting, **options)

        return self.run(target, path, call)

    @staticmethod
    def prompt(target: Target, prompt_name: str | None) -> str | None:
        """The prompt's name for a request: the one of its model's alias, or `prompt_name`.

        Raises: InvalidInput when both name one and they differ.
        """
        if target.prompt is None or prompt_name in (None, target.prompt):
            return target.prompt or prompt_name
        raise InvalidInput(
            f"prompt_name is {prompt_name!r}, but model {target.asked!r} is an alias with the "
            f"prompt {target.prompt!r}; leave prompt_name out, or ask for model "
            f"{target.bundle.manifest.name!r}",
            field="prompt_name",
        )

    def embed_texts(
        self,
        sent: str | Sequence[str],
        name: str,
        model: str | None,
        *,
        prompt_name: str | None = None,
        loaded: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> tuple[TextEmbedder, list[TextEmbedding]]:
        """Embed the text or the texts of a request.

        Args:
            name: where they stand in the body, for errors, such as "input".
            prompt_name: what the request names; an alias may carry one.
            loaded: called once the model is there.
            options: further ones, as `TextEmbedder.embed` takes them.

        Raises: ModelNotFound, and what `prompt` and `run` raise, with the text's place in the
        message.
        """
        texts, path = ([sent], f"$.{name}") if isinstance(sent, str) else (sent, f"$.{name}[{{}}]")
        target = self.resolve(model, "embed")
        options["prompt_name"] = self.prompt(target, prompt_name)

        def embed(
            embedders: Embedders, waiting: Waiting
        ) -> tuple[TextEmbedder, list[TextEmbedding]]:
            loaded()
            return embedders.embedder, embedders.embedder.embed(texts, **waiting, **options)

        return self.run(target, path, embed)

    def embed_images(
        self, images: Sequence[bytes], path: str, model: str | None, dimensions: int | None
    ) -> "tuple[ImageEmbedder, list[ImageEmbedding]]":
        """Embed pictures, in a thread: one of few bytes may have many pixels.

        Args:
            path: where they stand in the body, `{}` for their index, for errors.

        Raises: what `ImageEmbedder.embed` raises, with the picture's place in the message;
        ModalityNotSupported for a model that takes texts only.
        """
        target = self.require_images(model)

        def embed(
            embedders: Embedders, waiting: Waiting
        ) -> "tuple[ImageEmbedder, list[ImageEmbedding]]":
            assert (embedder := embedders.images)  # its manifest says so
            return embedder, in_thread(
                lambda: embedder.embed(images, **waiting, dimensions=dimensions), waiting["tenant"]
            )

        return self.run(target, path, embed)

    def require_images(self, model: str | None) -> Target:
        """A model that takes pictures.

        Raises: ModelNotFound; ModalityNotSupported for a model that takes texts only.
        """
        target = self.models.resolve(model)
        manifest = target.bundle.manifest
        if "image" not in manifest.modalities:
            raise ModalityNotSupported(
                f"model {manifest.name} takes texts only; for pictures bake and serve a multimodal "
                "one, such as clip-ViT-B-32 (`make run MODEL=clip-ViT-B-32`; docs/models.md has "
                "more)"
            )
        return target

    def run(self, target: Target, path: str, call: Callable[[Embedders, Waiting], T]) -> T:
        """Wait for a model and call it, both within the request's time. The response gets the
        header X-Model: the model's name and its bundle's fingerprint.

        Args:
            path: where the inputs stand in the body, `{}` for their index, for errors.

        Raises: ModelNotReady, and what `call` raises.
        """
        request = current.get()
        request.notes["X-Model"] = target.version
        loading = not self.models.loaded(target)
        deadline = time.monotonic() + self._timeout
        embedders = self.models.wait(target, deadline)
        waiting: Waiting = {"deadline": deadline, "gone": request.gone, "tenant": request.caller}
        try:
            return call(embedders, waiting)
        except InvalidInput as error:
            raise error.at(path) from None
        except DeadlineExceeded:
            if loading:  # it timed out while the model was loading: worth another try
                message = "the model was still loading when this request came"
                raise ModelNotReady(message) from None
            raise
