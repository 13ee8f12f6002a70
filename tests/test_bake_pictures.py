"""bake/pictures.py and the image towers: as each module saves them, and what is refused."""

import pathlib
from typing import Any

import pytest
import tiny_clip
import torch
import transformers
from baking import bake
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from transformers.image_utils import SizeDict

from bake import BakeError, windows
from bake.pictures import check_processor, read_processor
from bake.samples import sample_pictures
from engine.bundle import PARITY_FLOOR, Bundle, read
from engine.openvino_backend import available_precisions

EVERY = ("--precisions", "fp32,bf16,int8")


def siglip(folder: pathlib.Path) -> pathlib.Path:
    torch.manual_seed(0)
    words = tiny_clip.tokenizer()
    both = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    both["num_hidden_layers"] = 2
    text = {"vocab_size": len(words), "max_position_embeddings": 64, "projection_size": 64}
    config = transformers.SiglipConfig(
        text_config={**both, **text, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config={**both, "image_size": 64, "patch_size": 16},
    )
    plain = folder / "plain"
    transformers.SiglipModel(config).save_pretrained(plain)
    processor = transformers.SiglipImageProcessorPil(size={"height": 64, "width": 64})
    transformers.SiglipProcessor(processor, words).save_pretrained(plain)
    modules = [Transformer(str(plain)), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(
        str(folder / "siglip"), create_model_card=False
    )
    return folder / "siglip"


def certified(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.modalities == ["text", "image"]
    texts, pictures = manifest.parity["OpenVINO"], manifest.image_parity["OpenVINO"]
    assert texts.keys() == pictures.keys() == set(available_precisions())
    for precision in available_precisions():
        assert texts[precision].minimum >= PARITY_FLOOR[precision]
        assert pictures[precision].minimum >= PARITY_FLOOR[precision]
        assert pictures[precision].cases >= 30
    assert {"image.xml", "image.bin", "image-int8.xml", "preprocess.json"} <= manifest.files.keys()
    bundle.verify()


def test_the_legacy_clip_module(clip_models_dir: pathlib.Path, tiny_clip_folder: Any) -> None:
    assert "CLIPModel" in (tiny_clip_folder / "modules.json").read_text()
    bundle = read(clip_models_dir / "tiny-clip")
    certified(bundle)
    assert bundle.manifest.max_tokens == 77 and not bundle.manifest.normalized
    preprocessing = bundle.preprocessing()
    assert preprocessing.resize == 64 and preprocessing.crop == (64, 64)
    assert preprocessing.resampling == "bicubic" and preprocessing.tokens == 17


def test_clip_in_the_transformer_module(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[windows.Progress] = []

    class Progress(windows.Progress):
        def __init__(self, total: float) -> None:
            super().__init__(total)
            begun.append(self)

    monkeypatch.setattr(windows, "Progress", Progress)
    folder = tiny_clip.save(tmp_path / "clip", trained=False, legacy=False, patch_size=8)
    certified(bundle := bake(folder, tmp_path, *EVERY))
    assert bundle.preprocessing().tokens == 65  # both towers are of one size here
    # Vectors are embedded once, and once for what weights are rounded by, and compared for each
    # engine and precision; each of texts and of pictures.
    assert len(begun) == 4 + 2 * sum(map(len, bundle.manifest.parity.values()))
    assert all(progress._done == progress._total for progress in begun)


def test_siglip(tmp_path: pathlib.Path) -> None:
    """Its text tower pools at the last position: the certificate is over texts in batches."""
    certified(bundle := bake(siglip(tmp_path), tmp_path / "models", *EVERY))
    assert bundle.manifest.normalized and bundle.preprocessing().resize == (64, 64)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("resample", 2, None),
        ("size", {"longest_edge": 64}, "resizes by longest_edge"),
        ("do_center_crop", False, "different shapes"),
        ("do_normalize", False, "do_normalize"),
    ],
)
def test_processors(
    tiny_clip_folder: pathlib.Path, option: str, value: Any, says: str | None
) -> None:
    """What a processor does is followed, or refused by name; never passed over."""
    model = SentenceTransformer(str(tiny_clip_folder), device="cpu")
    processor = model[0].processor.image_processor

    setattr(processor, option, SizeDict(**value) if option == "size" else value)
    if says:
        with pytest.raises(BakeError, match=says):
            read_processor(model)
        return
    preprocessing = read_processor(model)
    pictures = sample_pictures()
    check_processor(model, preprocessing, pictures)
    setattr(processor, "image_mean", [0.9, 0.1, 0.1])
    with pytest.raises(BakeError, match="off by"):
        check_processor(model, preprocessing, pictures)
