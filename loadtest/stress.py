"""The command line and the requests that the stress commands share."""

import argparse
import random
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

import uvloop

from loadtest.loads import Load, Target, some_requests


class Report(Protocol):
    """What a stress command found. Its text is printed."""

    @property
    def good(self) -> bool: ...


def run(
    description: str | None,
    command: Callable[..., Coroutine[Any, Any, Report]],
    arguments: Sequence[str] | None = None,
    **options: bool | int | float,
) -> None:
    """Call `command` with options from the command line and print its report. Exits with 1 when the
    report is not good.

    Args:
        options: names and defaults; a default of False makes a flag.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in options.items():
        flag = "--" + name.replace("_", "-")
        if default is False:
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(default), default=default)
    report = uvloop.run(command(**vars(parser.parse_args(arguments))))
    print(report)
    sys.exit(not report.good)


def queries(url: str) -> list[bytes]:
    """Requests of one text of 20 words."""
    return some_requests(Target(url), Load(20, 20, ()), 50)


def long_batches(url: str) -> list[bytes]:
    """Requests of 90 texts of 250 words."""
    return some_requests(Target(url), Load(250, 250, (), texts=90), 4)


def mixed(url: str) -> list[bytes]:
    """Requests of all sizes: half are queries of 10 words, then passages, pages and batches."""
    loads = {
        Load(10, 10, ()): 100,
        Load(100, 100, ()): 60,
        Load(400, 400, ()): 10,
        Load(20, 20, (), texts=8): 10,
        Load(10, 10, (), texts=20): 10,
        Load(100, 100, (), texts=4): 10,
    }
    target = Target(url)
    made = [each for load, number in loads.items() for each in some_requests(target, load, number)]
    random.Random(1).shuffle(made)
    return made
