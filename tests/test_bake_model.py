"""bake_model.py: every architecture gives its own vectors; what cannot be baked is refused in one
line; a bundle is complete or absent.
"""

import concurrent.futures
import contextlib
import datetime
import hashlib
import importlib.metadata
import io
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
import pytest
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Module
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

import bake_model
import tiny_models as tiny
from conftest import NAME, WIDE
from embeddings import TextEmbedder, TextLimits
from engine import bundle as bundles
from engine.queue import Queue
from engine.bundle import PARITY_FLOOR, Bundle
from engine.errors import PrecisionUnavailable
from engine.openvino_backend import OpenVINOTextEngine, available_precisions, choose_precision
from servers import ROOT
from tokens import load_tokenizer

Float32 = npt.NDArray[np.float32]
PROMPTS = {"query": "query: ", "passage": "passage: "}
OWN = 24  # tokens: the window that `bert` states
FAR = 60.0  # seconds; a deadline that no test meets


def bake(model: pathlib.Path | str, output: pathlib.Path, *options: str) -> Bundle:
    """Bake as the command line does, in this process; at fp32 unless told otherwise."""
    if "--precisions" not in options:
        options = (*options, "--precisions", "fp32")
    bake_model.main([str(model), "--output", str(output), *options])
    name = options[options.index("--name") + 1] if "--name" in options else pathlib.Path(model).name
    bundle = bundles.read(output / name)
    bundle.verify()
    return bundle


def refusal(model: pathlib.Path | str, output: pathlib.Path, *options: str) -> str:
    """The one line on stderr of a bake that fails and writes nothing."""
    before = content(output)
    with pytest.raises(SystemExit) as info:
        bake(model, output, *options)
    line = info.value.code
    # sys.exit prints a string to stderr and ends the process with 1.
    assert isinstance(line, str) and line.startswith(f"cannot bake {model}: ") and "\n" not in line
    assert content(output) == before
    return line


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too; a folder counts as a file of nothing."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@contextlib.contextmanager
def serving(
    bundle: Bundle, precision: bundles.Precision = "fp32"
) -> Iterator[tuple[TextEmbedder, OpenVINOTextEngine]]:
    """An embedder and its engine, put together as main.py does."""
    tokenizer, pad_id, pad_left = load_tokenizer(bundle)
    engine = OpenVINOTextEngine(bundle, precision, pad_id=pad_id, pad_left=pad_left, streams=1)
    batcher = Queue(max_batch_size=64, max_batch_tokens=4096, max_queue_tokens=1 << 30, threads=1)
    batcher.start()
    limits = TextLimits(1000, 1 << 20, 1 << 30)
    try:
        yield TextEmbedder(bundle, tokenizer, engine, batcher, limits), engine
    finally:
        batcher.close()


def embed(embedder: TextEmbedder, texts: Sequence[str], prompt: str | None = None) -> Float32:
    results = embedder.embed(texts, deadline=time.monotonic() + FAR, prompt_name=prompt)
    return np.stack([result.vector for result in results])


def cosines(left: Float32, right: Float32) -> Float32:
    lengths = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    result: Float32 = (left * right).sum(axis=-1) / lengths
    return result


@dataclass
class Case:
    """A model of the table: how it is made, and what its bundle must say."""

    make: Callable[[], tiny.Made]
    pooling: Any
    heads: Callable[[], Sequence[Module]] = tuple
    normalize: bool = True
    dimensions: int = tiny.WIDTH
    pad: tuple[int, bool] = (0, False)  # id, and whether on the left
    options: list[str] = field(default_factory=list)


