"""Request and answer bodies, as types: what they say is what is accepted, and what /openapi.json
tells.

The native routes refuse unknown fields (`forbid_unknown_fields`): a misspelt option must not pass.
The dialects of other servers take what those take: a field that is known there and has no effect
here is a field here too; what is unknown is ignored, and the response names it.

Every optional field may be null, which means absent.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from api.fields import fill

Vector = list[float] | Annotated[str, msgspec.Meta(description="base64 of little-endian float32")]

# Which route takes inputs under which name, for whoever sends them to another one.
INPUTS = {
    "text": "/embeddings",
    "texts": "/embeddings/batch",
    "image": "/embeddings/image",
    "images": "/embeddings/image/batch",
    "input": "/v1/embeddings",
    "inputs": "/embed",
    "documents": "/rerank",
}


class Request(msgspec.Struct, kw_only=True):
    """What all embedding calls take."""

    model: str | None = None  # absent: the default model
    prompt_name: str | None = None  # absent: the model's default prompt
    dimensions: int | None = None


class ChunkRequest(Request, kw_only=True):
    """What the native and OpenAI's calls take in addition."""

    chunks: bool | None = None
    encoding_format: Literal["float", "base64"] | None = None


class EmbedText(ChunkRequest, forbid_unknown_fields=True):
    text: str


class EmbedTexts(ChunkRequest, forbid_unknown_fields=True):
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
    # Token ids stand for text where OPENAI_TOKEN_IDS takes them, else are refused with advice.
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
    cosines. Of scores: 1 less the difference, as a share of the scores' spread.
    """

    minimum: float
    mean: float
    cases: int  # vectors or scores compared
    alone: float  # the smallest of texts that were computed alone
    threads: list[int]  # numbers of threads that computed
    # The share of each text's ten nearest others, by the model's own vectors, that stays so.
    nearest: float | None
    measured: Literal["bake", "start"]
    # Only of a reranker: Kendall's tau of its scores with sentence-transformers' own.
    tau: float | UnsetType = UNSET


class OpenAIModel(msgspec.Struct):
    id: str  # the model's name, or an alias
    object: Literal["model"]
    created: int
    owned_by: str
    alias_of: str | None  # the model's name, for an alias
    prompt_name: str | None  # the prompt that an alias puts before texts
    fingerprint: str  # of the bundle: another one means other vectors
    task: Literal["embed", "rerank", "classify"]
    labels: list[str] | None  # of a reranker or classifier
    dimensions: int  # of a vector, unless the request says otherwise; of scores, their number
    max_dimensions: int
    max_tokens: int
    modalities: list[str]
    prompts: dict[str, str]  # texts by name; an empty one changes nothing
    default_prompt: str | None  # of requests that name none
    revision: str | None
    engine: str
    precision: str
    certificate: Certificate


class OpenAIModels(msgspec.Struct):
    object: Literal["list"]
    data: list[OpenAIModel]


# text-embeddings-inference, and the plain dialect that shares its /embed


class PlainRequest(Request, forbid_unknown_fields=True):
    text: str


class HuggingFaceOptions(msgspec.Struct, kw_only=True):
    """What Hugging Face's own API takes; without effect here."""

    use_cache: bool | None = None
    use_gpu: bool | None = None
    wait_for_model: bool | None = None
    dont_load_model: bool | None = None


class _Parameters(msgspec.Struct):
    """Some versions of huggingface_hub send options in `parameters`: they mean the same there."""

    def __post_init__(self) -> None:
        if wrapped := getattr(self, "parameters", None):
            given = {name: getattr(wrapped, name) for name in wrapped.__struct_fields__}
            given = {name: value for name, value in given.items() if value is not None}
            fill(self, given, "$.parameters.")


class TEICut(msgspec.Struct, kw_only=True):
    """What every call for texts takes."""

    model: str | None = None
    truncate: bool | None = None  # absent: false
    # text-embeddings-inference documents Left and Right; its clients send left and right.
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None  # absent: right

    @property
    def side(self) -> Literal["left", "right"] | None:
        if not self.truncate:
            return None
        return "left" if self.truncation_direction in ("left", "Left") else "right"


class TEIOptions(TEICut, kw_only=True):
    prompt_name: str | None = None


class TEIEmbedOptions(TEIOptions, kw_only=True):
    normalize: bool | None = None  # absent: true
    dimensions: int | None = None


class TEIEmbedRequest(_Parameters, TEIEmbedOptions, kw_only=True):
    inputs: str | list[str]
    parameters: TEIEmbedOptions | None = None
    options: HuggingFaceOptions | None = None


class SimilarityInput(msgspec.Struct):
    source_sentence: str
    sentences: list[str]


class SimilarityRequest(_Parameters, TEIOptions, kw_only=True):
    inputs: SimilarityInput
    parameters: TEIOptions | None = None
    options: HuggingFaceOptions | None = None


