"""What kind of model a folder holds: what gives no vectors is refused by name, and what
sentence-transformers leaves open (pooling, route, adapter, prompt) is decided.
"""

import json
import pathlib
import re
from typing import Any, Literal

from sentence_transformers.base.modules import Normalize, Router
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from sentence_transformers.util import ORIGINAL_TRANSFORMER_MODELS, load_file_path

from bake import BakeError, Options

# sentence-transformers' StaticEmbedding takes texts of any length.
TABLE_WINDOW = 8192
INSTEAD = "bake a SentenceTransformer model instead"
_CROSS = "a CrossEncoder that generates text (a causal reranker)"
_SPARSE = "a SparseEncoder (SPLADE), whose vectors have a number for every token of the vocabulary"
_MULTI = "a multi-vector model (ColBERT), which has a vector for every token of a text"
# By `model_type` of config_sentence_transformers.json.
_MODEL_TYPES = {
    "CrossEncoder": _CROSS,
    "SparseEncoder": _SPARSE,
    "MultiVectorEncoder": _MULTI,
    "ColBERT": _MULTI,
}
# By the modules' types; older models state no `model_type`.
_MODULES = (
    (r"\.cross_encoder\.|LogitScore", _CROSS),
    (r"\.sparse_encoder\.|Splade|Sparse|\.CSR", _SPARSE),
    (r"\.multi_vector_encoder\.|pylate", _MULTI),
)
# By `architectures` of config.json, for what states no modules: the first that matches.
_ARCHITECTURES = (
    (r"ColBERT|^Col.*ForRetrieval", _MULTI),
    (r"ForRanking|ForReranking", "a reranker of a form of its own"),
    (r"ForTokenClassification", "a classifier of tokens"),
    (r"ForCausalLM|LMHeadModel|ForConditionalGeneration|ForSeq2SeqLM", None),
    (r"For(MaskedLM|PreTraining|FeatureExtraction|Text\w*|Sentence\w*|Embedding)$", ""),
    (r"^(?!.*For[A-Z])", ""),
    (r"", "made for another task"),
)


class Table(StaticEmbedding):  # type: ignore[misc]  # StaticEmbedding is Any to mypy
    """A StaticEmbedding with a window, in tokens, which may be set."""

    max_seq_length = TABLE_WINDOW


def check(name: str, revision: str | None, pooling: str | None) -> bool:
    """Refuse what is no embedding model, before it is loaded.

    Args:
        name: a folder, or a name on the Hugging Face hub.
        pooling: as --pooling.

    Returns: whether it is a plain transformers model, without modules of sentence-transformers.
    Raises: BakeError.
    """

    if not ("/" in name or pathlib.Path(name).is_dir() or name in ORIGINAL_TRANSFORMER_MODELS):
        name = f"sentence-transformers/{name}"
    modules = _read(name, revision, "modules.json")
    settings = _read(name, revision, "config_sentence_transformers.json") or {}
    kind = _MODEL_TYPES.get(settings.get("model_type", ""))
    for module in modules or []:
        kind = kind or next((kind for at, kind in _MODULES if re.search(at, module["type"])), None)
    if kind is None and "query_length" in settings and "document_length" in settings:
        kind = _MULTI  # PyLate's before it stated a type
    if kind:
        raise BakeError(f"it is {kind}: not supported; {INSTEAD}")
    if modules is None:
        config = _read(name, revision, "config.json") or {}
        _check_architecture((config.get("architectures") or [""])[0], pooling)
    elif pooling and any(module["type"].endswith("Pooling") for module in modules):
        raise BakeError("it has a pooling of its own; leave out --pooling")
    return modules is None


def _read(name: str, revision: str | None, file: str) -> Any:
    """A JSON file of a model; None where it has no such file."""
    path = load_file_path(name, file, revision=revision)
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8")) if path else None


def scorer(name: str, revision: str | None) -> Literal["CrossEncoder", "plain"] | None:
    """Whether a model gives scores of texts or pairs: as a CrossEncoder of sentence-transformers,
    or as a plain transformers model (…ForSequenceClassification). None for one that does not, and
    for what `check` refuses by name.

    Args:
        name, revision: as `check` takes them.
    """
    config = _read(name, revision, "config.json") or {}
    modules = _read(name, revision, "modules.json")
    settings = _read(name, revision, "config_sentence_transformers.json") or {}
    types = " ".join(module["type"] for module in modules or [])
    cross = settings.get("model_type") == "CrossEncoder"
    # CrossEncoders before sentence-transformers 5 stated only their activation.
    stated = {"sentence_transformers", "sbert_ce_default_activation_function"} & config.keys()
    architecture = (config.get("architectures") or [""])[0]
    if not architecture.endswith("ForSequenceClassification"):
        return None
    if cross:
        return None if "LogitScore" in types else "CrossEncoder"
    if modules is not None:
        return None
    return "CrossEncoder" if stated else "plain"


def _check_architecture(architecture: str, pooling: str | None) -> None:
    """Raises: BakeError for a plain transformers model that was made for something else."""
    kind = next(kind for at, kind in _ARCHITECTURES if re.search(at, architecture))
    if kind:
        raise BakeError(f"it is {kind} ({architecture}), which gives no vectors: {INSTEAD}")
    if kind is None and pooling is None:
        raise BakeError(
            f"it is a model that generates text ({architecture}): {INSTEAD}, or, if this one was "
            "trained to embed, say how with --pooling (most often lasttoken)"
        )


