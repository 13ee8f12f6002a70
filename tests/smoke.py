"""Check that a running service embeds, in any container, with any model. Needs only Python.

    python tests/smoke.py [--url http://localhost:5001] [--key abc123] [--wait 240]

Waits until it is ready, embeds texts, and checks the vectors. Prints one line; exits with 1 when
something is wrong.
"""

import argparse
import http.client
import json
import math
import os
import sys
import time
import urllib.error
import urllib.request
from typing import Any

TEXTS = ("A kitten plays with a ball of wool.", "The young cat chases yarn.", "Income tax is due.")


class Wrong(Exception):
    """A check failed. The message is one line."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:5001")
    parser.add_argument("--key", default=os.environ.get("VECTOR_EMBEDDER_API_KEY", "abc123"))
    parser.add_argument("--wait", type=float, default=240, help="seconds it may take to be ready")
    options = parser.parse_args()
    try:
        print(check(options.url.rstrip("/"), options.key, options.wait))
    except Wrong as error:
        sys.exit(f"smoke test of {options.url}: {error}")


def check(url: str, key: str, wait: float) -> str:
    """All checks, in order.

    Returns: what was found, in one line.
    Raises: Wrong.
    """
    started = time.monotonic()
    ready = wait_ready(url, wait)
    seconds = time.monotonic() - started
    for wrong in ({}, {"X-API-Key": key + "x"}):
        status, answer = call(url, "/embeddings", {"text": TEXTS[0]}, wrong)
        if status != 401:
            raise Wrong(f"without a valid key it answers {status}, not 401: {answer}")
    authorised = {"X-API-Key": key}
    status, answer = call(url, "/v1/models", None, authorised)
    if status != 200:
        raise Wrong(f"/v1/models answers {status}: {answer}")
    model = next(each for each in answer["data"] if each["id"] == ready["model"])
    status, answer = call(url, "/embeddings/batch", {"texts": TEXTS}, authorised)
    if status != 200:
        raise Wrong(f"/embeddings/batch answers {status}: {answer}")
    vectors: list[list[float]] = [vector for (vector,) in answer["embeddings"]]
    lengths = [math.sqrt(math.fsum(value * value for value in vector)) for vector in vectors]
    if [len(vector) for vector in vectors] != [model["dimensions"]] * len(TEXTS):
        raise Wrong(f"not {len(TEXTS)} vectors of {model['dimensions']} dimensions")
    if not all(0 < length < math.inf for length in lengths):
        raise Wrong(f"vectors of the lengths {lengths}")
    # /embed normalises, whether or not the model does. The direction must be the same.
    status, answer = call(url, "/embed", {"inputs": TEXTS[0]}, authorised)
    if status != 200:
        raise Wrong(f"/embed answers {status}: {answer}")
    unit: list[float] = answer[0]
    if abs(math.fsum(value * value for value in unit) - 1) > 1e-4:
        raise Wrong("/embed's vector is not of length 1")
    if dot(unit, vectors[0]) / lengths[0] < 0.999:
        raise Wrong("/embed gives another vector than /embeddings/batch")
    near = dot(vectors[0], vectors[1]) / lengths[0] / lengths[1]
    far = dot(vectors[0], vectors[2]) / lengths[0] / lengths[2]
    if not far < near < 0.99999:
        raise Wrong(f"similar texts have a cosine of {near:.3f}, unlike ones one of {far:.3f}")
    return (
        f"ok: {model['id']} at {model['precision']}, {model['dimensions']} dimensions, ready after "
        f"{seconds:.2f} s; cosine of similar texts {near:.3f}, of unlike ones {far:.3f}"
    )


def wait_ready(url: str, wait: float) -> dict[str, Any]:
    """Returns: the body of /health/ready once its status is 200.

    Raises: Wrong when it is not after `wait` seconds.
    """
    until = time.monotonic() + wait
    while True:
        try:
            status, answer = call(url, "/health/ready", None, {})
            if status == 200:
                return dict(answer)
            last = f"it answers {status}"
        except (OSError, http.client.HTTPException) as error:
            last = f"{type(error).__name__}: {error}"
        if time.monotonic() >= until:
            raise Wrong(f"not ready after {wait:g} s; {last}")
        time.sleep(0.05)


def call(url: str, path: str, body: Any, headers: dict[str, str]) -> tuple[int, Any]:
    """Send a request (a POST when there is a body). Returns: status and JSON of the response.

    Raises: OSError, HTTPException; Wrong when the response is not JSON.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {**headers, "Content-Type": "application/json"}
    request = urllib.request.Request(url + path, data, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            status, raw = response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            status, raw = error.code, error.read()
    try:
        return status, json.loads(raw)
    except ValueError:
        raise Wrong(f"{path} answers {status} without JSON: {raw[:80]!r}") from None


def dot(one: list[float], other: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main()
