"""Measure how fast the service is on this machine, and how to deploy it.

    python benchmark_embeddings.py [WHAT] [--url URL] [--json] [--plot FILE.png] …

WHAT is one of
  texts      (the default) texts of exactly 200, 500 and 1000 tokens, and pictures where the model
             takes them, by one caller and by 16 at a time, at each precision, in this process,
             beside sentence-transformers; with --url a running service over HTTP, alone or
             --against another in alternating rounds
  ceiling    served texts as a share of what the engine alone does with the same texts
  padding    the share of padding in what the engine computes
  fairness   a client's single queries while another sends large batches one after another
  start      from the start of the process to ready, memory, first request, exit
  recommend  CPU, memory, concurrency, workers and precision for Cloud Run, and what a million
             texts cost there (also: --recommend)

All but `texts` start a service of their own, or take --url. The model is the default one of
MODELS_DIR, and the service's own variables apply; the key is read from VECTOR_EMBEDDER_API_KEY.
Loads over HTTP are closed loops of random texts, all different: query (8-18 words), passage
(90-120), mixed (4-200), long (380-420), batch32 (32 texts of 4-120 words a request).
"""

import argparse
import contextlib
import importlib.util
import pathlib
import signal
import sys
from collections.abc import Iterator, Sequence

from engine.bundle import Manifest
from engine.errors import EmbedderError
from loadtest import in_process, measures, recommend, report
from loadtest.loads import DIALECTS, IMAGES, LOADS, Target, usual
from loadtest.machine import Usage, machine, ticks
from loadtest.recommend import Advice, Prices
from loadtest.reference import Reference
from loadtest.report import Row
from loadtest.service import serve
from settings import SettingsError

