"""A tiny CLIP that means something: trained for some seconds on rendered coloured shapes and their
captions, saved as sentence-transformers saves clip-ViT-B-32 and its kin.
"""

import json
import pathlib
import random
import sys
import tempfile
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import CLIPModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

SIZE, PATCH = 64, 16
WINDOW = 77
STEPS, DRAWN = 600, 60  # batches trained on, and how many of them are different
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (35, 60, 210),
    "yellow": (240, 215, 40),
    "purple": (140, 40, 160),
    "orange": (245, 140, 20),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
SHAPES = ("square", "circle", "triangle")
SOLID = "solid"  # the picture is of one colour all over
KINDS = [(color, shape) for color in COLORS for shape in (*SHAPES, SOLID)]
_TEMPLATES = ("a {} {}", "a picture of a {} {}", "one {} {} on a plain ground", "{} {}")
_SOLID_TEMPLATES = ("a solid {} color", "a picture of a solid {} color", "solid {}", "{} color")
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def caption(color: str, shape: str) -> str:
    """The caption that a picture is tested with."""
    return f"a solid {color} color" if shape == SOLID else f"a {color} {shape}"


def picture(color: str, shape: str, chance: random.Random) -> Image.Image:
    """A picture of `shape`, of any size and place, on a grey ground, with noise in all colours."""

    def near(rgb: tuple[int, int, int]) -> tuple[int, int, int]:
        red, green, blue = (min(255, max(0, v + chance.randint(-14, 14))) for v in rgb)
        return red, green, blue

    width, height = chance.randint(80, 140), chance.randint(80, 140)
    if shape == SOLID:
        return Image.new("RGB", (width, height), near(COLORS[color]))
    grey = chance.randint(90, 200)
    image = Image.new("RGB", (width, height), near((grey, grey, grey)))
    draw, fill = ImageDraw.Draw(image), near(COLORS[color])
    side = chance.uniform(0.45, 0.8) * min(width, height)
    left = (width - side) / 2 + chance.uniform(-0.08, 0.08) * side
    top = (height - side) / 2 + chance.uniform(-0.08, 0.08) * side
    box = (left, top, left + side, top + side)
    if shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "circle":
        draw.ellipse(box, fill=fill)
    else:
        points = [(left, top + side), (left + side, top + side), (left + side / 2, top)]
        draw.polygon(points, fill=fill)
    return image


def tokenizer() -> Any:
    """CLIP's own tokenizer class over a vocabulary learnt from the captions: lower case, byte-level
    BPE with `</w>` at word ends, padded with the token that also ends a text.
    """
    words = " ".join([*COLORS, *SHAPES, *_TEMPLATES, *_SOLID_TEMPLATES]).replace("{}", "")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator([words], trainer)
    learnt = json.loads(backend.to_str())["model"]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    pieces += [piece for piece in learnt["vocab"] if piece not in set(pieces)]
    vocab = {piece: number for number, piece in enumerate([*pieces, _BOS, _EOS])}
    merges = [tuple(merge) for merge in learnt["merges"]]
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=WINDOW)


def untrained(words: Any, *, heads: int = 2, **vision: Any) -> Any:
    """transformers' own CLIPModel, small."""
    both = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": heads}
    marks = {name: words.convert_tokens_to_ids(token) for name, token in (("bos_token_id", _BOS),)}
    marks["eos_token_id"] = marks["pad_token_id"] = words.convert_tokens_to_ids(_EOS)
    text = {"vocab_size": len(words), "max_position_embeddings": WINDOW, "num_hidden_layers": 2}
    sight = {"image_size": SIZE, "patch_size": PATCH, "num_hidden_layers": 2, **vision}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**both, **text, **marks},
            vision_config={**both, **sight},
            projection_dim=32,
        )
    )


def train(model: Any, words: Any, processor: Any) -> None:
    """Contrastive training, every batch one picture of each kind."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # 18 times as fast as two, on two cores that others use too
    chance = random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    model.train()
    batches = []  # to draw and prepare one takes longer than to train on it
    for _ in range(DRAWN):
        captions = []
        for color, shape in KINDS:
            if shape == SOLID:
                captions.append(chance.choice(_SOLID_TEMPLATES).format(color))
            else:
                captions.append(chance.choice(_TEMPLATES).format(color, shape))
        pictures = [picture(color, shape, chance) for color, shape in KINDS]
        prepared = processor(pictures, return_tensors="pt")
        batches.append({**words(captions, padding=True, return_tensors="pt"), **prepared})
    for step in range(STEPS):
        inputs = batches[step % DRAWN]
        optimizer.zero_grad()
        model(**inputs, return_loss=True).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    torch.set_num_threads(threads)


def image_processor(size: int = SIZE) -> Any:
    return transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


def save(
    folder: pathlib.Path, *, trained: bool = True, legacy: bool = True, **vision: Any
) -> pathlib.Path:
    """Make the model and save it to `folder`: with the CLIPModel module, as the hub's clip-ViT-*
    are saved, or with the Transformer module."""
    torch.manual_seed(0)
    words = tokenizer()
    processor = image_processor(vision.get("image_size", SIZE))
    model = untrained(words, **vision)
    if trained:
        train(model, words, processor)
    return assemble(folder, model, words, processor, legacy=legacy)


def assemble(
    folder: pathlib.Path, model: Any, words: Any, processor: Any, *, legacy: bool
) -> pathlib.Path:
    """Save a transformers CLIPModel to `folder` as sentence-transformers does."""
    with tempfile.TemporaryDirectory() as plain:
        model.save_pretrained(plain)
        transformers.CLIPProcessor(processor, words).save_pretrained(plain)
        module = CLIPModel(plain) if legacy else Transformer(plain)
        whole = SentenceTransformer(modules=[module], device="cpu")
    whole.save(str(folder), create_model_card=False)
    return folder


if __name__ == "__main__":  # python tests/tiny_clip.py FOLDER
    save(pathlib.Path(sys.argv[1]))
