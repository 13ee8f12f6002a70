"""How a model prepares its pictures, read from its own processor and checked against it."""

import io
import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from bake import BakeError, refusing
from engine.bundle import Preprocessing
from image_embeddings import open_picture, preprocess, to_rgb
from limits import ImageLimits

# Most mean difference to the processor's pixels, on a scale of 0 to 255.
PIXEL_TOLERANCE = 1.0
FIXED = (
    "not supported; bake a model whose pictures all get one shape, such as CLIP, or the variant of "
    "SigLIP 2 with a fixed resolution"
)


def read_processor(model: Any) -> Preprocessing:
    """The steps of the model's processor.

    Raises: BakeError for a processor that does something this service cannot.
    """
    kind = type(getattr(model[0].processor, "image_processor", model[0].processor)).__name__
    with refusing(f"its image processor ({kind}) is {FIXED}"):
        options = _options(model)
        if "max_num_patches" in options:
            raise BakeError(f"its pictures keep their own shapes (NaFlex): {FIXED}")
        size = {side: value for side, value in options["size"].items() if value is not None}
        if size.keys() == {"shortest_edge"}:
            resize = size["shortest_edge"]
        elif size.keys() == {"height", "width"}:
            resize = size["height"], size["width"]
        else:
            raise BakeError(f"its processor ({kind}) resizes by {', '.join(size)}: {FIXED}")
        crop = None
        if options.get("do_center_crop"):
            crop = options["crop_size"]["height"], options["crop_size"]["width"]
        if crop is None and isinstance(resize, int):
            raise BakeError(f"its processor ({kind}) gives pictures of different shapes: {FIXED}")
        undone = [step for step in ("do_resize", "do_rescale", "do_normalize") if not options[step]]
        if undone or options.get("do_pad"):
            raise BakeError(
                f"its processor ({kind}) has {', '.join(undone) or 'do_pad'} set otherwise than "
                f"CLIP's: {FIXED}"
            )
        steps = {
            "resize": resize,
            "crop": crop,
            "resampling": Image.Resampling(int(options["resample"])).name.lower(),
            "scale": options["rescale_factor"],
            "mean": np.broadcast_to(options["image_mean"], 3).tolist(),  # a number, or one a band
            "std": np.broadcast_to(options["image_std"], 3).tolist(),
            "tokens": _tokens(model, crop or resize),
        }
        preprocessing = msgspec.convert(steps, Preprocessing)
    return preprocessing


def _options(model: Any) -> Any:
    return getattr(model[0].processor, "image_processor", model[0].processor).to_dict()


def _tokens(model: Any, shape: Any) -> int:
    """A picture's cost in tokens of the text tower. The work of a transformer is its positions
    times the parameters of its layers.
    """
    config = model[0].config
    patch = config.vision_config.patch_size
    positions = int(shape[0] // patch) * int(shape[1] // patch) + 1

    def parameters(tower: Any) -> int:
        width, inner = int(tower.hidden_size), int(tower.intermediate_size)
        return int(tower.num_hidden_layers) * (4 * width * width + 2 * width * inner)

    vision, text = config.vision_config, config.get_text_config()
    return math.ceil(positions * parameters(vision) / parameters(text))


def opened(model: Any, pictures: Sequence[bytes]) -> list[Image.Image]:
    """Pictures as a user of sentence-transformers would hand them to `model`."""
    images: list[Image.Image] = [Image.open(io.BytesIO(data)) for data in pictures]
    # A processor that does not convert to RGB takes nothing else.
    return images if _options(model).get("do_convert_rgb") else [to_rgb(image) for image in images]


def check_processor(model: Any, preprocessing: Preprocessing, pictures: Sequence[bytes]) -> None:
    """Compare image_embeddings' pixels with the processor's.

    Raises: BakeError when they differ.
    """
    for data, picture in zip(pictures, opened(model, pictures)):
        with refusing("its own processor fails on a picture; mend preprocessor_config.json"):
            own = np.asarray(model.preprocess([picture])["pixel_values"], np.float32)
        pixels = preprocess(open_picture(data, ImageLimits()), preprocessing)
        ours = preprocessing.normalize(pixels[np.newaxis])
        step = preprocessing.scale / np.array(preprocessing.std)[:, None, None]
        off = float(np.abs((own - ours) / step).mean()) if own.shape == ours.shape else math.inf
        if not off <= PIXEL_TOLERANCE:
            raise BakeError(
                f"pixels prepared without its processor are off by {off:.2f} of 255 on average, at "
                f"most {PIXEL_TOLERANCE} allowed (a picture of {picture.width} x {picture.height}):"
                f" {FIXED}"
            )
