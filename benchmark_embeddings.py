"""How fast it is on this machine, and what to expect of it.

    python benchmark_embeddings.py [WHAT] [options]

WHAT: texts (the default), ceiling, padding, fairness, start or recommend.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence

from benchmark import in_process, measures, report
from benchmark.loads import DIALECTS, LOADS, Target
from benchmark.service import service
from engine.errors import EmbedderError
from settings import SettingsError

WHATS = ("texts", "ceiling", "padding", "fairness", "start", "recommend")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("what", nargs="?", choices=WHATS, default="texts")
    made.add_argument("--url", help="a running service instead of this process or one of its own")
    made.add_argument("--dialect", choices=DIALECTS, default="native", help="that --url speaks")
    made.add_argument("--path", help="of its route, where it is not the dialect's own")
    made.add_argument("--model-name", default="model", help="sent where the dialect wants one")
    made.add_argument("--against", metavar="URL", help="a second service, in alternating rounds")
    made.add_argument("--against-dialect", choices=DIALECTS, default="native")
    made.add_argument("--against-path")
    made.add_argument(
        "--loads", nargs="+", default=[], metavar="LOAD", help=f"some of {', '.join(LOADS)}"
    )
    made.add_argument("--connections", type=int, nargs="+", default=[1, 16])
    made.add_argument("--seconds", type=float, default=3.0, help="of one round")
    made.add_argument("--rounds", type=int, help="3; starts: 10")
    made.add_argument("--json", action="store_true", help="for machines")
    return made


@contextlib.contextmanager
def _target(options: argparse.Namespace) -> Iterator[Target]:
    """The service at --url, or one of our own."""
    if options.url:
        yield Target(options.url, options.dialect, options.path, options.model_name)
    else:
        with service() as running:
            yield Target(running.url)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 and one line when something needed is not there."""
    options = parser().parse_args(arguments)
    rounds = options.rounds or (10 if options.what == "start" else 3)
    try:
        if options.url and options.what == "texts":
            target = Target(options.url, options.dialect, options.path, options.model_name)
            other = Target(
                options.against, options.against_dialect, options.against_path, options.model_name
            )
            pairs = measures.http_loads(options.loads, options.connections, target)
            rows = measures.http(
                target, other if options.against else None, pairs, options.seconds, rounds
            )
            print(
                report.as_json("texts", report.machine(), rows)
                if options.json
                else report.table(rows)
            )
            return
        settings = in_process.settings()
        bundle = in_process.default_bundle(settings)
        conditions = f"{report.machine()}; {bundle.manifest.name}"
        if options.what == "ceiling":
            pairs = measures.usual_loads(options.loads)
            loads = {name: LOADS[name] for name, _ in pairs}
            ceilings = in_process.ceilings(settings, bundle, loads)
            with _target(options) as target:
                rows = measures.ceiling(target, ceilings, pairs, options.seconds, rounds)
        elif options.what == "fairness":
            with _target(options) as target:
                rows = measures.fairness(target, options.seconds, rounds)
        elif options.what == "start":
            rows = measures.start(rounds)
        else:
            sys.exit("not yet")
    except (OSError, EmbedderError, SettingsError) as error:
        sys.exit(f"cannot measure: {error}")
    if options.json:
        print(report.as_json(options.what, conditions, rows))
    else:
        print(conditions + "\n\n" + report.table(rows))


if __name__ == "__main__":
    main()
