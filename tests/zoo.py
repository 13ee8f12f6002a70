"""Bake kinds of models, each in a process of its own, and write docs/models.md's table of them.

    python tests/zoo.py [KIND …]   bakes these; without any, all of which there is no result yet
    python tests/zoo.py --table    writes the table of the results
    python tests/zoo.py --list     prints the kinds

Results are lines of JSON in a file, one for each kind; a kind that is baked again gets a new one.
Of each bundle, what serving gives at PRECISION=auto is compared with sentence-transformers' own
vectors once more, for texts that the bake has not seen. tests/zoo_kinds.py has the kinds.

This process imports what the bake does, and forks: times are without imports. torch computes with
one thread, as tiny_models sets it.
"""

import argparse
import json
import math
import os
import pathlib
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- python tests/zoo.py --table -->\n", "<!-- the table ends -->\n"
PRECISIONS, ENGINES = ("fp32", "bf16", "int8"), ("own engine", "OpenVINO", "torch")
SERVED = 0.999  # smallest cosine that serving at PRECISION=auto may give
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 when a bake ended in any way but with a bundle or one line, or
    when what is served is wrong.
    """
    options = _parser().parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    from zoo_kinds import KINDS, LARGE  # here, since it imports torch

    rows = read(options.results)
    if options.list:
        return print("\n".join([*KINDS, *LARGE]))
    if options.table:
        return write_table(rows[kind] for kind in [*KINDS, *LARGE] if kind in rows)
    wrong = []
    for kind in options.kinds or [kind for kind in KINDS if kind not in rows]:
        row = {"kind": kind, **try_kind(kind)}
        with options.results.open("a") as file:
            print(json.dumps(row, ensure_ascii=False), file=file)
        verdict = judge(row)
        print(f"{kind}: {verdict or ('baked' if row['bundle'] else row['line'])}", flush=True)
        wrong += [kind] if verdict else []
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("kinds", nargs="*", metavar="KIND", help="as --list names it")
    add("--list", action="store_true", help="bake nothing; print the kinds")
    add("--table", action="store_true", help="bake nothing; write the table")
    results = pathlib.Path(tempfile.gettempdir()) / "zoo.jsonl"
    add("--results", type=pathlib.Path, default=results, metavar="FILE", help="where results are")
    return parser


def read(results: pathlib.Path) -> dict[str, Row]:
    """The last row of each kind."""
    if not results.exists():
        return {}
    return {row["kind"]: row for row in map(json.loads, results.read_text().splitlines())}


def try_kind(name: str) -> Row:
    """Make a model, bake it, serve it.

    Returns: `bundle`, whether there is one; `line`, what the bake said if not; else what the
        manifest says, and `cosine`, as `serve`; `seconds` and `megabytes` that the bake took.
    """
    from zoo_kinds import KINDS, LARGE, own_vectors

    import bake_model

    kind = {**KINDS, **LARGE}[name]
    with tempfile.TemporaryDirectory() as parent:
        folder, output = pathlib.Path(parent) / "model", pathlib.Path(parent) / "bundles"

        def make() -> Any:
            made = kind.make(folder)
            return str(made), own_vectors(kind, made) if name in KINDS else None

        made, said, _ = in_child(make)
        if made is None:
            return {"bundle": False, "made": False, "line": said.splitlines()[-1]}
        model, expected = made
        command = [model, *kind.options, "--name", "kind", "--output", str(output)]
        done, said, cost = in_child(lambda: bake_model.main(command) or True)
        if done is None:
            line = said.splitlines()[-1]
            left = [path.name for path in output.rglob("*")]
            clean = line.startswith("cannot bake ") and "Traceback" not in said and not left
            line = line.removeprefix(f"cannot bake {model}: ").replace(str(model), "MODEL")
            return {"bundle": False, "made": True, "clean": clean, "line": line, **cost}
        bundle = output / "kind"
        cosine, said, _ = in_child(lambda: serve(bundle, expected))
        served = {"cosine": -1.0, "line": said.splitlines()[-1]} if cosine is None else {}
        manifest = json.loads((bundle / "manifest.json").read_text())
        return {"bundle": True, **described(manifest), **cost, "cosine": cosine, **served}


def in_child(work: Callable[[], Any]) -> tuple[Any, str, Row]:
    """Run a function in a process of its own.

    Returns: what it returns, None if it fails; what it printed; its cost: `seconds` of CPU
        time, which other work on the machine does not change, and its peak of `megabytes`.
    """
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as result:
        child = os.fork()
        if not child:
            for stream in (1, 2):
                os.dup2(said.fileno(), stream)
            try:
                json.dump(work(), result)
                result.flush()
            except SystemExit as ended:
                print(ended, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(0)
        _, _, used = os.wait4(child, 0)
        said.seek(0)
        result.seek(0)
        value = json.loads(result.read() or "null")
        seconds = used.ru_utime + used.ru_stime
        cost = {"seconds": round(seconds, 1), "megabytes": round(used.ru_maxrss * 1.024 / 1000)}
        return value, said.read().strip() or "it died", cost


def described(manifest: Row) -> Row:
    """What a manifest says of the engine that serves each precision."""
    parity, precisions = manifest["parity"], {}
    for precision in PRECISIONS:
        backend = next((each for each in ENGINES if precision in parity.get(each, {})), None)
        if backend and precision in manifest["precisions"]:
            found = parity[backend][precision]
            smallest = [found["alone"], found["minimum"], found["mean"]]
            precisions[precision] = {"engine": backend, "cosines": smallest}
    return {
        "window": manifest["max_tokens"],
        "pictures": "image" in manifest["modalities"],
        "precisions": precisions,
    }


def serve(folder: pathlib.Path, expected: Any) -> float:
    """Load a bundle as the service does, with every default, and embed tiny.TEXTS, each alone.

    Args:
        expected: sentence-transformers' own vectors, or None.

    Returns: the smallest cosine to them; 1 where there are none.
    """
    import numpy as np
    import tiny_models as tiny

    import main as service
    import settings
    from engine import bundle as bundles
    from engine.queue import Queue

    options = settings.load({})
    queue = Queue(
        max_batch_size=options.max_batch_size,
        max_batch_tokens=options.max_batch_tokens,
        max_queue_tokens=1 << 30,
        threads=options.inference_threads,
    )
    queue.start()
    embedder = service.load_embedders(bundles.read(folder), options, queue).embedder
    smallest = 1.0
    for text, vector in zip(tiny.TEXTS, expected or []):
        (found,) = embedder.embed([text], deadline=time.monotonic() + 60, truncate="right")
        lengths = np.linalg.norm(found.vector) * np.linalg.norm(vector)
        smallest = min(smallest, float(found.vector @ np.array(vector) / lengths))
    return smallest


def judge(row: Row) -> str:
    """What is wrong with a result; empty when nothing is."""
    if row["bundle"]:
        right = row["cosine"] >= SERVED
        return "" if right else f"served at cosine {row['cosine']:.5f} {row.get('line', '')}"
    if not row["made"]:
        return f"not made: {row['line']}"
    return "" if row["clean"] else f"no clean refusal: {row['line']}"


def write_table(rows: Iterable[Row]) -> None:
    """Replace the table in PAGE."""
    text = PAGE.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(before + BEGIN + "\n" + table(rows) + "\n" + END + after)


def table(rows: Iterable[Row]) -> str:
    """Two tables of Markdown: what was baked, and what was refused."""
    rows = list(rows)
    head = ["kind", "window", "engine", *PRECISIONS, "bake"]
    baked = [_baked(row) for row in rows if row["bundle"]]
    refused = [[row["kind"], row["line"]] for row in rows if not row["bundle"]]
    return f"{_markdown(head, baked)}\n{_markdown(['refused kind', 'what the bake says'], refused)}"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [" | ".join(row) for row in (head, *cells)]
    lines.insert(1, "---|" * (len(head) - 1) + "---")
    return "".join(f"|{line}|\n" if "---|" in line else f"| {line} |\n" for line in lines)


def _baked(row: Row) -> list[str]:
    precisions = row["precisions"]
    engines = list(dict.fromkeys(found["engine"] for found in precisions.values()))
    cells = []
    for precision in PRECISIONS:
        if precision not in precisions:
            cells.append("no")
            continue
        alone, least, _ = precisions[precision]["cosines"]
        cells.append(f"{_cut(alone)} / {_cut(least)}")
    cost = f"{row['seconds']:.0f} s, {row['megabytes']:,} MB"
    engine = " and ".join(engines) + (", pictures too" if row["pictures"] else "")
    return [row["kind"], f"{row['window']:,}", engine, *cells, cost]


def _cut(cosine: float) -> str:
    """Rounded down: what is below its floor must not look as if it were above."""
    return f"{math.floor(min(cosine, 1.0) * 1e5 + 1e-6) / 1e5:.5f}"


if __name__ == "__main__":
    main()
