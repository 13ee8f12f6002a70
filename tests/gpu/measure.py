"""Measure the torch engine on this machine's GPU, in stages, over HTTP and in this process:

    python -m tests.gpu.measure models --word-pieces tokenizer.json
    python -m tests.gpu.measure loop
    python -m tests.gpu.measure serve --workers 1,4
    python -m tests.gpu.measure infinity --site FOLDER
    python -m tests.gpu.measure memory --only minilm-l6 --minutes 10
    python -m tests.gpu.measure oom --only mxbai-large
    python -m tests.gpu.measure summary

Run it from the repository's root. Every stage prints a table and adds its rows to
WORK/results/results.json; what is in that folder is copied to $OUT, if that is set. With --tiny and
without a GPU, everything but the figures can be tried.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from loadtest.client import get
from loadtest.loads import LOADS, texts
from loadtest.service import ROOT, Service, free_port
from tests.gpu.load import (
    Endpoint,
    ask,
    drive_together,
    gpu,
    host_memory,
    neighbour,
    sampling,
    sized_texts,
    smallest_cosine,
)
from tests.gpu.shapes import SHAPES

Row = dict[str, Any]
PATIENCE = 300.0  # seconds for a service to start, or to answer
REQUEST = 64  # texts
QUERY = 16  # tokens of a lone query
# Bakes with a smaller sample.
BAKE = """
import sys, bake.stages, bake_model
bake.stages.TEXTS = int(sys.argv[1])
bake_model.main(sys.argv[2:])
"""
# No request is refused for the time that it would wait: the load is full on purpose.
UNLIMITED = {"MAX_QUEUE_TOKENS": "100000000", "MAX_QUEUE_SECONDS": "3600"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = {each.__name__: each for each in (models, loop, serve, infinity, memory, oom, summary)}
    add = parser.add_argument
    add("stage", choices=stages)
    add("--work", type=pathlib.Path, default=pathlib.Path("/tmp/rig"), help="models and results")
    add("--only", type=_names, default=list(SHAPES), metavar="NAMES", help=", ".join(SHAPES))
    add("--device", default="", help="DEVICE of the service (default: cuda where there is a GPU)")
    add("--precision", default="auto", help="PRECISION of the service")
    add("--tokens", type=_numbers, default=[128, 512], help="of a text (default: 128,512)")
    add("--seconds", type=float, default=6.0, help="of each measurement")
    add("--tiny", action="store_true", help="models: small layers")
    add("--word-pieces", type=pathlib.Path, help="models: BERT's tokenizer.json")
    add("--bake-options", type=str.split, default=[], help="models: more options of bake_model.py")
    add("--sample", type=int, default=16, help="models: texts that the bake compares, not 120")
    add("--workers", type=_numbers, default=[1], help="serve: WEB_CONCURRENCY, such as 1,4,8")
    add("--connections", type=int, default=32, help="of all clients together")
    add("--clients", type=int, default=4, help="client processes")
    add("--floats", action="store_true", help="serve: also float vectors, at the first length")
    add("--env", action="append", type=_pair, default=[], help="serve: NAME=VALUE, may be repeated")
    add("--site", help="infinity: folder with infinity-emb and what it needs")
    add("--batch-sizes", type=_numbers, default=[64, 256], help="infinity, and loop's encode")
    add("--dtype", default="float16", help="infinity: float16, bfloat16 or float32")
    add("--infinity-options", type=str.split, default=[], help="infinity: such as --compile")
    add("--minutes", type=float, default=8.0, help="memory: of load")
    add("--leave", type=_numbers, default=[512, 128], help="oom: MiB of GPU memory left")
    options = parser.parse_args()
    options.device = options.device or ("cuda" if shutil.which("nvidia-smi") else "cpu")
    (options.work / "results").mkdir(parents=True, exist_ok=True)
    try:
        stages[options.stage](options)
    finally:
        _copy(options)


def _names(argument: str) -> list[str]:
    return argument.split(",")


def _numbers(argument: str) -> list[int]:
    return [int(each) for each in argument.split(",")]


def _pair(argument: str) -> tuple[str, str]:
    name, _, value = argument.partition("=")
    return name, value


# Stages


def models(options: argparse.Namespace) -> None:
    """Make and bake all models, side by side."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(options.only)))}

    def run(*command: str) -> float:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **threads, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
        return time.perf_counter() - started

    def one(name: str) -> Row:
        folder, bundles = options.work / "models" / name, options.work / "bundles" / name
        folder.mkdir(parents=True, exist_ok=True)
        tiny = ["tiny"] if options.tiny else []
        made = run("-m", "tests.gpu.shapes", str(folder), name, str(options.word_pieces), *tiny)
        arguments = [str(folder), "--engine", "torch", "--name", name, "--output", str(bundles)]
        arguments += ["--max-tokens", str(SHAPES[name].window), *options.bake_options]
        baked = run("-c", BAKE, str(options.sample), *arguments)
        size = sum(path.stat().st_size for path in bundles.rglob("*") if path.is_file())
        manifest = json.loads((bundles / name / "manifest.json").read_bytes())
        return {
            "model": name,
            "make s": made,
            "bake s": baked,
            "MB": size / 1e6,
            "packed": manifest["torch"]["packed"],
            **{each: found["minimum"] for each, found in manifest["parity"]["torch"].items()},
        }

    with ThreadPoolExecutor(len(options.only)) as pool:
        _report(options, "models", list(pool.map(one, options.only)))