CASES = {
    "bert": Case(tiny.bert, "mean"),
    "bert-two-poolings": Case(
        tiny.bert, ("weightedmean", "max"), normalize=False, dimensions=2 * tiny.WIDTH
    ),
    "roberta": Case(tiny.roberta, "cls", lambda: [Dense(tiny.WIDTH, 24)], True, 24, (1, False)),
    "roberta-left": Case(tiny.roberta_left, "mean", pad=(1, True)),
    "xlm-roberta": Case(tiny.xlm_roberta, "mean", pad=(1, False)),
    "mpnet": Case(tiny.mpnet, "mean", normalize=False, pad=(1, False)),
    "distilbert": Case(tiny.distilbert, "max"),
    "modernbert": Case(tiny.modernbert, "cls"),
    "deberta-v2": Case(tiny.deberta, "mean_sqrt_len_tokens", normalize=False),
    "t5": Case(tiny.t5, "mean", options=["--max-tokens", str(tiny.WINDOW)]),
    "qwen3": Case(tiny.qwen3, "lasttoken", pad=(0, True)),
    "gemma3": Case(tiny.gemma3, "lasttoken", normalize=False, pad=(0, True)),
    "embedding-gemma": Case(
        tiny.embedding_gemma,
        "mean",
        lambda: [Dense(tiny.WIDTH, 64), Dense(64, 24, bias=False)],
        dimensions=24,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bundle_gives_the_models_own_vectors(name: str, tmp_path: pathlib.Path) -> None:
    case = CASES[name]
    folder = tiny.save(
        tmp_path / name, case.make, case.pooling, heads=case.heads(), normalize=case.normalize
    )
    bundle = bake(folder, tmp_path / "models", *case.options)
    manifest = bundle.manifest
    assert manifest.dimensions == case.dimensions
    assert manifest.normalized == case.normalize
    assert manifest.max_tokens == tiny.WINDOW
    assert load_tokenizer(bundle)[1:] == case.pad

    model = SentenceTransformer(str(folder), device="cpu")
    expected = model.encode(tiny.TEXTS)
    apart = cosines(expected[:, None], expected[None])[~np.eye(len(expected), dtype=bool)]
    assert apart.max() < 0.995, "the texts' vectors are too alike to tell right from wrong"
    with serving(bundle) as (embedder, engine):
        served = embed(embedder, tiny.TEXTS)
        lone = np.concatenate([embed(embedder, [text]) for text in tiny.TEXTS])
        # One engine call for all, as unequal as they are: the Queue alone would not pad so much.
        inputs = [chunk.token_ids for (chunk,) in embedder.chunk(tiny.TEXTS)]
        assert len({len(ids) for ids in inputs}) > 3
        padded = engine.run(inputs)
    assert cosines(served, expected).min() >= 0.9999
    assert np.linalg.norm(served, axis=1) == pytest.approx(
        np.linalg.norm(expected, axis=1), rel=0.005
    )
    assert cosines(lone, served).min() >= 0.99999
    assert cosines(padded, lone).min() >= 0.99999


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def bert(folders: pathlib.Path) -> pathlib.Path:
    """A BERT with prompts, of which `query` is the default; its window is OWN of WINDOW tokens."""
    return tiny.save(folders / "bert", prompts=PROMPTS, default_prompt="query", max_tokens=OWN)


@pytest.fixture(scope="session")
def bare(folders: pathlib.Path) -> pathlib.Path:
    return tiny.save(folders / "bare")


@dataclass
class Baked:
    """A bundle of `bert`, and what its bake said."""

    bundle: Bundle
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def baked(bert: pathlib.Path, folders: pathlib.Path) -> Baked:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        bundle = bake(bert, folders / "models", "--source", "org/bert", "--max-tokens", "48")
    return Baked(bundle, out.getvalue(), err.getvalue())


# What is said.


def test_the_summary_names_what_was_made(baked: Baked) -> None:
    rows = [line.split("  ", 1) for line in baked.stdout.splitlines()]
    files = baked.bundle.manifest.files
    assert list(files) == ["tokenizer.json", "text.xml", "text.bin"]
    parity = baked.bundle.manifest.parity["fp32"]
    assert {label: text.strip() for label, text in rows} == {
        "bundle": str(baked.bundle.path),
        "source": "org/bert",
        "dimensions": f"{tiny.WIDTH}, normalised",
        "window": "48 tokens",
        "prompts": "query='query: ', passage='passage: '",
        **{name: f"{file.size / 1e6:.1f} MB" for name, file in files.items()},
        "fp32": f"cosine at least {parity.minimum:.6f}, mean {parity.mean:.6f} over 120 texts",
        "bf16": "not baked",
        "int8": "not baked",
    }


def test_progress_goes_to_stderr_a_stage_a_line(bert: pathlib.Path, baked: Baked) -> None:
    done = [line.split(" … ") for line in baked.stderr.splitlines()]
    assert [what for what, _ in done] == [
        f"loading {bert}",
        "embedding the sample with sentence-transformers",
        "tracing to OpenVINO",
        "checking vectors at fp32",
    ]
    assert all(re.fullmatch(r"\d+\.\d s", took) for _, took in done)


def test_weights_are_kept_in_half_the_bytes(baked: Baked) -> None:
    assert matrices(baked.bundle, "text.xml") == {"f16"}


def matrices(bundle: Bundle, graph: str) -> set[str]:
    """The types that a graph's matrices are kept in."""
    constants = (
        operation
        for operation in ov.Core().read_model(bundle.file(graph)).get_ops()
        if operation.get_type_name() == "Constant"
    )
    return {
        constant.get_output_element_type(0).get_type_name()
        for constant in constants
        if len(constant.data.shape) == 2 and min(constant.data.shape) > 1
    }


def nodes(folder: pathlib.Path) -> list[Any]:
    """Of a bundle's text graph, in the order they are computed in."""
    found: list[Any] = ov.Core().read_model(folder / "text.xml").get_ordered_ops()
    return found


def test_attention_gets_a_mask_of_every_token_and_nothing_to_scale(baked: Baked) -> None:
    kind = "ScaledDotProductAttention"
    attentions = [node for node in nodes(baked.bundle.path) if node.get_type_name() == kind]
    assert len(attentions) == 2
    for node in attentions:
        mask = node.input_value(3).get_partial_shape()
        assert [str(size) for size in mask] == ["?", "1", "1", "?"]
        scale = node.input_value(4).get_node()
        scale = scale.input_value(0).get_node() if scale.get_type_name() == "Convert" else scale
        assert scale.get_data() == 1


# Prompts and the window.


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
    assert line.endswith(": its default prompt leaves no room in a window of 4 tokens")


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
    assert probe.text and bake_model.PROBE_TEXT.startswith(probe.text)
    assert len(model.tokenizer(PROMPTS["query"] + probe.text)["input_ids"]) <= window
    assert np.array(probe.vector) == pytest.approx(model.encode(probe.text), abs=1e-5)


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (tiny.bert, ["65"], "--max-tokens 65 is more than the 64 tokens its architecture can do"),
        (
            tiny.roberta,
            ["65"],
            "--max-tokens 65 is more than the 64 tokens its architecture can do",
        ),
        (tiny.mpnet, ["66"], "--max-tokens 66 is more than the 64 tokens its architecture can do"),
        (tiny.bert, ["3"], "a window of 3 tokens leaves no room for text"),
        (tiny.bert, ["0"], "a window of 0 tokens leaves no room for text"),
        (tiny.bert, ["-1"], "a window of -1 tokens leaves no room for text"),
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


@pytest.mark.parametrize("window", [64, 512, 8192])
def test_the_sample_reaches_from_one_token_to_the_window(baked: Baked, window: int) -> None:
    tokenizer = load_tokenizer(baked.bundle)[0]
    prompt = PROMPTS["query"]
    texts = bake_model.sample(tokenizer, prompt, window, 120)
    lengths = [len(tokenizer.encode(prompt + text).ids) for text in texts]
    assert len(texts) == 120 and len(set(texts)) > 100
    assert min(lengths) == len(tokenizer.encode(prompt + "a").ids)
    assert window - 3 <= max(lengths) <= window
    # Attention costs the square of the length: what takes a minute at 512 may not take hours.
    assert sum(length**2 for length in lengths) < 120 * 512**2 / 2 + 2 * window**2


# What cannot be baked.


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (
            tiny.Untraceable,
            "its code cannot be traced to OpenVINO: .*how many steps I take depends",
        ),
        (tiny.Unconvertible, "its code cannot be traced to OpenVINO: .*bessel_j0"),
        (tiny.Branching, r"at fp32 its vectors are not the model's own: smallest cosine -?0\.\d+"),
        (tiny.Scaling, "at fp32 its vectors are not the model's own: their lengths are off by up"),
        (tiny.Broken, "sentence-transformers cannot embed with it: 'nothing of the kind'"),
    ],
    ids=["raises", "no-conversion", "branches", "scales", "broken"],
)
def test_a_model_that_cannot_be_traced_is_refused(
    module: type[Module], says: str, tmp_path: pathlib.Path
) -> None:
    folder = tiny.save(tmp_path / "model", heads=[module()], normalize=False)
    line = refusal(folder, tmp_path / "models", "--trust-remote-code")
    assert re.search(says, line), line
    assert "--precisions" not in line  # what is wrong at fp32 is wrong at all


