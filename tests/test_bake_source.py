"""bake/source.py: the model that is loaded, its prompts, window and tokenizer; what is refused."""

import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_code
import tiny_models as tiny
import transformers
from baking import FAR, PROMPTS, Baked, bake, cosines, embed, refusal, serving
from sentence_transformers import SentenceTransformer
from tokenizers import processors

from bake.samples import PROBE_TEXT
from bake.source import location
from engine.bundle import Bundle
from tokens import load_tokenizer


def test_a_packaged_model_is_found_without_a_hub(real_model: pathlib.Path) -> None:
    name = "all-MiniLM-L6-v2"
    for given in (name, f"sentence-transformers/{name}"):
        assert location(given, None) == str(real_model)
    assert location(name, "main") == name
    assert location("intfloat/e5-base-v2", None) == "intfloat/e5-base-v2"


def test_a_folder_of_a_packaged_model_s_name_is_a_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "all-MiniLM-L6-v2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert location("all-MiniLM-L6-v2", None) == "all-MiniLM-L6-v2"


def test_what_is_no_model_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model").mkdir()
    line = refusal(tmp_path / "model", tmp_path / "models")
    assert ": sentence-transformers cannot load it; MODEL is a name on the Hugging Face hub" in line


def test_code_that_comes_with_a_model_is_not_run_unasked(tmp_path: pathlib.Path) -> None:
    folder = tiny.save(tmp_path / "model", heads=[tiny_code.Broken()])
    line = refusal(folder, tmp_path / "models")
    assert ": it brings Python code of its own, which only --trust-remote-code runs: " in line
    assert "tiny_code.Broken" in line


def chatting() -> tiny.Made:
    tokenizer, model = tiny.bert()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer, model


def repeating() -> tiny.Made:
    """Its template has the text twice: serving puts special tokens around a chunk, and no text."""
    tokenizer = tiny.byte_level(pad_token="[PAD]")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tiny.bert(tokenizer)


def slow_tokenizer() -> tiny.Made:
    """Of proteins."""
    with tempfile.NamedTemporaryFile("w") as vocabulary:
        vocabulary.write("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "<mask>", *"abc"]))
        vocabulary.flush()
        return tiny.bert(transformers.EsmTokenizer(vocabulary.name))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"make": repeating},
            "the tokenizer's special tokens are not a prefix and a suffix: serving cannot cut "
            "texts with it; bake",
        ),
        ({"make": chatting}, "it renders texts through its tokenizer's chat template: not "),
        (
            {"make": slow_tokenizer},
            "its tokenizer (EsmTokenizer) runs in Python only, and serving has the tokenizers "
            "library: not supported; if there is a fast one with the same ids, name its folder "
            "with --tokenizer",
        ),
    ],
    ids=["text-twice", "chat-template", "slow-tokenizer"],
)
def test_what_serving_could_not_do_is_refused(
    options: dict[str, Any], says: str, tmp_path: pathlib.Path
) -> None:
    folder = tiny.save(tmp_path / "model", **options)
    assert refusal(folder, tmp_path / "models").startswith(f"cannot bake {folder}: {says}")


def byt5() -> tiny.Made:
    return tiny.bert(transformers.ByT5Tokenizer())


def perceiver() -> tiny.Made:
    return tiny.bert(transformers.PerceiverTokenizer())


@pytest.mark.parametrize("make", [byt5, perceiver])
def test_tokenizers_of_bytes(make: Callable[[], tiny.Made], tmp_path: pathlib.Path) -> None:
    folder = tiny.save(tmp_path / "model", make)
    bundle = bake(folder, tmp_path / "models", "--max-tokens", str(tiny.WINDOW))
    texts = [text[:20] for text in tiny.TEXTS] + ["</s> [SEP] a"]
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts)
    with serving(bundle) as (embedder, _):
        assert cosines(embed(embedder, texts), expected).min() >= 0.9999


def test_a_window_shorter_than_the_probe(tmp_path: pathlib.Path) -> None:
    """There are no positions for more."""

    def make() -> tiny.Made:
        tokenizer = transformers.ByT5Tokenizer()
        config = transformers.BertConfig(**tiny.sizes(tokenizer, 32))
        return tokenizer, transformers.BertModel(config)

    folder = tiny.save(tmp_path / "model", make)
    bundle = bake(folder, tmp_path / "models")
    assert bundle.manifest.max_tokens == 32 and not bundle.manifest.torch


