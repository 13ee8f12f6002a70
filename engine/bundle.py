"""The bundle, a folder that holds all that serving a model needs: read, written and checked here
and nowhere else.
"""

import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from engine.errors import BundleError, PrecisionUnavailable

FORMAT = 3
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
REPLACED = "replaced"  # .NAME.replaced: the earlier bundle, while the new one is moved in
PREPROCESSING = "preprocess.json"
TORCH_MODEL = "torch"  # folder with the model itself, in a bundle for engine/torch_engine
# NumPy archive with the sample of texts that the bake compared, for machines that it did not have:
# `ids` (int64, all texts' token ids, one after the other), `lengths` (int64, tokens of each text),
# `vectors` (float32, shape (texts, dimensions), sentence-transformers' own); and `pictures`, their
# vectors of bake/samples.py's pictures, where the model takes any.
SAMPLE = "sample.npz"
Modality = Literal["text", "image"]
Precision = Literal["fp32", "bf16", "int8", "fp16"]  # fp16: on GPUs only, see Torch
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
Backend = Literal["own engine", "OpenVINO", "torch"]
# What a bundle's engines give: a vector of a text or picture; one score of a query and a document;
# a score for each label of a text or a pair.
Task = Literal["embed", "rerank", "classify"]
ScoreActivation = Literal["sigmoid", "softmax", "none"]
# Smallest cosine to sentence-transformers' own vector at which a bundle may be written and served.
PARITY_FLOOR: dict[Precision, float] = {
    "fp32": 0.9999,
    "fp16": 0.9999,
    "bf16": 0.9998,
    "int8": 0.99,
}
# Smallest and mean cosine of a certificate with which PRECISION=auto takes int8.
TRUSTED = (0.9995, 0.9998)
# The same of scores: 1 less the difference from sentence-transformers' own score, as a share of
# `Scorer.spread`.
SCORE_FLOOR: dict[Precision, float] = {"fp32": 0.999, "fp16": 0.99, "bf16": 0.98, "int8": 0.9}
# Smallest rank correlation (Kendall's tau) of a reranker's scores with sentence-transformers' own.
TAU_FLOOR: dict[Precision, float] = {"fp32": 0.999, "fp16": 0.99, "bf16": 0.99, "int8": 0.95}
# Fields of a manifest that decide what vectors or scores a request gets.
_OF_VECTORS = (
    *("dimensions", "default_dimensions", "max_tokens", "normalized", "layer_norm", "prompts"),
    *("default_prompt", "encoder", "image_encoder", "torch", "task", "scorer"),
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def graph_file(modality: Modality, precision: Precision) -> str:
    """Name of the graph that a precision runs; its weights have the same name with .bin."""
    return f"{modality}-int8.xml" if precision == "int8" else f"{modality}.xml"


def weights_file(modality: Modality) -> str:
    """Name of the file of weights that our own engine reads, see engine/encoder/tensors.py."""
    return f"{modality}.safetensors"


class File(msgspec.Struct, forbid_unknown_fields=True):
    sha256: str
    size: int


class Probe(msgspec.Struct, forbid_unknown_fields=True):
    """A text and sentence-transformers' vector of it, which the loaded bundle has to give again. Of
    a scorer: the second text of a pair, and its raw scores.
    """

    text: str
    vector: list[float]
    first: str | None = None  # text of the pair; None for a text alone


class Parity(msgspec.Struct, forbid_unknown_fields=True):
    """A certificate: the cosine of an engine's vectors to sentence-transformers' own; of a scorer,
    how near its scores are, as SCORE_FLOOR says.
    """

    minimum: float
    mean: float
    cases: int  # vectors compared: of inputs in company, and of some alone
    alone: float  # the smallest of inputs that were alone
    threads: list[int]  # numbers of threads that computed
    # Of each text's ten nearest others by the model's own vectors, the share that is still nearest
    # when the text's vector is the engine's: what a search would find. None where few were
    # compared.
    nearest: float | None = None
    tau: float | None = None  # of a reranker: the rank correlation of its scores

    @property
    def trusted(self) -> bool:
        """Whether PRECISION=auto may take an engine with it at int8."""
        return self.minimum >= TRUSTED[0] and self.mean >= TRUSTED[1]


class Preprocessing(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How a picture becomes the image graph's input, as in the model's own processor: to RGB,
    resized, cropped at the centre (padded with black where it is smaller), rescaled, normalised.
    """

    resize: int | tuple[int, int]  # the shorter side, keeping the shape; or (height, width)
    crop: tuple[int, int] | None  # height, width
    resampling: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
    scale: float  # of a pixel's 0 to 255
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    # The cost of a picture in tokens of the text tower: its positions (patches and class token),
    # times the ratio of the towers' cost for one position.
    tokens: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the image graph's input."""
        if self.crop is not None:
            return self.crop
        return self.resize if isinstance(self.resize, tuple) else (self.resize, self.resize)

    def normalize(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Args:
            pixels: shape (pictures, height, width, 3).

        Returns: the image graph's input, shape (pictures, 3, height, width).
        """
        std = np.array(self.std, np.float64)
        factor = (self.scale / std).astype(np.float32)
        shift = (np.array(self.mean, np.float64) / std).astype(np.float32)
        moved = pixels.transpose(0, 3, 1, 2)
        result = np.empty(moved.shape, np.float32)
        np.multiply(moved, factor[:, None, None], out=result)
        result -= shift[:, None, None]
        return result


Pooled = Literal["mean", "first", "last", "first of"]
Activation = Literal["gelu", "tanh gelu", "quick gelu", "relu", "silu"]


class Sight(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How far a token of a layer sees, itself not counted; None: all."""

    behind: int | None = None
    ahead: int | None = None


class Encoder(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A tower for engine/encoder. Its weights are in `weights_file`, by the names that
    bake/encoder.py gives them.
    """

    hidden: int
    heads: int
    inner: int
    layers: int
    epsilon: float  # of layer norms
    vocabulary: int  # 0 in a tower of pictures
    first_position: int = 0  # of a text's first token
    # RoBERTa: the padding token has the position of its own id, wherever it is in a text, and is
    # not counted.
    pad: int | None = None
    # Of a tower of pictures: the pixels of a patch's side, and patches side by side. A class token
    # comes before the patches.
    patch: int = 0
    across: int = 0
    outputs: int = 0  # numbers that a linear layer makes of the pooled vector; 0 without it
    activation: Activation = "gelu"
    norm_embeddings: bool = True
    # Layers norm their inputs, and the last one's output is normed; else they norm their sums with
    # their outputs.
    norm_before: bool = False
    norm_first: bool = True  # the first layer does, too: else its input is normed embeddings
    rms: bool = False  # norms do not subtract the mean
    gated: bool = False  # what is activated is multiplied with as many other products
    key_heads: int  # of keys and values: each serves heads / key_heads heads of queries
    head: int  # numbers of one
    positions: bool = True  # embeddings of positions
    # Queries and keys are turned by angles that depend on their positions: a name for each layer,
    # of a table of angles. Empty where they are not.
    angles: tuple[str, ...] = ()
    norm_heads: bool = False  # queries and keys are normed before they are turned
    sights: tuple[Sight, ...]  # of each layer
    # Of a text's vectors: their mean, the first, the last, or that of the first token `pooled`.
    pooling: Pooled
    pooled: int = -1
    # Something is added to a score for the distance from the query to the key.
    distances: bool = False


class Torch(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A bundle for engine/torch_engine: it holds the model itself, as sentence-transformers saves
    it, in the folder TORCH_MODEL, and SAMPLE.
    """

    # The model brings Python code of its own. The bake was told to trust it, and serving runs it.
    code: bool
    # Texts of different lengths may be computed side by side without padding: the model gave the
    # same vectors so.
    packed: bool
    # Each text is computed without others beside it: padding would change its vector.
    alone: bool = False


class Scorer(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What a bundle that gives scores has beside one that gives vectors. Its engines give raw
    scores, one for each label: `dimensions` is the number of labels.
    """

    labels: list[str]  # names, in the order of the scores
    activation: ScoreActivation  # what the model itself makes of raw scores
    types: bool  # the graph takes token types, which tell the two texts of a pair apart
    # Largest raw score of the bake's sample less the smallest, of the label that has most of it.
    spread: float


class Manifest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A bundle's description of itself: written by the bake, read by serving."""

    format: int = FORMAT
    name: str
    source: str
    revision: str | None
    created: str  # ISO 8601, UTC
    task: Task = "embed"
    modalities: list[Modality]
    dimensions: int  # of the engines' vectors
    # What a request without `dimensions` gets of them (truncate_dim in the model's configuration);
    # None: all.
    default_dimensions: int | None = None
    max_tokens: int
    normalized: bool  # the model's pipeline ends in Normalize; the graph ends before it
    # Matryoshka models such as nomic-embed-text-v1.5 need a layer norm before `dimensions` cuts.
    layer_norm: bool = False
    similarity: str | None
    prompts: dict[str, str]
    default_prompt: str | None
    files: dict[str, File]
    versions: dict[str, str]
    probe: Probe
    # Those that may be served. An engine that has one of them neither in `parity` nor in `left_out`
    # was not measured at it, because the CPU of the bake cannot run it. A service that uses it
    # measures it at every start.
    precisions: list[Precision] = msgspec.field(default_factory=lambda: list(PRECISIONS))
    parity: dict[Backend, dict[Precision, Parity]]
    left_out: dict[Backend, dict[Precision, str]] = {}  # what is not served, and why
    # Of a model that takes pictures: `parity` over pictures, and the vector of
    # `image_embeddings.probe_picture()`.
    image_parity: dict[Backend, dict[Precision, Parity]] = {}
    image_probe: list[float] | None = None
    # Our own engine runs all of a bundle's modalities, or none.
    encoder: Encoder | None = None
    image_encoder: Encoder | None = None
    torch: Torch | None = None
    scorer: Scorer | None = None  # of the tasks rerank and classify

    @property
    def size(self) -> int:
        """Dimensions of the vector that a request without `dimensions` gets."""
        return self.default_dimensions or self.dimensions


class Bundle(msgspec.Struct, frozen=True):
    path: pathlib.Path
    manifest: Manifest

    def file(self, name: str) -> pathlib.Path:
        return self.path / name

    def fingerprint(self) -> str:
        """12 hex digits that are the same for bundles which give the same vectors: made of the
        files' sha256 (weights, tokenizer, pooling) and of what the manifest says of vectors. A bake
        on another day, or a copy elsewhere, does not change it.
        """
        files = {name: file.sha256 for name, file in self.manifest.files.items() if name != SAMPLE}
        said = {key: value for key, value in _said(self.manifest).items() if key in _OF_VECTORS}
        content = msgspec.json.encode((files, said), order="sorted")
        return hashlib.sha256(content).hexdigest()[:12]

    def record(self, names: Iterable[str]) -> None:
        """Enter files that are there in the manifest, by their paths below the bundle's."""
        self.manifest.files |= {name: fingerprint(self.path / name) for name in names}

    def backends(self, precision: Precision) -> list[Backend]:
        """The engines that may serve the bundle's texts at `precision`, and its pictures: those
        that the bake certified, and those that its CPU could not run.
        """
        manifest, candidates = self.manifest, list[Backend]()
        if manifest.torch:
            candidates.append("torch")
        if manifest.encoder:
            candidates.append("own engine")
        if all(graph_file(each, precision) in manifest.files for each in manifest.modalities):
            candidates.append("OpenVINO")
        return [
            each
            for each in candidates
            if precision in manifest.precisions and precision not in manifest.left_out.get(each, {})
        ]

    def offers(self, precision: Precision) -> bool:
        """Whether an engine may serve the bundle at `precision`."""
        return bool(self.backends(precision))

    def refusal(self, backend: Backend, precision: Precision) -> PrecisionUnavailable:
        """Why an engine that is not among `backends` may not serve it."""
        why = self.manifest.left_out.get(backend, {}).get(precision)
        return PrecisionUnavailable(
            f"PRECISION={precision}, but bundle {self.manifest.name} was baked without it"
            + (f" for {backend}: {why}" if why else "; bake it again")
        )

    def preprocessing(self) -> Preprocessing:
        """How this model's pictures are prepared.

        Raises: BundleError when that is missing or damaged.
        """
        try:
            raw = self.file(PREPROCESSING).read_bytes()
            return msgspec.json.decode(raw, type=Preprocessing)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BundleError(
                f"bundle {self.path}: {PREPROCESSING} cannot be read ({error}); bake it again"
            ) from None

    def verify(self) -> None:
        """Compare every file with the manifest (2 GB/s here).

        Raises: BundleError, naming the first file that is missing or differs.
        """
        for name, expected in self.manifest.files.items():
            try:
                actual = fingerprint(self.path / name)
            except OSError as error:
                raise BundleError(
                    f"bundle {self.path}: {name} is missing ({error.strerror}); bake it again"
                ) from None
            if actual != expected:
                raise BundleError(
                    f"bundle {self.path}: {name} is damaged (its sha256 differs; it has "
                    f"{actual.size} of {expected.size} bytes); bake it again"
                )


def _said(struct: msgspec.Struct) -> dict[str, Any]:
    """The fields of a struct, and of those in it, that are not at their defaults: what a later
    version adds with a default changes nothing.
    """
    return {
        field.name: _said(value) if isinstance(value, msgspec.Struct) else value
        for field in msgspec.structs.fields(struct)
        if (value := getattr(struct, field.name)) != field.default
    }


def fingerprint(path: pathlib.Path) -> File:
    """A file's sha256 and size, as the manifest records them."""
    with path.open("rb") as file:
        return File(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def read(path: pathlib.Path) -> Bundle:
    """Read a bundle's manifest. Files are not opened yet: see `Bundle.verify`.

    Raises: BundleError when there is no manifest, or one that this code cannot read.
    """
    try:
        raw = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(f"bundle {path}: no readable {MANIFEST} ({error.strerror})") from None
    try:
        version = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("format")
        if version is not None and bytes(version) != str(FORMAT).encode():
            raise BundleError(
                f"bundle {path}: format {bytes(version).decode()} is not {FORMAT}: it was baked by "
                "another version of this service; bake it again"
            )
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(
            f"bundle {path}: {MANIFEST} is damaged ({error}); bake it again"
        ) from None
    parts = {name: pathlib.PurePosixPath(name).parts for name in manifest.files}
    escaping = [name for name in parts if name[:1] == "/" or ".." in parts[name] or not parts[name]]
    if escaping:
        raise BundleError(
            f"bundle {path}: {MANIFEST} names a file outside the bundle: {escaping[0]!r}"
        )
    return Bundle(path, manifest)


def discover(models_dir: pathlib.Path) -> list[Bundle]:
    """All bundles in a folder, in the order of their baking. Hidden folders (unfinished bundles)
    are left out.

    Raises: BundleError when there is none, or one of them cannot be read.
    """
    try:
        folders = [
            entry
            for entry in models_dir.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        ]
    except OSError as error:
        raise BundleError(
            f"MODELS_DIR {models_dir}: {error.strerror}; bake a model first"
        ) from None
    if not folders:
        raise BundleError(f"MODELS_DIR {models_dir}: holds no bundle; bake a model first")
    bundles = sorted(
        map(read, folders), key=lambda bundle: (bundle.manifest.created, bundle.manifest.name)
    )
    names = [bundle.manifest.name for bundle in bundles]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise BundleError(f"MODELS_DIR {models_dir}: two bundles are called {twice!r}")
    return bundles


def valid_name(name: str) -> bool:
    """Whether a bundle may have this name: letters, digits, dot, dash and underscore, the first a
    letter or digit.
    """
    return _NAME.fullmatch(name) is not None


def write(models_dir: pathlib.Path, name: str, fill: Callable[[pathlib.Path], Manifest]) -> Bundle:
    """Let `fill` make the bundle in a hidden folder beside its final place, then rename it.

    After an exception, and if the process is killed, only an earlier bundle of this name is left.
    The next `write` of this name mends what a machine that lost its power left behind.
    """
    new = not models_dir.exists()
    models_dir.mkdir(parents=True, exist_ok=True)
    clear(models_dir, name)
    target, prefix = models_dir / name, f".{name}."
    try:
        draft = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=models_dir))
        with _watched(draft, target, models_dir / f"{prefix}{REPLACED}"):
            manifest = fill(draft)
            content = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
            (draft / MANIFEST).write_bytes(content)
            for path in draft.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            # mkdtemp's 0700 would hide the bundle from the user the service runs as.
            draft.chmod(0o755)
            if target.exists():
                os.rename(target, models_dir / f"{prefix}{REPLACED}")
            os.rename(draft, target)
    finally:
        clear(models_dir, name)
        if new:
            with contextlib.suppress(OSError):  # it holds bundles
                models_dir.rmdir()
    return Bundle(target, manifest)


@contextlib.contextmanager
def _watched(draft: pathlib.Path, target: pathlib.Path, replaced: pathlib.Path) -> Iterator[None]:
    """Clear up as `clear` does also if this process is killed: by another, which sees its end."""
    paths = [str(path.absolute()) for path in (draft, target, replaced)]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(
        ["sh", "-c", _CLEAR, "sh", *paths], stdin=subprocess.PIPE, start_new_session=True, **quiet
    ) as watcher:
        try:
            yield
        finally:
            watcher.communicate(b"done\n")


_CLEAR = """
read -r done && exit
rm -rf "$1"
if [ -e "$2" ]; then rm -rf "$3"; elif [ -e "$3" ]; then mv "$3" "$2"; fi
"""


def clear(models_dir: pathlib.Path, name: str) -> None:
    """Remove the files of an unfinished `write` of this name. An earlier bundle that it had moved
    aside is moved back.
    """
    target, prefix = models_dir / name, f".{name}."
    replaced = models_dir / f"{prefix}{REPLACED}"
    if replaced.exists() and not target.exists():
        os.rename(replaced, target)
    for draft in models_dir.glob(f"{prefix}*"):
        if "." not in draft.name.removeprefix(prefix):  # else of a bundle whose name begins so
            shutil.rmtree(draft, ignore_errors=True)
