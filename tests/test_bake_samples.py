"""bake/samples.py: the lengths of the texts, and which picture is the first."""

import pathlib

import numpy as np
import pytest
from baking import PROMPTS, Baked

from bake.samples import beginning, sample_pictures, sample_texts
from engine.bundle import read
from engine.certificate import read_pictures
from image_embeddings import probe_picture
from tokens import load_tokenizer


@pytest.mark.parametrize("window", [64, 512, 1024, 8192])
def test_the_sample_reaches_from_one_token_to_the_window(baked: Baked, window: int) -> None:
    tokenizer = load_tokenizer(baked.bundle)[0]
    prompt = PROMPTS["query"]
    texts = sample_texts(tokenizer, prompt, window, 120)
    lengths = [len(tokenizer.encode(prompt + text).ids) for text in texts]
    assert len(texts) == 120 and len(set(texts)) > 100
    assert min(lengths) == len(tokenizer.encode(prompt + "a").ids)
    assert window - 3 <= max(lengths) <= window
    # Attention costs the square of the length: what takes a minute at 512 may not take hours.
    assert sum(length**2 for length in lengths) < 120 * 512**2 / 2 + 2 * window**2
    if window > 512:  # a large model computes the others faster than the longest ones
        assert sum(lengths) < 1.5 * window + 5000
        assert sum(length > 64 for length in lengths) == (4 if window == 8192 else 2)
        assert sum(50 < length <= 64 for length in lengths) > 15


def test_a_beginning_is_never_longer_nor_white_space(baked: Baked) -> None:
    tokenizer = load_tokenizer(baked.bundle)[0]
    assert beginning("What is deep learning?", tokenizer, "", 4) == "What is "
    assert beginning("   What", tokenizer, "", 2) == "a"
    assert beginning("What", tokenizer, "", 2) == "a"


def test_the_probe_is_the_first_picture(clip_models_dir: pathlib.Path) -> None:
    """Of the sample, whose vectors a bundle holds, and so the manifest's probe."""
    assert sample_pictures()[0] == probe_picture()
    bundle = read(clip_models_dir / "tiny-clip")
    vectors = read_pictures(bundle)
    assert len(vectors) == len(sample_pictures())
    assert np.allclose(vectors[0], bundle.manifest.image_probe)