def test_prompts_are_kept_and_the_default_one_is_used(bert: pathlib.Path, baked: Baked) -> None:
    assert baked.bundle.manifest.default_prompt == "query"
    assert baked.bundle.manifest.prompts == {"document": "", **PROMPTS}
    model = SentenceTransformer(str(bert), device="cpu")
    model.max_seq_length = 48
    with serving(baked.bundle) as (embedder, _):
        for prompt in (None, "query", "passage", "document"):
            expected = model.encode(tiny.TEXTS, prompt_name=prompt)
            assert cosines(embed(embedder, tiny.TEXTS, prompt), expected).min() >= 0.9999
        without = embed(embedder, tiny.TEXTS, "document")
        assert cosines(embed(embedder, tiny.TEXTS), without).max() < 0.995


def test_a_default_prompt_must_leave_room(bert: pathlib.Path, tmp_path: pathlib.Path) -> None:
    line = refusal(bert, tmp_path, "--max-tokens", "4")
    assert line.endswith(
        ": its default prompt leaves no room in a window of 4 tokens; give a larger "
        "--max-tokens, or another --default-prompt"
    )


def test_the_window_can_be_raised_and_lowered(
    bert: pathlib.Path, baked: Baked, tmp_path: pathlib.Path
) -> None:
    check_window(bert, baked.bundle, 48)
    check_window(bert, bake(bert, tmp_path, "--max-tokens", "8"), 8)


def check_window(folder: pathlib.Path, bundle: Bundle, window: int) -> None:
    assert bundle.manifest.max_tokens == window
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = window
    text = tiny.TEXTS[-1] * 3
    with serving(bundle) as (embedder, _):
        (pieces,) = embedder.chunk([text])
        assert len(pieces) > 1 and max(piece.tokens for piece in pieces) <= window
        (cut,) = embedder.embed([text], deadline=time.monotonic() + FAR, truncate="right")
    assert cut.tokens == window
    assert cosines(cut.vector, model.encode(text)) >= 0.9999
    # main.py compares the probe's vector: it must be one chunk's, as sentence-transformers' is.
    probe = bundle.manifest.probe
    assert probe.text and PROBE_TEXT.startswith(probe.text)
    assert len(model.tokenizer(PROMPTS["query"] + probe.text)["input_ids"]) <= window
    assert np.array(probe.vector) == pytest.approx(model.encode(probe.text), abs=1e-5)


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (
            tiny.bert,
            ["65"],
            "--max-tokens 65 is more than the 64 tokens that it has positions for; give 64 or less",
        ),
        (
            tiny.roberta,
            ["65"],
            "--max-tokens 65 is more than the 64 tokens that it has positions for; give 64 or less",
        ),
        (
            tiny.mpnet,
            ["66"],
            "--max-tokens 66 is more than the 64 tokens that it has positions for; give 64 or less",
        ),
        (
            tiny.bert,
            ["3"],
            "a window of 3 tokens leaves no room for text; give 4 or more with --max-tokens",
        ),
        (
            tiny.bert,
            ["0"],
            "a window of 0 tokens leaves no room for text; give 4 or more with --max-tokens",
        ),
        (
            tiny.bert,
            ["-1"],
            "a window of -1 tokens leaves no room for text; give 4 or more with --max-tokens",
        ),
        (tiny.t5, [], "it states no window; give one with --max-tokens"),
    ],
    ids=["bert", "roberta", "mpnet", "tiny", "none", "negative", "not-stated"],
)
def test_a_window_the_model_cannot_do_is_refused(
    make: Callable[[], tiny.Made], options: list[str], says: str, tmp_path: pathlib.Path
) -> None:
    folder = tiny.save(tmp_path / "model", make)
    options = ["--max-tokens", *options] if options else []
    assert refusal(folder, tmp_path / "models", *options).endswith(": " + says)


def test_another_tokenizer_must_give_the_models_own_ids(
    bare: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The same ids are enough: what it says of padding does not count, the model's own does."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(bare)
    tokenizer.padding_side, tokenizer.pad_token = "left", "[MASK]"
    tokenizer.save_pretrained(tmp_path / "same")
    bundle = bake(bare, tmp_path / "models", "--tokenizer", str(tmp_path / "same"))
    assert load_tokenizer(bundle)[1:] == (0, False)

    vocabulary = tokenizer.get_vocab()
    vocabulary["##e"], vocabulary["##n"] = vocabulary["##n"], vocabulary["##e"]
    transformers.BertTokenizer(vocabulary).save_pretrained(tmp_path / "other")
    line = refusal(bare, tmp_path / "models", "--tokenizer", str(tmp_path / "other"))
    assert re.search(
        ": the tokenizer gives other ids than the model's own, first for '.+': leave out", line
    )
    line = refusal(bare, tmp_path / "models", "--tokenizer", str(tmp_path / "absent"))
    assert f": --tokenizer {tmp_path / 'absent'} cannot be loaded; leave it out, or name" in line
