"""README.md: its commands work as written."""

import json
import pathlib
import random
import re
import subprocess

import pytest

import tiny_clip
from servers import KEY, ROOT, Server

BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
CURLS = [
    command
    for block in BLOCKS
    for command in block.replace("\\\n", " ").splitlines()
    if command.startswith("curl")
]


@pytest.mark.usefixtures("shared")  # it says that bundles are needed
@pytest.mark.parametrize("command", CURLS)
def test_every_curl_gets_a_good_answer(
    command: str, request: pytest.FixtureRequest, tmp_path: pathlib.Path
) -> None:
    """Those for pictures from a service that takes them, with files of the names they use."""
    pictures = "/embeddings/image" in command
    service: Server = request.getfixturevalue("clip_service" if pictures else "service")
    for name in set(re.findall(r"[\w-]+\.jpg", command)):
        tiny_clip.picture("red", "square", random.Random(1)).save(tmp_path / name)
    command = command.replace("localhost:5001", f"127.0.0.1:{service.port}").replace("abc123", KEY)
    command = command.replace("curl ", "curl --silent --show-error --fail-with-body ", 1)
    out = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "error" not in json.loads(out.stdout)


def test_every_make_target_exists() -> None:
    named = set(re.findall(r"^(?:\w+=\S+ )?make (\w+)", "\n".join(BLOCKS), re.MULTILINE))
    assert named == {"run", "bake", "test", "format"}
    for target in named:
        dry = ["make", "--dry-run", target, "MODEL=some/model"]
        subprocess.run(dry, cwd=ROOT, check=True, capture_output=True)