def loop(options: argparse.Namespace) -> None:
    """Tokens a second of forward passes in this process: the engine's own, a plain loop of the same
    model over full batches, and sentence-transformers from texts.
    """
    from tests.gpu import passes  # imports torch, which takes seconds

    for name, tokens in itertools.product(options.only, options.tokens):
        bundle = options.work / "bundles" / name / name
        source, seconds = functools.partial(_texts, bundle, tokens), options.seconds / 3
        rows = passes.engine(bundle, options.device, options.precision, source, seconds)
        folder, precision = options.work / "models" / name, rows[0]["precision"]
        window, sizes = SHAPES[name].window, options.batch_sizes
        rows += passes.plain(folder, options.device, precision, window, source, sizes, seconds)
        about = {"model": name, "tokens": tokens}
        _report(
            options,
            "loop",
            [{**about, **row, "tokens/s": row["texts/s"] * tokens} for row in rows],
        )


def serve(options: argparse.Namespace) -> None:
    """Tokens a second of the service, over HTTP."""
    for name, workers in itertools.product(options.only, options.workers):
        with _service(options, name, workers) as service:
            about = {"model": name, "server": "ours", "setting": f"{workers} workers"}
            endpoint = Endpoint(service.url, "/v1/embeddings", name)
            about["ready s"] = service.ready_seconds
            _measure(options, "serve", about, endpoint, service.process.pid)


def infinity(options: argparse.Namespace) -> None:
    """Tokens a second of infinity's torch engine, over HTTP."""
    for name, size in itertools.product(options.only, options.batch_sizes):
        port = free_port()
        command = [
            "-m",
            "infinity_emb.cli",
            "v2",
            "--model-id",
            str(options.work / "models" / name),
        ]
        command += ["--served-model-name", name, "--engine", "torch", "--device", options.device]
        command += ["--dtype", options.dtype, "--batch-size", str(size), "--no-bettertransformer"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
        offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONPATH": str(options.site)}
        offline["INFINITY_HOME"] = str(options.work)
        started, url = time.perf_counter(), f"http://127.0.0.1:{port}"
        with _log(options).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command, *options.infinity_options],
                env={**os.environ, **offline},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            while not _answers(url):
                late = time.perf_counter() > started + PATIENCE
                if late or process.poll() is not None:
                    raise SystemExit(f"infinity did not start:\n{_end_of_log(options)}")
                time.sleep(0.05)
            setting = " ".join([f"batch {size}", options.dtype, *options.infinity_options])
            about = {"model": name, "server": "infinity", "setting": setting}
            about["ready s"] = time.perf_counter() - started
            endpoint = Endpoint(url, "/embeddings", name)
            _measure(options, "infinity", about, endpoint, process.pid)
        finally:
            process.terminate()
            process.wait(60)


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return get(url, "/health")[0] == 200
    return False