def test_code_that_comes_with_a_model_is_not_run_unasked(tmp_path: pathlib.Path) -> None:
    folder = tiny.save(tmp_path / "model", heads=[tiny.Broken()])
    line = refusal(folder, tmp_path / "models")
    assert ": sentence-transformers cannot load it: " in line and "tiny_models.Broken" in line


def test_what_int8_spoils_is_refused_with_the_way_out(tmp_path: pathlib.Path) -> None:
    folder = tiny.save(tmp_path / "model", tiny.coarse_bert, heads=[tiny.coarse_head()])
    line = refusal(folder, tmp_path / "models", "--precisions", "fp32,int8")
    assert re.search(
        r"at int8 its vectors are not the model's own: smallest cosine -?0\.\d{5}, at least 0.99 "
        r"needed \(--precisions fp32 bakes it without\)$",
        line,
    ), line


def test_a_bundle_is_served_only_at_what_it_was_baked_for(baked: Baked) -> None:
    """`baked` is fp32 only: nobody has seen its vectors at bf16, which runs the same graph."""
    assert baked.bundle.manifest.precisions == ["fp32"]
    for precision in ("bf16", "int8"):
        with pytest.raises(PrecisionUnavailable, match="was baked without it"):
            OpenVINOTextEngine(baked.bundle, precision, pad_id=0, pad_left=False, streams=1)
    assert choose_precision("auto", baked.bundle) == "fp32"


