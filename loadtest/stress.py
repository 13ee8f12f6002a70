"""What the stress commands share: command line, start of all workers, requests."""

import argparse
import asyncio
import random
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

import uvloop

from loadtest.loads import LOADS, STREAM, Target, some_requests
from loadtest.service import Service

PATIENCE = 20.0  # seconds


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


async def all_serving(service: Service, workers: int) -> None:
    """Wait until every worker serves: the service is ready with the first one.

    Raises: RuntimeError, with the log, after PATIENCE.
    """
    for _ in range(int(PATIENCE * 20)):
        if service.log.count(" main: serving ") >= workers:
            return
        await asyncio.sleep(0.05)
    raise RuntimeError(f"not all workers serve: {service.log}")


def queries(url: str) -> list[bytes]:
    return some_requests(Target(url), LOADS["query"], 50)


def long_batches(url: str) -> list[bytes]:
    """Requests that each keep the engine busy for seconds."""
    return some_requests(Target(url), STREAM, 4)


def mixed(url: str) -> list[bytes]:
    """Requests of all sizes in random order, half of them queries."""
    shares = {"query": 100, "passage": 50, "mixed": 20, "long": 10, "batch32": 20}
    target = Target(url)
    made = [each for name, n in shares.items() for each in some_requests(target, LOADS[name], n)]
    random.Random(1).shuffle(made)
    return made