def _measure(
    options: argparse.Namespace, stage: str, about: Row, endpoint: Endpoint, pid: int
) -> None:
    """Every load on one server; the rows are reported."""
    path = options.work / "bundles" / about["model"] / about["model"]
    probe = json.loads((path / "manifest.json").read_bytes())["probe"]
    _, found = ask(endpoint, [[probe["text"]]], at_a_time=1)
    about["cosine"] = smallest_cosine(np.array([probe["vector"]], np.float32), found)
    idle = {"gpu idle": gpu()[0], "host idle": host_memory(pid)}
    cases = [(tokens, REQUEST, "base64", options.connections) for tokens in options.tokens]
    cases += [(options.tokens[0], REQUEST, "float", options.connections)] if options.floats else []
    cases += [(QUERY, 1, "base64", 1)]
    rows = []
    for tokens, size, encoding, connections in cases:
        _, sources = _texts(path, tokens, size * max(64, connections))
        parts = [sources[at : at + size] for at in range(0, len(sources), size)]
        # nvidia-smi must not delay a lone query.
        with sampling(pid, 2.0 if size > 1 else 3600) as samples:
            load = drive_together(
                endpoint.url,
                [endpoint.request(part, encoding) for part in parts],
                texts=size,
                connections=connections,
                processes=options.clients,
                warm=min(3.0, options.seconds),
                seconds=options.seconds,
                pid=pid,
            )
        rows.append(
            {
                **{name: about[name] for name in ("model", "server", "setting")},
                "tokens": tokens,
                "texts": size,
                "encoding": encoding,
                "connections": connections,
                "tokens/s": load.rate * tokens,
                "p50 ms": load.p50,
                "p99 ms": load.p99,
                "failed": load.failed,
                "client": load.client,
                "cores": load.cores,
                "busy %": max(each["busy"] for each in samples),
                "gpu MiB": max(each["gpu"] for each in samples),
                "host MiB": max(each["host"] for each in samples),
                "ready s": about["ready s"],
                "cosine": about["cosine"],
                **idle,
            }
        )
    _report(options, stage, rows)


