"""The weights of our own engine at int8: rotated, and rounded so that what a layer gives for real
texts changes least (Frantar et al. 2022, "GPTQ"; rotation: Ashkboos et al. 2024, "QuaRot").
"""

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from bake import windows
from bake.samples import drawing, photo
from engine.bundle import Modality

LARGEST = 127  # code
# GPTQ: what is added to the diagonal, as a share of its mean; columns that are rounded before their
# errors reach all columns behind them.
DAMPING, BLOCK = 0.1, 128
# Scales that are tried for a row, as shares of that at which its largest value gets the largest
# code.
SHARES = torch.linspace(0.7, 1.0, 16)
# Texts that the inputs of layers are taken from: passages of the Python language reference, which
# comes with Python, and words that are drawn from the model's own vocabulary, for all its scripts.
# None of them is in the sample that the certificate is measured over.
PASSAGES, CHARACTERS = 40, (60, 150, 300, 700)
DRAWN, WORDS = 50, (1, 2, 5, 20, 60, 120)
PICTURES = 12  # of each kind


def add_codes(
    model: Any,
    tokenizer: Any,
    modality: Modality,
    weights: dict[str, npt.NDArray[Any]],
    inputs: Mapping[str, Any],
) -> None:
    """Add `NAME.codes`, int8 as `NAME.weight`, and `NAME.scales`, float32 of shape (rows,), for
    each linear layer.

    Args:
        model: a SentenceTransformer.
        weights: `NAME.weight` of shape (outputs, inputs).
        inputs: for each NAME, a module of `model` that gets the same input.
    """
    samples = pictures() if modality == "image" else texts(tokenizer)
    with _moments(inputs.values()) as moments:
        windows.embed(model, samples, 1)
    with _one_thread():
        for name, module in inputs.items():
            weight = torch.from_numpy(weights[f"{name}.weight"].astype(np.float32))
            codes, scales = rounded(rotated(weight), _inverse(moments.pop(module)))
            weights |= {f"{name}.codes": codes.numpy(), f"{name}.scales": scales.numpy()}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Within it, torch computes in one thread: to round columns takes very many small steps, after
    each of which threads wait for each other. On a busy machine that made it 15 times as slow.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def texts(tokenizer: Any) -> list[str]:
    """Texts, the same for every bake of a model."""
    draw = random.Random(1)
    prose = " ".join(" ".join(topics.values()).split())
    starts = [draw.randrange(len(prose) - max(CHARACTERS)) for _ in range(PASSAGES)]
    passages = [prose[start : start + draw.choice(CHARACTERS)] for start in starts]
    ids = sorted(tokenizer.get_vocab(with_added_tokens=False).values())
    drawn = [tokenizer.decode(draw.choices(ids, k=draw.choice(WORDS))) for _ in range(DRAWN)]
    return [text for text in passages + drawn if text.strip()]


def pictures() -> list[Image.Image]:
    """Noise that looks like photographs, and drawings, other than the certificate's."""
    random = np.random.default_rng(11)
    return [make(random, 320, 240) for make in (photo, drawing) for _ in range(PICTURES)]


def rotated(rows: torch.Tensor) -> torch.Tensor:
    """Rows of a width that is a multiple of 64: blocks of 128 values (64 where the width is no
    multiple of that) times a Hadamard matrix divided by its norm, as engine/encoder/rows.h rotates
    activations. It is orthogonal: products of rows that are rotated alike stay the same.
    """
    size = 64 if rows.shape[-1] % 128 else 128
    blocks, step = rows.reshape(-1, size), 1
    while step < size:
        pairs = blocks.view(-1, size // (2 * step), 2, step)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        blocks, step = torch.stack((low + high, low - high), 2).view(-1, size), 2 * step
    made: torch.Tensor = (blocks / size**0.5).view(rows.shape)
    return made


@contextlib.contextmanager
def _moments(modules: Iterable[Any]) -> Iterator[dict[Any, torch.Tensor]]:
    """Within it, the second moments of the rotated inputs of modules are summed up, of shape
    (inputs, inputs): the mean over a text's tokens, so that each text counts the same.
    """
    moments: dict[Any, torch.Tensor] = {}

    def watch(module: Any, inputs: tuple[torch.Tensor]) -> None:
        rows = rotated(inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float())
        if module not in moments:
            moments[module] = torch.zeros(rows.shape[1], rows.shape[1])
        moments[module].addmm_(rows.T, rows, alpha=1 / len(rows))

    hooks = [module.register_forward_pre_hook(watch) for module in modules]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


def _inverse(moment: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of a damped second moment, which GPTQ works with."""
    damped = moment.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor


def rounded(weight: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round weights of shape (outputs, inputs) column by column. The error of each is spread over
    the columns that are left, so that the layer's outputs change least.

    Returns: codes, int8 of the same shape; scales, float32 of shape (outputs,).
    """
    scales = _scales(weight)
    left, codes = weight.clone(), torch.empty(weight.shape, dtype=torch.int8)
    for first in range(0, weight.shape[1], BLOCK):
        end = min(first + BLOCK, weight.shape[1])
        errors = torch.empty(len(weight), end - first)
        for at in range(first, end):
            code = _codes(left[:, at], scales)
            codes[:, at] = code.to(torch.int8)
            error = (left[:, at] - code * scales) / inverse[at, at]
            left[:, at:end].addr_(error, inverse[at, at:end], alpha=-1)
            errors[:, at - first] = error
        left[:, end:] -= errors @ inverse[first:end, end:]
    return codes, scales


def _codes(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (values / scales).round().clamp(-LARGEST, LARGEST)


def _scales(weight: torch.Tensor) -> torch.Tensor:
    """For each row the scale at which rounding to nearest has the smallest squared error."""
    largest = weight.abs().amax(1).clamp_min(1e-12) / LARGEST
    tried = [largest * share for share in SHARES]
    errors = [(_codes(weight.T, scale) * scale - weight.T).square().sum(0) for scale in tried]
    best = torch.stack(errors).argmin(0)
    return torch.stack(tried).gather(0, best[None])[0]
