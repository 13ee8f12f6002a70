"""Request and answer bodies, as types: what they say is what is accepted, and what /openapi.json
tells.

Unknown fields are refused in every dialect: a misspelt option must not pass, and nothing that is
sent is dropped silently.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType

Vector = list[float] | Annotated[str, msgspec.Meta(description="base64 of little-endian float32")]


class Request(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What all embedding calls take."""

    model: str | None = None  # absent: the default model
    prompt_name: str | None = None  # absent: the model's default prompt
    dimensions: int | None = None


class ChunkRequest(Request, kw_only=True):
    """What the native and OpenAI's calls take in addition."""

    chunks: bool | None = None
    encoding_format: Literal["float", "base64"] | None = None


class EmbedText(ChunkRequest):
    text: str


class EmbedTexts(ChunkRequest):
    texts: list[str]


class ChunkEmbedding(msgspec.Struct):
    """A piece of a text; its offsets are Unicode code points of the text as sent."""

    start: int
    end: int
    tokens: int
    embedding: Vector


class Embeddings(msgspec.Struct):
    """One vector; where asked for, the chunks of each text."""

    embeddings: list[Vector]
    chunks: list[list[ChunkEmbedding]] | UnsetType = UNSET


class BatchEmbeddings(msgspec.Struct):
    """A list of vectors a text; where asked for, the chunks of each text."""

    embeddings: list[list[Vector]]
    chunks: list[list[ChunkEmbedding]] | UnsetType = UNSET


# Probes


class Status(msgspec.Struct):
    status: Literal["ok", "loading"]


class Ready(msgspec.Struct):
    status: Literal["ready"]
    model: str
    supports_images: bool


# OpenAI


class OpenAIEmbedRequest(ChunkRequest):
    # Token ids are refused with advice: they are of another model's tokenizer.
    input: str | list[str | int | list[int]]
    user: str | None = None  # for OpenAI's own records; nothing here depends on it
    modality: Literal["text", "image"] | None = None


class OpenAIEmbedding(msgspec.Struct):
    object: Literal["embedding"]
    index: int
    embedding: Vector
    chunks: list[ChunkEmbedding] | UnsetType = UNSET


class OpenAIUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class OpenAIEmbeddings(msgspec.Struct):
    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage


class Certificate(msgspec.Struct):
    """How near the vectors of this engine at this precision are to sentence-transformers' own:
    cosines.
    """

    minimum: float
    mean: float
    cases: int  # vectors compared
    alone: float  # the smallest of texts that were computed alone
    threads: list[int]  # numbers of threads that computed
    measured: Literal["bake", "start"]


class OpenAIModel(msgspec.Struct):
    id: str  # the model's name, or an alias
    object: Literal["model"]
    created: int
    owned_by: str
    alias_of: str | None  # the model's name, for an alias
    prompt_name: str | None  # the prompt that an alias puts before texts
    fingerprint: str  # of the bundle: another one means other vectors
    dimensions: int  # of a vector, unless the request says otherwise
    max_dimensions: int
    max_tokens: int
    modalities: list[str]
    revision: str | None
    engine: str
    precision: str
    certificate: Certificate


class OpenAIModels(msgspec.Struct):
    object: Literal["list"]
    data: list[OpenAIModel]


# text-embeddings-inference, and the plain dialect that shares its /embed


class PlainRequest(Request):
    text: str


class _TEIOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    prompt_name: str | None = None
    truncate: bool | None = None
    # text-embeddings-inference documents Left and Right; its clients send left and right.
    truncation_direction: Literal["left", "right", "Left", "Right"] = "right"

    @property
    def side(self) -> Literal["left", "right"] | None:
        if not self.truncate:
            return None
        return "left" if self.truncation_direction in ("left", "Left") else "right"


class TEIEmbedRequest(_TEIOptions):
    inputs: str | list[str]
    normalize: bool = True
    dimensions: int | None = None
    model: str | None = None


class SimilarityInput(msgspec.Struct, forbid_unknown_fields=True):
    source_sentence: str
    sentences: list[str]


class SimilarityParameters(_TEIOptions):
    pass


class SimilarityRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    inputs: SimilarityInput
    parameters: SimilarityParameters | None = None
    model: str | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    inputs: str | list[str]
    add_special_tokens: bool = True
    prompt_name: str | None = None
    model: str | None = None


class Token(msgspec.Struct):
    """Offsets are code points of the text as sent; null for special tokens and a prompt's."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class EmbeddingModel(msgspec.Struct):
    pooling: str


class ModelType(msgspec.Struct):
    embedding: EmbeddingModel


class Info(msgspec.Struct):
    model_id: str
    fingerprint: str  # of the bundle; not in text-embeddings-inference
    model_sha: str | None
    model_dtype: str
    model_type: ModelType
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    engine: str  # this and the next are not in text-embeddings-inference
    instruction_set: str | None  # none where the engine does not tell


# Pictures


class ImageOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that all native calls for pictures take; prompts are for texts."""

    model: str | None = None
    dimensions: int | None = None


class EmbedImage(ImageOptions, forbid_unknown_fields=True):
    image: str  # base64 or a data URI


class EmbedImages(ImageOptions, forbid_unknown_fields=True):
    images: list[str]