def memory(options: argparse.Namespace) -> None:
    """Memory under minutes of texts of mixed lengths."""
    for name, workers in itertools.product(options.only, options.workers):
        with _service(options, name, workers) as service:
            endpoint = Endpoint(service.url, "/v1/embeddings", name)
            source = texts(LOADS["mixed"], seed=1)
            requests = [endpoint.request(list(itertools.islice(source, 32))) for _ in range(256)]
            with sampling(service.process.pid, 10.0) as samples:
                load = drive_together(
                    service.url,
                    requests,
                    texts=32,
                    connections=options.connections,
                    processes=options.clients,
                    warm=5.0,
                    seconds=60 * options.minutes,
                    pid=service.process.pid,
                )
        _save(options, f"memory-{name}-samples", samples)
        loaded = samples[1:-1] or samples  # the first is before the load, the last after it
        figures: Row = {}
        for kind in ("gpu", "host"):
            values = [each[kind] for each in loaded]
            later = values[len(values) // 10 :]
            figures |= {
                f"{kind} first": values[0],
                f"{kind} at 10 %": later[0],
                f"{kind} last": values[-1],
                f"{kind} peak": max(values),
            }
        about = {"model": name, "workers": workers, "minutes": options.minutes}
        done = {"texts/s": load.rate, "failed": load.failed}
        _report(options, "memory", [{**about, **figures, **done}])


def oom(options: argparse.Namespace) -> None:
    """Requests that do not fit into the GPU's memory as one batch, while another process has taken
    nearly all of it: all are answered, with the vectors of before.
    """
    for name, left in itertools.product(options.only, options.leave):
        _, sources = _texts(options.work / "bundles" / name / name, options.tokens[-1], 512)
        parts = [sources[at : at + REQUEST] for at in range(0, len(sources), REQUEST)]
        with _service(options, name, 1) as service, contextlib.ExitStack() as stack:
            endpoint = Endpoint(service.url, "/v1/embeddings", name)
            workers, begun = service.workers(), len(service.log)
            few = [sources[at : at + 4] for at in range(0, len(sources), 4)]
            _, expected = ask(endpoint, few, at_a_time=1)
            before = gpu()[0]
            if options.device != "cpu":
                stack.enter_context(neighbour(left))
            statuses, actual = ask(endpoint, parts, at_a_time=len(parts))
            short = service.log[begun:].count("out of memory")
            used = gpu()[0]
            stack.close()
            after, again = ask(endpoint, parts, at_a_time=len(parts))
            row = {
                "model": name,
                "left MiB": left,
                "requests": len(parts),
                "answered": statuses.count(200),
                "halvings": short,
                "smallest cosine": smallest_cosine(expected, actual, centre=True),
                "then answered": after.count(200),
                "then cosine": smallest_cosine(expected, again, centre=True),
                "same workers": service.workers() == workers,
                "gpu before": before,
                "gpu then": used,
            }
        _report(options, "oom", [row])


def summary(options: argparse.Namespace) -> None:
    """Best figures of each stage, and what they are of each other."""
    found = _load(options)
    rows = []
    for name, tokens in itertools.product(options.only, options.tokens):
        best: dict[str, float] = {}
        for stage, column in (("loop", "how"), ("serve", "server"), ("infinity", "server")):
            for row in found.get(stage, []):
                if (row["model"], row["tokens"]) == (name, tokens):
                    label = row[column]
                    best[label] = max(best.get(label, 0.0), row["tokens/s"])
        if not best:
            continue
        ours, theirs = best.get("ours", 0.0), best.get("infinity", 0.0)
        passes = max(best.get("engine", 0.0), best.get("forward", 0.0))
        rows.append(
            {
                "model": name,
                "tokens": tokens,
                **{each: best.get(each, 0.0) for each in ("engine", "forward", "encode")},
                "ours": ours,
                "infinity": theirs,
                "ours / passes": ours / passes if passes else 0.0,
                "ours / infinity": ours / theirs if theirs else 0.0,
            }
        )
    if rows:
        _report(options, "summary", rows)


# What the stages share


@contextlib.contextmanager
def _service(options: argparse.Namespace, name: str, workers: int) -> Iterator[Service]:
    """A ready service of one model. Its log is added to the log of all.

    Raises: SystemExit, with the end of its log, when it does not start.
    """
    environ = {
        **UNLIMITED,
        "MODELS_DIR": str(options.work / "bundles" / name),
        "DEVICE": options.device,
        "PRECISION": options.precision,
        "WEB_CONCURRENCY": str(workers),
        **dict(options.env),
    }
    service = Service(options.work / "service.log", environ)
    try:
        try:
            service.wait_ready(PATIENCE)
        except OSError as error:
            raise SystemExit(f"{error}\n{service.log[-6000:]}") from None
        yield service
    finally:
        service.stop()
        with _log(options).open("a") as file:
            said = service.log
            end = said[10_000:][-10_000:]
            file.write(f"\n--- {name}, {workers} workers\n{said[:10_000]}\n[…]\n{end}")


@functools.cache
def _texts(bundle: pathlib.Path, tokens: int, number: int) -> tuple[Tokenizer, list[str]]:
    """The bundle's tokenizer, and so many different texts of so many tokens."""
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, sized_texts(tokenizer, tokens, number)


def _log(options: argparse.Namespace) -> pathlib.Path:
    path: pathlib.Path = options.work / "results" / "log.txt"
    return path


def _end_of_log(options: argparse.Namespace) -> str:
    return _log(options).read_text(errors="replace")[-6000:]


def _load(options: argparse.Namespace) -> dict[str, list[Row]]:
    """All rows so far, by stage."""
    path = options.work / "results" / "results.json"
    return json.loads(path.read_bytes()) if path.exists() else {}


def _save(options: argparse.Namespace, stage: str, rows: Sequence[Row]) -> None:
    """Add rows to a stage's."""
    found = _load(options)
    found[stage] = [*found.get(stage, []), *rows]
    (options.work / "results" / "results.json").write_text(json.dumps(found, indent=1))
    _copy(options)


def _copy(options: argparse.Namespace) -> None:
    if os.environ.get("OUT"):
        shutil.copytree(options.work / "results", os.environ["OUT"], dirs_exist_ok=True)


def _report(options: argparse.Namespace, stage: str, rows: Sequence[Row]) -> None:
    """Print a table, and save the rows."""
    _save(options, stage, rows)
    cells = [list(rows[0]), *([_cell(each) for each in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
    print(flush=True)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"


if __name__ == "__main__":
    main()