WHATS = ("texts", "ceiling", "padding", "fairness", "start", "recommend")
PLOTTED = ("texts", "recommend")
RECOMMEND_LOAD = "mixed"
RECOMMEND_CONNECTIONS = [1, 2, 4, 8, 16, 32, 64]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with 2 and a line where it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", nargs="?", choices=WHATS, default="texts", metavar="WHAT")
    add("--recommend", action="store_true", help="as WHAT")
    add("--url", help="measure this running service")
    add("--dialect", choices=DIALECTS, default="native", help="of --url")
    add("--path", help="instead of the dialect's own route")
    add("--model-name", default="model", help="sent where a dialect requires one")
    add("--against", metavar="URL", help="compare with this service")
    add("--against-dialect", choices=DIALECTS, default="native")
    add("--against-path")
    add("--model", help="for sentence-transformers: folder or name; default: the bundle's source")
    add("--tokens", type=_positive, nargs="+", default=[200, 500, 1000], help="in process")
    add("--loads", nargs="+", default=[], metavar="LOAD", help="only these, as query or query-c16")
    add("--connections", type=_positive, nargs="+", help="at a time: 1 16; recommend: 1 to 64")
    add("--p99", type=float, default=500.0, help="ms, the limit for recommend (default 500)")
    for field, price in Prices()._asdict().items():
        flag = f"--{field.replace('_', '-')}"
        add(flag, type=float, default=price, metavar="USD", help="price, for recommend's cost")
    add("--seconds", type=float, default=2.0, help="of a round (default 2; slow loads take more)")
    add("--rounds", type=_positive, help="default 3; start: 10; recommend: 1")
    add("--json", action="store_true", help="print JSON")
    add("--plot", type=pathlib.Path, metavar="FILE.png", help="throughput and p99 as a picture")
    options = parser.parse_args(arguments)
    options.what = "recommend" if options.recommend else options.what
    options.rounds = options.rounds or {"start": 10, "recommend": 1}.get(options.what, 3)
    defaults = {"texts": [1, 16], "recommend": RECOMMEND_CONNECTIONS}
    options.connections = options.connections or defaults.get(options.what)
    known = [*LOADS, IMAGES]
    if options.what != "recommend":
        known += [f"{name}-c{number}" for name, number in usual([], options.connections)]
    unknown = [name for name in options.loads if name not in known]
    if unknown:
        parser.error(f"no load {unknown[0]!r}; there is: {', '.join(known)}")
    if options.plot and options.what not in PLOTTED:
        parser.error(f"--plot draws {' and '.join(PLOTTED)}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.exit(2, "--plot needs matplotlib: pip install -r requirements-plot.txt\n")
    if options.against and not (options.url and options.what == "texts"):
        parser.error("--against needs --url, and compares texts")
    if options.url and options.what in ("padding", "start", "recommend"):
        parser.error(f"{options.what} takes no --url")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 and one line when something needed is not there."""
    options = parse(arguments)
    try:
        before = ticks()
        conditions, rows, advice = measure(options)
        usage = Usage(before, ticks())
        if not rows:
            raise ValueError("none of these loads is measured here")
        if options.plot:
            report.plot(rows, options.plot, f"{options.what}: {conditions}")
    except (OSError, ValueError, EmbedderError, SettingsError) as error:
        sys.exit(f"cannot measure: {error}")
    if options.json:
        more = {"recommended": advice._asdict()} if advice else {}
        print(report.as_json(options.what, conditions, rows, machine=str(usage), **more))
        return
    print(f"{options.what}: {conditions}\n{_said(usage, options)}\n\n{report.table(rows)}")
    if advice:
        print("\n" + recommend.text(advice))


def _said(usage: Usage, options: argparse.Namespace) -> str:
    """How busy the machine was, and what that means for the figures."""
    if options.url:
        return f"machine: {usage}; a service measured on this machine is one of these processes"
    verdict = "not quiet: measure again when it is" if usage.busy else "quiet"
    return f"machine: {usage}: {verdict}"


def measure(options: argparse.Namespace) -> tuple[str, list[Row], Advice | None]:
    """Returns: the machine and model, the rows, and for `recommend` the advice."""
    what, seconds, rounds = options.what, options.seconds, options.rounds
    loads = usual(options.loads, options.connections)
    if options.url and what != "ceiling":
        with _target(options) as target:
            conditions = f"{measures.model(target)}, client on {machine()}"
            return conditions, _measure_service(options, target, loads), None
    settings = in_process.settings()
    bundle = in_process.default_bundle(settings)
    advice = None
    if what == "texts":
        with _reference(bundle.manifest, options.model) as reference:
            lengths, callers = options.tokens, options.connections
            rows = in_process.speed(settings, bundle, reference, lengths, callers, seconds, rounds)
    elif what == "start":
        rows = measures.start(rounds)
    elif what == "recommend":
        load = options.loads[0] if options.loads else RECOMMEND_LOAD
        points, parity = recommend.measure(bundle, load, options.connections, seconds, rounds)
        rows = [point._asdict() for point in points]
        prices = Prices(options.vcpu_second, options.gib_second, options.million_requests)
        advice = recommend.recommend(points, parity, options.p99, prices)
    elif what == "ceiling":
        ceilings = in_process.ceilings(settings, bundle, {name for name, _ in loads})
        with _target(options) as target:
            rows = measures.ceiling(target, ceilings, loads, seconds, rounds)
    else:
        with _target(options) as target:
            rows = _measure_service(options, target, loads)
    return f"{bundle.manifest.name}, {machine()}", rows, advice


def _measure_service(
    options: argparse.Namespace, target: Target, loads: list[tuple[str, int]]
) -> list[Row]:
    """Texts, padding or fairness."""
    if options.what == "fairness":
        return measures.fairness(target, options.seconds, options.rounds)
    if options.what == "padding":
        several = [(name, number) for name, number in loads if number > 1]
        return measures.padding(target, several, options.seconds)
    if IMAGES in options.loads or not options.loads and measures.takes_images(target):
        loads = loads + [(IMAGES, number) for number in options.connections]
    targets = [target]
    if options.against:
        dialect, path = options.against_dialect, options.against_path
        targets.append(Target(options.against, dialect, path, options.model_name))
    return measures.http(targets, loads, options.seconds, options.rounds)


@contextlib.contextmanager
def _target(options: argparse.Namespace) -> Iterator[Target]:
    """The service at --url, or one of our own."""
    if options.url:
        yield Target(options.url, options.dialect, options.path, options.model_name)
    else:
        with serve() as running:
            yield Target(running.url)


@contextlib.contextmanager
def _reference(manifest: Manifest, model: str | None) -> Iterator[Reference | None]:
    """sentence-transformers. Unless a model was asked for, None and a line on stderr where it is
    not installed or has no such model.
    """
    try:
        reference = Reference(manifest, model)
    except OSError as error:
        if model:
            raise
        print(f"without sentence-transformers beside it: {error}", file=sys.stderr)
        yield None
        return
    with contextlib.closing(reference):
        yield reference


if __name__ == "__main__":
    # As Ctrl-C does, so that the service it started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