def adapt(model: Any, options: Options, plain: bool) -> list[str]:
    """Decide what the model leaves open, in place.

    Returns: what the user should know of it, a line each.
    Raises: BakeError where only the user can decide.
    """
    remarks = _choose_route(model, options)
    if merge_adapter(model):
        remarks.append("its adapter (PEFT) is merged into its weights")
    pools = [at for at, module in enumerate(model) if isinstance(module, Pooling)]
    tokens = getattr(model[0], "module_output_name", None) == "token_embeddings"
    if options.pooling:
        if not tokens:
            raise BakeError("it gives a vector for a whole text; leave out --pooling")
        pooling = Pooling(model[0].get_embedding_dimension(), options.pooling)
        if pools:
            model[pools[0]] = pooling
        else:
            model.insert(1, pooling)
    elif tokens and all(isinstance(module, Normalize) for module in list(model)[1:]):
        raise BakeError("no module makes one vector of a text's tokens; say how with --pooling")
    elif plain and pools:
        remarks.append(
            f"it states no pooling: {model[pools[0]].pooling_mode} is assumed, as "
            "sentence-transformers does; --pooling chooses another, see the model's card"
        )
    _pad(model)
    return remarks


def _choose_route(model: Any, options: Options) -> list[str]:
    """Replace a Router by one of its routes.

    Returns, raises: as `adapt`.
    """
    at = next((at for at, module in enumerate(model) if isinstance(module, Router)), None)
    if at is None:
        if options.route:
            raise BakeError("it has no routes; leave out --route")
        return []
    routes = model[at].sub_modules
    if options.route not in routes:
        asked = f"--route {options.route} is none of them" if options.route else "choose one"
        raise BakeError(
            f"it has a Router with the routes {', '.join(routes)}: {asked} with --route, and bake "
            "a bundle for each that is needed (--name)"
        )
    parts = [*list(model)[:at], *routes[options.route], *list(model)[at + 1 :]]
    while len(model):
        del model[0]
    for part in parts:
        model.append(part)
    others = ", ".join(name for name in routes if name != options.route) or "none"
    return [f"only its route {options.route} is baked (others: {others})"]


def merge_adapter(model: Any) -> bool:
    """Merge the adapter (PEFT) of the model's transformer into its weights, in place.

    Returns: whether it had one.
    """
    transformer = model.transformers_model
    if not getattr(transformer, "_hf_peft_config_loaded", False):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(parent), child, layer.get_base_layer())
    transformer._hf_peft_config_loaded = False
    # Else it would be saved with an adapter's names.
    transformer._weight_conversions = [
        each
        for each in transformer._weight_conversions
        if not any("lora_" in name or "base_model." in name for name in each.source_patterns)
    ]
    return True


def _pad(model: Any) -> None:
    """Give a tokenizer without a padding token another special token for it: padding is masked."""
    own = getattr(model[0], "tokenizer", None)
    if own is not None and getattr(own, "pad_token_id", 0) is None:
        own.pad_token = own.eos_token or own.sep_token or own.unk_token


def leave_out_prompts(model: Any) -> list[str]:
    """Where the pooling leaves out the prompt's tokens, leave the model only its default prompt:
    how many tokens are left out is part of the bundle, not of a request.

    Returns: as `adapt`. Raises: BakeError where there are prompts and none is the default.
    """
    pools = [module for module in model if not getattr(module, "include_prompt", True)]
    prompts = {name: prompt for name, prompt in model.prompts.items() if prompt}
    default = model.default_prompt_name
    if not (pools and prompts):
        for pooling in pools:
            pooling.include_prompt = True
        return []
    names = ", ".join(prompts)
    if default is None:
        raise BakeError(
            f"its pooling leaves out the prompt's tokens (include_prompt: false; it has {names}): "
            "not supported with several prompts in a bundle; choose one with --default-prompt, or "
            "none with --default-prompt document, and bake a bundle for each (--name)"
        )
    empty = {name: prompt for name, prompt in model.prompts.items() if not prompt}
    model.prompts = {default: prompts[default]} if default in prompts else empty
    return [
        f"its pooling leaves out the prompt's tokens, so only the prompt {default!r} is baked "
        f"(there is {names}); bake a bundle for each that is needed (--default-prompt, --name)"
    ]


def check_kind(model: Any) -> None:
    """Raises: BakeError for a loaded model that this service cannot serve."""
    chain = ", ".join(type(module).__name__ for module in model)
    if "text" not in model.modalities:
        modalities = ", ".join(map(str, model.modalities))
        raise BakeError(
            f"it takes no texts (but {modalities}): not supported; bake a model of texts, or of "
            "texts and pictures, such as CLIP"
        )
    if "message" in model.modalities:
        raise BakeError(
            "it renders texts through its tokenizer's chat template: not supported; if it was "
            "trained on plain texts, take the template out of its folder (chat_template)"
        )
    table = isinstance(model[0], StaticEmbedding)
    if not table and (model.config is None or getattr(model[0], "tokenizer", None) is None):
        raise BakeError(
            f"it begins with {type(model[0]).__name__} (its modules: {chain}), not with a "
            "transformer or a table of tokens (StaticEmbedding): not supported; distil it into a "
            "StaticEmbedding (model2vec), or bake another"
        )
