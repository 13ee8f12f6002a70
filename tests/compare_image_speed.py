"""Pictures a second over HTTP, at ViT-B/32's full size with random weights (time does not depend on
them), against a plain Flask + sentence-transformers service on the same cores.

    PYTHONPATH=$PWD python tests/compare_image_speed.py FOLDER [rounds]

Both services run all the time and rounds alternate, so that other load on the machine affects both.
Processor seconds are printed too, since a busy machine favours the service with more threads.
FOLDER keeps the model and its bundle. Run it by hand; it takes some minutes.
"""

import io
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from PIL import Image
from servers import KEY, ROOT, free_port, serve

from loadtest import measures
from loadtest.client import get
from loadtest.loads import IMAGES, Target
from loadtest.report import table
from tests.stress.common import cpu_seconds

CONNECTIONS, SECONDS = 8, 4.0


def plain() -> Any:
    """The service that everybody writes first."""
    from flask import Flask, jsonify, request
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(os.environ["PLAIN_MODEL"], device="cpu")
    app = Flask(__name__)

    @app.post("/embeddings/image")
    def image() -> Any:
        picture = Image.open(io.BytesIO(request.get_data()))
        return jsonify(embeddings=model.encode([picture]).tolist())

    return app


def save_model(folder: pathlib.Path) -> None:
    import tiny_clip
    import torch
    import transformers

    torch.manual_seed(0)
    words = tiny_clip.tokenizer()
    end = words.convert_tokens_to_ids("<|endoftext|>")
    marks = {"vocab_size": len(words), "eos_token_id": end, "pad_token_id": end}
    # Everything else is ViT-B/32's: the defaults of transformers' configuration.
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=marks))
    tiny_clip.assemble(folder, model, words, tiny_clip.image_processor(224), legacy=True)


def used(pid: int) -> float:
    """Processor time of gunicorn's workers."""
    return sum(cpu_seconds(pid).values())


def main(folder: pathlib.Path, rounds: int) -> None:
    source = folder / "vit-b-32-random"
    if not source.exists():
        save_model(source)
    if not (folder / "models").exists():
        bake = [sys.executable, "bake_model.py", str(source), "--output", str(folder / "models")]
        subprocess.run(bake, cwd=ROOT, check=True)
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "--no-control-socket"]
    command += ["--threads", str(CONNECTIONS), "--bind", f"127.0.0.1:{port}"]
    other = subprocess.Popen(
        [*command, "compare_image_speed:plain()"],
        cwd=ROOT / "tests",
        env={**os.environ, "PLAIN_MODEL": str(source)},
    )
    os.environ["VECTOR_EMBEDDER_API_KEY"] = KEY
    precision = os.environ.get("PRECISION", "auto")
    against = f"http://127.0.0.1:{port}"
    try:
        with serve(folder / "models", PRECISION=precision) as server:
            while True:  # torch takes its time to load
                try:
                    get(against, "/")
                    break
                except OSError:
                    time.sleep(0.5)
            before = [used(server.process.pid), used(other.pid)]
            sides, loads = [Target(server.url), Target(against)], [(IMAGES, CONNECTIONS)]
            rows = measures.http(sides, loads, SECONDS, rounds)
            here, there = used(server.process.pid) - before[0], used(other.pid) - before[1]
            print(f"{precision}:\n{table(rows)}")
            print(f"processor time in all: here {here:.1f} s, plain {there:.1f} s")
    finally:
        other.terminate()
        other.wait()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