def no_pad_token() -> tiny.Made:
    tokenizer = tiny.byte_level()
    return tokenizer, tiny.bert(tiny.byte_level(pad_token="[PAD]"))[1]


def chatting() -> tiny.Made:
    tokenizer, model = tiny.bert()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer, model


def slow_tokenizer() -> tiny.Made:
    return tiny.bert(transformers.ByT5Tokenizer())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"include_prompt": False},
            "its pooling leaves out the prompt's tokens (include_prompt: false): not supported",
        ),
        ({"make": no_pad_token}, "its tokenizer has no padding token"),
        ({"make": chatting}, "it does not take plain text (its modalities: text, message)"),
        (
            {"make": slow_tokenizer},
            "its tokenizer (ByT5Tokenizer) has no form that the tokenizers library can run",
        ),
    ],
    ids=["include-prompt", "no-pad-token", "chat-template", "slow-tokenizer"],
)
def test_what_serving_could_not_do_is_refused(
    options: dict[str, Any], says: str, tmp_path: pathlib.Path
) -> None:
    folder = tiny.save(tmp_path / "model", **options)
    assert refusal(folder, tmp_path / "models") == f"cannot bake {folder}: {says}"


def test_a_model_without_a_transformer_is_refused(tmp_path: pathlib.Path) -> None:
    embedding = StaticEmbedding(tiny.byte_level(pad_token="[PAD]"), embedding_dim=8)
    SentenceTransformer(modules=[embedding], device="cpu").save(str(tmp_path / "model"))
    line = refusal(tmp_path / "model", tmp_path / "models")
    assert line.endswith(
        ": it does not begin with a transformer but with StaticEmbedding: not supported"
    )


