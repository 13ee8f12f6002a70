"""Pictures a second over HTTP, at ViT-B/32's full size with random weights (time does not depend on
them), against a plain Flask + sentence-transformers service on the same cores.

    python tests/compare_image_speed.py FOLDER [rounds]

Both services run all the time, and rounds alternate, so that what else the machine does hits both.
Processor seconds a picture are stated too: a busy machine serves the one with more threads better.
FOLDER keeps the model and its bundle. Run by hand; takes some minutes.
"""

import io
import os
import pathlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
from PIL import Image

from servers import ROOT, free_port, serve

CONNECTIONS, PICTURES = 8, 96
HEADERS = {"Content-Type": "image/jpeg"}


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
    import torch
    import transformers

    import tiny_clip

    torch.manual_seed(0)
    words = tiny_clip.tokenizer()
    end = words.convert_tokens_to_ids("<|endoftext|>")
    marks = {"vocab_size": len(words), "eos_token_id": end, "pad_token_id": end}
    # Everything else is ViT-B/32's: the defaults of transformers' configuration.
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=marks))
    tiny_clip.assemble(folder, model, words, tiny_clip.image_processor(224), legacy=True)


def jpegs() -> list[bytes]:
    random = np.random.default_rng(0)
    files = []
    for _ in range(16):
        coarse = Image.fromarray(random.integers(0, 256, (60, 80, 3)).astype(np.uint8))
        file = io.BytesIO()
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        files.append(file.getvalue())
    return files


def rate(client: httpx.Client, files: list[bytes], count: int) -> float:
    def send(number: int) -> None:
        data = files[number % len(files)]
        answer = client.post("/embeddings/image", content=data, headers=HEADERS)
        assert answer.status_code == 200, answer.text

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        started = time.perf_counter()
        list(pool.map(send, range(count)))
        return count / (time.perf_counter() - started)


def cpu_seconds(pid: int) -> float:
    """Of a process's children, gunicorn's workers."""
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ticks = 0
    for child in children:
        fields = pathlib.Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main(folder: pathlib.Path, rounds: int) -> None:
    source = folder / "vit-b-32-random"
    if not source.exists():
        save_model(source)
    if not (folder / "models").exists():
        bake = [sys.executable, "bake_model.py", str(source), "--output", str(folder / "models")]
        subprocess.run(bake, cwd=ROOT, check=True)
    files, port = jpegs(), free_port()
    command = [sys.executable, "-m", "gunicorn", "--threads", str(CONNECTIONS)]
    other = subprocess.Popen(
        [*command, "--bind", f"127.0.0.1:{port}", "compare_image_speed:plain()"],
        cwd=ROOT / "tests",
        env={**os.environ, "PLAIN_MODEL": str(source)},
    )
    precision = os.environ.get("PRECISION", "auto")
    try:
        with (
            serve(folder / "models", PRECISION=precision) as server,
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
        ):
            while True:
                try:
                    rate(client, files, 8)
                    break
                except httpx.TransportError:
                    time.sleep(0.5)
            rate(server.client, files, 16)
            ratios = []
            for _ in range(rounds):
                used = [cpu_seconds(other.pid), cpu_seconds(server.process.pid)]
                theirs = rate(client, files, PICTURES // 3)
                ours = rate(server.client, files, PICTURES)
                ratios.append(ours / theirs)
                cpu_theirs = (cpu_seconds(other.pid) - used[0]) / (PICTURES // 3)
                cpu_ours = (cpu_seconds(server.process.pid) - used[1]) / PICTURES
                print(
                    f"here {ours:.1f}/s, plain {theirs:.1f}/s, {ratios[-1]:.2f} times; "
                    f"processor time here {cpu_ours * 1e3:.0f} ms, plain {cpu_theirs * 1e3:.0f} ms "
                    f"a picture, {cpu_theirs / cpu_ours:.2f} times",
                    flush=True,
                )
            print(f"{precision}: median {np.median(ratios):.2f} times")
    finally:
        other.terminate()
        other.wait()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
