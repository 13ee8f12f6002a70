"""bake/stages.py: the manifest of all-MiniLM-L6-v2, baked with every default."""

import datetime
import hashlib
import importlib.metadata
import pathlib
from typing import Any

import numpy as np
import pytest
from conftest import NAME, WIDE

from bake.samples import PROBE_TEXT
from engine import bundle as bundles


def test_the_manifest_of_the_real_model(
    models_dir: pathlib.Path, sentence_transformer: Any
) -> None:
    for name, window in ((NAME, 256), (WIDE, 512)):
        bundle = bundles.read(models_dir / name)
        manifest = bundle.manifest
        assert manifest.name == name and manifest.source == f"sentence-transformers/{name}"
        assert manifest.revision is None  # of a folder
        assert manifest.modalities == ["text"]
        assert manifest.dimensions == 384 and manifest.max_tokens == window
        assert manifest.normalized and manifest.similarity == "cosine"
        assert not any(manifest.prompts.values()) and manifest.default_prompt is None
        created = datetime.datetime.fromisoformat(manifest.created)
        assert created.utcoffset() == datetime.timedelta(0)
        assert manifest.versions["openvino"] == importlib.metadata.version("openvino")
        assert manifest.probe.text == PROBE_TEXT
        expected = sentence_transformer.encode(manifest.probe.text)
        assert np.array(manifest.probe.vector) == pytest.approx(expected, abs=1e-5)

        graphs = {"text.xml", "text.bin", "text-int8.xml", "text-int8.bin"}
        assert set(manifest.files) == {"tokenizer.json", "sample.npz", "text.safetensors", *graphs}
        assert manifest.files["sample.npz"].size < 500_000
        assert {path.name for path in bundle.path.iterdir()} == {*manifest.files, "manifest.json"}
        for file, stated in manifest.files.items():
            data = bundle.file(file).read_bytes()
            assert (stated.size, stated.sha256) == (len(data), hashlib.sha256(data).hexdigest())