class FlatSimilarityRequest(_Parameters, TEIOptions, kw_only=True):
    """What huggingface_hub 0.28 to 0.30 sends, beside `"inputs": null`."""

    source_sentence: str
    sentences: list[str]
    parameters: TEIOptions | None = None
    options: HuggingFaceOptions | None = None


class TokenizeOptions(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt_name: str | None = None
    add_special_tokens: bool | None = None  # absent: true


class TokenizeRequest(_Parameters, TokenizeOptions, kw_only=True):
    inputs: str | list[str]
    parameters: TokenizeOptions | None = None
    options: HuggingFaceOptions | None = None


# All options of texts. A route that takes none refuses them in its query.
OPTIONS = {
    name
    for schema in (ChunkRequest, TEIEmbedOptions, TokenizeOptions)
    for name in schema.__struct_fields__
}


class Token(msgspec.Struct):
    """Offsets are code points of the text as sent; null for special tokens and a prompt's."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class EmbeddingModel(msgspec.Struct):
    pooling: str


class ModelLabels(msgspec.Struct):
    id2label: dict[str, str]
    label2id: dict[str, int]


class ModelType(msgspec.Struct):
    """One of them, by the model's task."""

    embedding: EmbeddingModel | UnsetType = UNSET
    reranker: ModelLabels | UnsetType = UNSET
    classifier: ModelLabels | UnsetType = UNSET


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


# Scores


class Scored(msgspec.Struct, kw_only=True):
    """A piece of a document; its offsets are Unicode code points of the document as sent."""

    start: int
    end: int
    tokens: int  # the query's and special tokens included
    score: float


class RerankRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    query: str
    documents: list[str]
    model: str | None = None  # absent: the default model if it reranks, else the only one that does
    top_n: int | None = None  # absent: all
    chunks: bool | None = None


class Rank(msgspec.Struct):
    index: int  # of the document as sent
    score: float
    chunks: list[Scored] | UnsetType = UNSET


class Ranking(msgspec.Struct):
    """The best first. A document's score is its best chunk's."""

    results: list[Rank]


TextOrPair = str | tuple[str, str]


class ClassifyText(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    text: TextOrPair
    model: str | None = None  # absent: the default model if it classifies, else the only one


class ClassifyTexts(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    texts: list[TextOrPair]
    model: str | None = None


class Label(msgspec.Struct):
    label: str
    score: float


class Labels(msgspec.Struct):
    """The labels of the text, the highest score first; of `texts`, a list for each."""

    labels: list[Label | list[Label]]


class TEIRerankOptions(TEICut, kw_only=True):
    raw_scores: bool | None = None  # absent: false
    return_text: bool | None = None  # absent: false


class TEIRerankRequest(_Parameters, TEIRerankOptions, kw_only=True):
    query: str
    texts: list[str]
    parameters: TEIRerankOptions | None = None
    options: HuggingFaceOptions | None = None


class TEIRank(msgspec.Struct):
    index: int
    score: float
    text: str | UnsetType = UNSET


class PredictOptions(TEICut, kw_only=True):
    raw_scores: bool | None = None  # absent: false


class PredictRequest(_Parameters, PredictOptions, kw_only=True):
    # A text; or a list of one text, or of two, which are a pair; or a list of such lists.
    inputs: str | list[str | list[str]]
    parameters: PredictOptions | None = None
    options: HuggingFaceOptions | None = None


# The labels of one input, or of each.
Predictions = list[Label | list[Label]]


class CohereRerankRequest(msgspec.Struct, kw_only=True):
    """Cohere's, of both versions, and Jina's."""

    query: str
    documents: list[str | dict[str, Any]]  # texts, or objects with a field `text`
    model: str | None = None  # absent: as on /rerank
    top_n: int | None = None  # absent: all
    return_documents: bool | None = None  # absent: false
    rank_fields: list[str] | None = None  # nothing but ["text"] is taken
    max_tokens_per_doc: int | None = None  # a longer document is refused, not cut
    max_chunks_per_doc: int | None = None  # the same
    priority: int | None = None  # without effect here


class CohereRank(msgspec.Struct):
    index: int
    relevance_score: float
    document: dict[str, Any] | UnsetType = UNSET


class CohereRanking(msgspec.Struct):
    """Cohere's response, with Jina's fields `model`, `object` and `usage`."""

    id: str
    model: str
    object: Literal["list"]
    results: list[CohereRank]
    meta: dict[str, Any]
    usage: OpenAIUsage


# Pictures


class ImageOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that all native calls for pictures take; prompts are for texts."""

    model: str | None = None
    dimensions: int | None = None


class EmbedImage(ImageOptions, forbid_unknown_fields=True):
    image: str  # base64 or a data URI


class EmbedImages(ImageOptions, forbid_unknown_fields=True):
    images: list[str]
