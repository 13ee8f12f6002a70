"""The texts and pictures whose vectors are compared with sentence-transformers'."""

import bisect
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from bake import BakeError
from engine.bundle import Modality
from image_embeddings import probe_picture

PROBE_TEXT = "The quick brown fox jumps over the lazy dog."
# Lengths are spread evenly over a window of up to this many tokens; over a longer one only up to
# EVEN_TOKENS, and sparsely above: 120 texts spread evenly over a window of 8192 would take hours.
# 64 is half the tokens of 128, and half the time of what is not the longest text.
SHORT_WINDOW, EVEN_TOKENS = 512, 64
# Several languages and scripts, code, numbers, emoji, combining marks, odd spacing.
PHRASES = (
    "What is deep learning, and how does it differ from classical statistics?",
    "The river rose after three days of rain; the old bridge was closed to traffic.",
    "Die Straßenbahn fährt heute wegen Bauarbeiten nur bis zum Hauptbahnhof.",
    "L'été dernier, nous avons traversé les Alpes à vélo malgré l'orage.",
    "El algoritmo ordena los documentos según su similitud con la consulta.",
    "Поезд отправляется с третьего пути в половине восьмого утра.",
    "機械学習モデルは大量のデータから規則性を見つけ出す。",
    "自然语言处理让计算机能够理解人类的文字。",
    "인공지능은 우리의 일상을 빠르게 바꾸고 있다.",
    "تُستخدم الشبكات العصبية في ترجمة النصوص بين اللغات.",
    "חיפוש סמנטי מוצא מסמכים לפי משמעות ולא לפי מילים.",
    "मशीन लर्निंग डेटा से पैटर्न सीखने की कला है।",
    "def mean(xs: list[float]) -> float:\n    return sum(xs) / len(xs)  # fails on []",
    "SELECT name, COUNT(*) FROM users WHERE active = TRUE GROUP BY name HAVING COUNT(*) > 3;",
    "<div class=\"card\"><a href='/docs?id=42&lang=en'>Read more…</a></div>",
    "🚀 Launch day! 🎉👩‍👩‍👧‍👦 can't wait 😂😂 #release v2.0.1",
    "Cafe\u0301 Zu\u0308rich naïve façade — “quoted” ‘text’ … № 5 ½ ℃",
    "E = mc², ∑ᵢ xᵢ ≤ ∫₀¹ f(t) dt, 3.14159, 1,000,000.00 USD, 2026-11-21T10:30:00Z",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "  tabs\tand   many    spaces,\r\nline breaks\n\nand no end",
)


@dataclass(frozen=True)
class Sample:
    """Inputs of one modality, the manifest's probe first, with sentence-transformers' vectors."""

    modality: Modality
    inputs: Sequence[Any]  # texts, or pictures as the bytes of their files
    expected: npt.NDArray[np.float32]  # shape (len(inputs), dimensions)


def sample_texts(tokenizer: Any, prompt: str, window: int, count: int) -> list[str]:
    """Texts of all lengths, counted with prompt and special tokens: from one token of their own to
    `window` tokens, evenly spread; with a window over SHORT_WINDOW only up to EVEN_TOKENS, and
    above that `window`, a quarter of it, a quarter of that …

    Raises: BakeError when the prompt leaves no room.
    """
    plain = [len(tokenizer.encode(phrase, add_special_tokens=False).ids) for phrase in PHRASES]
    least = len(tokenizer.encode(prompt).ids) + 1
    if least > window:
        raise BakeError(
            f"its default prompt leaves no room in a window of {window} tokens; give a larger "
            "--max-tokens, or another --default-prompt"
        )
    even, lengths = window if window <= SHORT_WINDOW else EVEN_TOKENS, []
    while window > even:
        lengths.append(window)
        window //= 4
    lengths += np.linspace(least, max(least, even), count - len(lengths)).round().tolist()
    texts = []
    for number, length in enumerate(lengths):
        text, tokens, phrase = "", least - 1, number
        while tokens < 1.25 * length:  # phrases may have fewer tokens together than each alone
            text += PHRASES[phrase % len(PHRASES)] + " "
            tokens += max(1, plain[phrase % len(PHRASES)])
            phrase += 1
        texts.append(beginning(text, tokenizer, prompt, length))
    return texts


def beginning(text: str, tokenizer: Any, prompt: str, length: int) -> str:
    """The longest beginning of `text` that has at most `length` tokens, with prompt and special
    tokens; "a" where that is white space, or the first character has more.
    """

    def tokens(characters: int) -> int:
        return len(tokenizer.encode(prompt + text[:characters]).ids)

    most = bisect.bisect_right(range(1, len(text) + 1), length, key=tokens)
    return text[:most] if text[:most].strip() else "a"


def sample_pictures() -> list[bytes]:
    """Pictures as files: the probe picture, photographs (noise with the spectrum of one), line art,
    flat colours, transparent, grey, of few colours, of extreme shapes, in every format that keeps
    its pixels.

    JPEGs are small, so that they are decoded at full size; tests/test_image_embeddings.py measures
    what decoding at a smaller scale costs.
    """
    random = np.random.default_rng(5)
    shapes = ((400, 300), (300, 400), (640, 480), (225, 223), (32, 32), (900, 260))
    pictures = [photo(random, *shape) for shape in shapes]
    pictures += [drawing(random, *shape) for shape in shapes]
    clear = photo(random, 300, 200).convert("RGBA")
    clear.putalpha(photo(random, 300, 200).convert("L"))
    pictures += [clear, clear.convert("LA"), clear.convert("P")]
    pictures += [drawing(random, 250, 250).convert("1"), photo(random, 300, 300).convert("L")]
    pictures += [photo(random, 260, 300).quantize(8)]
    pictures += [Image.new("RGB", (1, 1), "red"), Image.new("RGB", (240, 240), "navy")]
    pictures += [photo(random, 4, 900), photo(random, 900, 4)]
    pictures += [drawing(random, 1500, 10), drawing(random, 2, 300)]
    files = [
        _file(picture, "BMP" if picture.mode == "RGB" and number % 3 == 0 else "PNG")
        for number, picture in enumerate(pictures)
    ]
    jpegs = [photo(random, *shape) for shape in ((120, 100), (90, 125), (120, 90), (99, 99))]
    jpegs[2] = jpegs[2].convert("CMYK")
    return [probe_picture(), *files, *(_file(each, "JPEG", quality=90) for each in jpegs)]


def photo(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise with the spectrum of a photograph."""
    pixels = np.zeros((height, width, 3))
    for octave in range(2, 9):
        detail = random.normal(0, 160 / octave**1.5, (2**octave, 2**octave, 3)).astype(np.float32)
        bands = [
            Image.fromarray(band).resize((width, height)) for band in detail.transpose(2, 0, 1)
        ]
        pixels += np.stack([np.asarray(band) for band in bands], axis=-1)
    return Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))


def drawing(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """Lines on white."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(25):
        points = [tuple(random.integers(0, (width, height)).tolist()) for _ in range(3)]
        draw.line(points, fill=int(random.integers(0, 1 << 24)), width=2)
    return image


def _file(picture: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()