def test_what_is_no_model_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model").mkdir()
    line = refusal(tmp_path / "model", tmp_path / "models")
    assert ": sentence-transformers cannot load it: " in line


@pytest.mark.parametrize("name", ["a b", "../up", ".hidden", "ä"])
def test_a_name_that_cannot_name_a_bundle_is_refused(
    bare: pathlib.Path, name: str, tmp_path: pathlib.Path
) -> None:
    says = f"{name!r} cannot name a bundle (letters, digits, . - _); give one with --name"
    assert refusal(bare, tmp_path, "--name", name) == f"cannot bake {bare}: {says}"
    if "/" not in name:
        folder = str(tmp_path / name)
        assert refusal(folder, tmp_path) == f"cannot bake {folder}: {says}"


def test_an_output_that_cannot_be_written_is_named(
    bare: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SystemExit, match=f"^cannot bake .*: .*'{tmp_path / 'file'}'$"):
        bake(bare, tmp_path / "file")


def test_the_command_line_ends_with_1_and_one_line(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "bake_model.py", "no/model", "--name", "a b"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr == (
        "cannot bake no/model: 'a b' cannot name a bundle (letters, digits, . - _); "
        "give one with --name\n"
    )


# --tokenizer.


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
    assert re.search(": the tokenizer gives other ids than the model's own, first for '.+'$", line)
    line = refusal(bare, tmp_path / "models", "--tokenizer", str(tmp_path / "absent"))
    assert f": --tokenizer {tmp_path / 'absent'} cannot be loaded: " in line


# A bundle is complete or absent.


def test_a_second_bake_replaces_the_first_or_leaves_it(
    bert: pathlib.Path, baked: Baked, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(baked.bundle.path, tmp_path / "x")
    (tmp_path / "x" / "of-old").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setitem(PARITY_FLOOR, "fp32", 1.1)  # ends the bake late: everything else is written
        assert "at least 1.1 needed" in refusal(bert, tmp_path, "--name", "x")
    stale = tmp_path / ".x.left"
    stale.mkdir()
    (stale / "text.bin").write_bytes(b"half")
    other = tmp_path / ".x.y.left"  # of a bundle called x.y, which another process may be baking
    other.mkdir()

    bundle = bake(bert, tmp_path, "--name", "x")
    assert bundle.manifest.name == "x" and bundle.manifest.source == "bert"
    check_window(bert, bundle, OWN)  # the earlier one's was another
    assert {path.name for path in tmp_path.iterdir()} == {"x", other.name}
    assert {path.name for path in bundle.path.iterdir()} == {
        *bundle.manifest.files,
        bundles.MANIFEST,
    }


def test_what_a_kill_between_the_renames_left_is_mended(
    baked: Baked, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(baked.bundle.path, tmp_path / f".x.{bundles.REPLACED}")
    shutil.copytree(baked.bundle.path, tmp_path / ".x.draft")
    bundles.clear(tmp_path, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert content(tmp_path / "x") == content(baked.bundle.path)


@pytest.mark.usefixtures("torch_child")
def test_a_stopped_bake_leaves_nothing_half_made(
    bare: pathlib.Path, baked: Baked, tmp_path: pathlib.Path
) -> None:
    """Real processes, stopped while they trace: SIGTERM with no earlier bundle, Ctrl-C and SIGKILL
    with one.
    """
    for name in ("int", "kill"):
        shutil.copytree(baked.bundle.path, tmp_path / name)
    before = content(tmp_path)

    def stop(name: str, number: signal.Signals) -> None:
        command = [sys.executable, "bake_model.py", str(bare), "--name", name]
        command += ["--output", str(tmp_path), "--precisions", "fp32"]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, bufsize=0) as process:
            assert process.stderr is not None
            said = b""
            while not said.endswith("tracing to OpenVINO …".encode()):
                said += (byte := process.stderr.read(1))
                assert byte, said.decode()
            assert list(tmp_path.glob(f".{name}.*/tokenizer.json"))
            process.send_signal(number)
            _, rest = process.communicate(timeout=FAR)
        if name != "kill":
            assert process.returncode == 1
            assert rest.decode() == "\nbake stopped; nothing was written\n"

    # Each its own thread: whom nobody reads comes to its end meanwhile.
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        names, numbers = ("term", "int", "kill"), (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
        list(pool.map(stop, names, numbers))
    (left,) = tmp_path.glob(".*")
    assert left.name.startswith(".kill.")  # the next bake of this name removes it
    shutil.rmtree(left)
    assert content(tmp_path) == before


# The real model, as the command line bakes it with every default.


def test_the_manifest_of_the_real_model(
    models_dir: pathlib.Path, sentence_transformer: Any
) -> None:
    for name, window in ((NAME, 256), (WIDE, 512)):
        bundle = bundles.read(models_dir / name)
        manifest = bundle.manifest
        assert manifest.name == name and manifest.source == f"sentence-transformers/{name}"
        assert manifest.revision is None  # of a folder
        assert manifest.modalities == ["text"]
        assert manifest.dimensions == 384 and manifest.max_tokens == window
        assert manifest.normalized and manifest.similarity == "cosine"
        assert not any(manifest.prompts.values()) and manifest.default_prompt is None
        created = datetime.datetime.fromisoformat(manifest.created)
        assert created.utcoffset() == datetime.timedelta(0)
        assert manifest.versions["openvino"] == importlib.metadata.version("openvino")
        assert manifest.probe.text == bake_model.PROBE_TEXT
        expected = sentence_transformer.encode(manifest.probe.text)
        assert np.array(manifest.probe.vector) == pytest.approx(expected, abs=1e-5)

        graphs = {"text.xml", "text.bin", "text-int8.xml", "text-int8.bin"}
        assert set(manifest.files) == {"tokenizer.json", *graphs}
        assert {path.name for path in bundle.path.iterdir()} == {*manifest.files, "manifest.json"}
        for file, stated in manifest.files.items():
            data = bundle.file(file).read_bytes()
            assert (stated.size, stated.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert matrices(bundle, "text.xml") == {"f16"}
        assert matrices(bundle, "text-int8.xml") == {"i8"}


@pytest.mark.parametrize("precision", available_precisions())
def test_the_real_models_certificate_holds(
    models_dir: pathlib.Path, sentence_transformer: Any, precision: bundles.Precision
) -> None:
    bundle = bundles.read(models_dir / NAME)
    parity = bundle.manifest.parity[precision]
    assert PARITY_FLOOR[precision] <= parity.minimum <= parity.mean <= 1.0001
    assert parity.cases == 120
    with serving(bundle, precision) as (embedder, _):
        found = cosines(embed(embedder, tiny.TEXTS), sentence_transformer.encode(tiny.TEXTS))
    assert found.min() >= PARITY_FLOOR[precision]


def test_the_certificate_states_what_this_cpu_ran(models_dir: pathlib.Path) -> None:
    manifest = bundles.read(models_dir / NAME).manifest
    assert list(manifest.parity) == available_precisions()
    assert manifest.precisions == ["fp32", "bf16", "int8"]
