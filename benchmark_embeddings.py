"""How fast a running service is, over HTTP: texts and, where its model takes them, pictures.

    python benchmark_embeddings.py [--url http://localhost:5001] [--against URL] [--seconds 5] …

Prints texts or pictures a second and the latency of each load. With --against the same load goes to
a second service in alternating rounds, and the ratio is taken round by round, so that a machine
whose speed drifts does not bend it. The key is read from VECTOR_EMBEDDER_API_KEY (default abc123).
The loop is closed (a connection sends when it has its answer) and takes some of the machine itself.
"""

import argparse
import http.client
import io
import itertools
import json
import os
import statistics
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had which one you were all she there would their we him been has when who will more no if out "
    "water house music river mountain history science energy market company city school student "
    "system number model search query answer question document language translation computer "
    "photosynthesis jurisprudence archipelago mitochondrial cryptography embeddings microservice"
).split()
WORDS_A_TOKEN = 0.8  # of these words, for tokenizers of English: good enough to name a load


class Load(NamedTuple):
    path: str
    content_type: str
    bodies: Sequence[bytes]  # sent in turn


class Result(NamedTuple):
    """One service under one load for one round."""

    rate: float  # answers a second
    p50: float  # ms
    p99: float  # ms
    failed: int  # answers other than 200


class Row(NamedTuple):
    """One load, as medians over the rounds."""

    load: str
    connections: int
    rate: float
    p50: float
    p99: float
    failed: int
    ratio: float | None  # to the other service's rate


def text_load(tokens: int, count: int = 256) -> Load:
    """Texts of about `tokens` tokens, all different."""
    random = np.random.default_rng(tokens)
    texts = (" ".join(random.choice(WORDS, int(tokens * WORDS_A_TOKEN))) for _ in range(count))
    return Load(
        "/embeddings", "application/json", [json.dumps({"text": t}).encode() for t in texts]
    )


def image_load(count: int = 16) -> Load:
    """JPEGs of 640 x 480 pixels with the soft shapes of a photograph, all different."""
    random = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (60, 80, 3)).astype(np.uint8))
        file = io.BytesIO()
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        files.append(file.getvalue())
    return Load("/embeddings/image", "image/jpeg", files)


def run(url: str, load: Load, connections: int, seconds: float) -> Result:
    """Send one load for some seconds.

    Raises: OSError when the service cannot be reached.
    """
    address = urllib.parse.urlsplit(url)
    key = os.environ.get("VECTOR_EMBEDDER_API_KEY", "abc123").partition(",")[0]
    headers = {"Content-Type": load.content_type, "X-API-Key": key}
    path, bodies = address.path.rstrip("/") + load.path, itertools.cycle(load.bodies)
    latencies: list[float] = []
    failures: list[int] = []
    errors: list[OSError | http.client.HTTPException] = []
    started = time.perf_counter()

    def client() -> None:
        connection = http.client.HTTPConnection(address.netloc, timeout=120)
        try:
            while (sent := time.perf_counter()) < started + seconds:
                connection.request("POST", path, next(bodies), headers)
                answer = connection.getresponse()
                answer.read()
                if answer.status == 200:
                    latencies.append(time.perf_counter() - sent)
                else:
                    failures.append(answer.status)
        except (OSError, http.client.HTTPException) as error:
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=client) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise OSError(f"{url}: {errors[0]}")
    took = time.perf_counter() - started
    p50, p99 = np.percentile(latencies or [0.0], (50, 99)) * 1e3
    return Result(len(latencies) / took, float(p50), float(p99), len(failures))


def measure(
    url: str, against: str | None, load: Load, connections: int, seconds: float, rounds: int
) -> tuple[list[Result], list[Result]]:
    """Alternate rounds between two services, after a short one that warms both up.

    Returns: the results of `url`, and of `against` (none when that is None).
    """
    sides: list[tuple[str, list[Result]]] = [(url, [])]
    if against:
        sides.append((against, []))
    for number in range(rounds + 1):
        for side, results in sides if number % 2 else sides[::-1]:
            result = run(side, load, connections, seconds if number else min(1.0, seconds))
            if number:
                results.append(result)
    return sides[0][1], sides[-1][1] if against else []


def summarise(name: str, connections: int, here: Sequence[Result], there: Sequence[Result]) -> Row:
    """Medians; no ratio where either side failed a request or answered none."""
    failed = sum(result.failed for result in (*here, *there))
    ratios = [one.rate / other.rate for one, other in zip(here, there) if other.rate]
    return Row(
        name,
        connections,
        statistics.median(result.rate for result in here),
        statistics.median(result.p50 for result in here),
        statistics.median(result.p99 for result in here),
        failed,
        statistics.median(ratios) if ratios and not failed else None,
    )


def takes_images(url: str) -> bool:
    """Whether the service's default model takes pictures; False where it does not say.

    Raises: OSError when the service cannot be reached.
    """
    try:
        with urllib.request.urlopen(url.rstrip("/") + "/health/ready", timeout=30) as answer:
            return bool(json.loads(answer.read()).get("supports_images"))
    except (urllib.error.HTTPError, ValueError, AttributeError):
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 1 and one line when the service cannot be reached."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:5001")
    parser.add_argument("--against", metavar="URL", help="a second service with the same routes")
    parser.add_argument("--tokens", type=int, nargs="+", default=[20, 200, 500, 1000])
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=5.0, help="of one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of a table")
    options = parser.parse_args(arguments)
    try:
        loads = {f"text-{tokens}": text_load(tokens) for tokens in options.tokens}
        if takes_images(options.url):
            loads["image-640x480"] = image_load()
        rows = []
        if not options.json:
            print("| load | connections | a second | p50 ms | p99 ms | failed | ratio |")
            print("|---|---|---|---|---|---|---|")
        for (name, load), connections in itertools.product(loads.items(), options.connections):
            sides = measure(
                options.url, options.against, load, connections, options.seconds, options.rounds
            )
            row = summarise(name, connections, *sides)
            rows.append(row)
            if not options.json:
                ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
                print(
                    f"| {name} | {connections} | {row.rate:.1f} | {row.p50:.1f} | {row.p99:.1f} | "
                    f"{row.failed} | {ratio} |",
                    flush=True,
                )
    except (OSError, http.client.HTTPException) as error:
        sys.exit(f"cannot measure: {error}")
    if options.json:
        print(json.dumps([row._asdict() for row in rows], indent=1))


if __name__ == "__main__":
    main()
