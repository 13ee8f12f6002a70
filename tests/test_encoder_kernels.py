"""The kernels of engine/encoder, one by one, against NumPy: each family that this CPU runs."""

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine.bundle import Precision
from engine.encoder import cpu, library
from engine.encoder.library import Kernels, Linear, aligned, pointer

Float32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

TO_ACTIVATION, GELU_TO_ACTIVATION, ADD_TO_FLOAT = range(3)
TANH_GELU, QUICK_GELU, RELU, SILU = range(5, 9)
SPARE_ROWS = 16
# Largest error, relative to the largest value: of float32 sums, and of one rounding to bf16.
FLOAT_SUMS, BF16_ROUNDING = 2e-6, 2**-8
POLYNOMIAL = 1e-5  # of GELU and of powers of two
INT, LONG, POINTER, FLOAT = ctypes.c_int, ctypes.c_long, ctypes.c_void_p, ctypes.c_float
TASK = ctypes.CFUNCTYPE(None, POINTER, INT, POINTER)


class Quantised(ctypes.Structure):
    _fields_ = [("values", POINTER), ("scales", POINTER), ("start", POINTER)]


class Product(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("mode", "rows", "k", "precision")),
        ("a", POINTER),
        ("q", Quantised),
        ("linear", Linear),
        ("c", POINTER),
        ("ldc", LONG),
        ("ahead", INT),
    ]


class Attention(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("qkv", "out", "starts")),
        *((name, INT) for name in ("heads", "key_heads", "head", "behind", "ahead")),
        ("distances", POINTER),
        ("apart", INT),
    ]


class Rows(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("rows", "width", "precision", "chunk", "rms", "keep")),
        *((name, POINTER) for name in ("x", "gain", "activations")),
        ("q", Quantised),
        ("epsilon", FLOAT),
    ]


class Family:
    """A family's kernels, called with NumPy's arrays."""

    def __init__(self, name: str) -> None:
        # Zeros around what the kernels may read beyond the end are kept alive here.
        self.kept: list[Array] = []
        self.name = name
        self.table: Kernels = library.kernels(library.load()[0], name)
        self.bf16 = self.table.activation_size == 2

    def floats(self, values: Array) -> Float32:
        """What the family makes of float32 values that it keeps as activations."""
        return from_bf16(to_bf16(values)) if self.bf16 else values.astype(np.float32)

    def activations(self, values: Array) -> Array:
        """Rows of activations, with rows behind them that kernels may read."""
        made = to_bf16(values) if self.bf16 else values.astype(np.float32)
        return self.room(*values.shape, dtype=made.dtype, values=made)

    def room(self, rows: int, width: int, dtype: Any = None, values: Array | None = None) -> Array:
        kind = np.dtype(dtype or (np.uint16 if self.bf16 else np.float32))
        size = (rows + SPARE_ROWS) * width * kind.itemsize
        made = aligned(size).view(kind).reshape(-1, width)
        if values is not None:
            made[:rows] = values
        self.kept.append(made)
        return made[:rows]

    def read(self, values: Array) -> Float32:
        return from_bf16(values) if self.bf16 else values

    def run(self, task: str, argument: ctypes.Structure, count: int, memory: int = 64) -> None:
        """All tasks of one kind."""
        local = aligned(memory)
        function = TASK(getattr(self.table, task))
        for number in range(count):
            function(ctypes.addressof(argument), number, pointer(local))

    def codes_of_weights(self, panels: Array, n: int, k: int) -> Array:
        """The codes of n columns of k weights, from their layout in panels."""
        together = 4 if self.table.code_size == 1 else 2
        offset = 128 if together == 4 and self.name != "amx" else 0
        codes = panels.view(np.uint8 if offset else np.int8).astype(int) - offset
        parts = codes.reshape(n // self.table.panel, k // together, self.table.panel, together)
        return parts.transpose(0, 2, 1, 3).reshape(n, k)

    def quantise(self, values: Array, precision: int = 2) -> tuple[Quantised, Array, Array]:
        """Codes and scales of rows of activations."""
        rows, width = values.shape
        codes = self.room(rows, width, np.int8 if self.table.code_size == 1 else np.int16)
        scales, start = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
        self.kept += [codes, scales, start]
        q = Quantised(*map(pointer, (codes, scales, start)))
        source = self.activations(values)
        argument = Rows(rows, width, precision, rows, 0, 0, None, None, pointer(source), q, 0.0)
        self.run("rows", argument, 1)
        return q, codes, scales


def to_bf16(values: Array) -> Array:
    """Rounded to nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(values: Array) -> Float32:
    return (values.astype(np.uint32) << 16).view(np.float32)


def rotated(rows: Array) -> Array:
    """Blocks of rows times a Hadamard matrix that is divided by its norm."""
    size = 64 if rows.shape[1] % 128 else 128
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (rows.reshape(len(rows), -1, size) @ (matrix / np.sqrt(size))).reshape(rows.shape)


def error(actual: Array, expected: Array) -> float:
    """Largest error relative to the largest value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def gelu(x: Array) -> Array:
    erf = np.frompyfunc(math.erf, 1, 1)
    result: Array = x * 0.5 * (1 + erf(x / np.sqrt(2)).astype(np.float64))
    return result


def logistic(x: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-x))
    return result


ACTIVATIONS: dict[int, Callable[[Array], Array]] = {
    GELU_TO_ACTIVATION: gelu,
    TANH_GELU: lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    QUICK_GELU: lambda x: x * logistic(1.702 * x),
    RELU: lambda x: np.maximum(x, 0),
    SILU: lambda x: x * logistic(x),
}


CASES = [(family.name, precision) for family in cpu.FAMILIES for precision in family.precisions]


def kernels(name: str) -> Family:
    if name not in [family.name for family in cpu.runnable()]:
        pytest.skip(f"this CPU has no {name}")
    return Family(name)


@pytest.fixture(params=cpu.NAMES)
def family(request: Any) -> Family:
    return kernels(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def multiply(
    family: Family, precision: Precision, mode: int, a: Array, w: Array, bias: Array, before: Array
) -> tuple[Float32, Float32]:
    """Returns: the kernel's product, and the product of what it multiplies, in float64."""
    (rows, k), n = a.shape, len(w)
    assert n % family.table.panel == 0
    half = w.astype(np.float16)
    int8 = precision == "int8"
    # What lies behind a panel is prefetched only.
    panels = aligned(n * k * (1 if int8 else family.table.activation_size))
    columns = np.linspace(0.01, 0.02, n, dtype=np.float32)  # scales, int8 only
    to, source, sizes = pointer(panels), pointer(half), (LONG(n), LONG(k))
    linear = Linear(to.value, pointer(bias).value, pointer(columns).value)
    if int8:
        codes = np.clip(np.round(half.astype(float) * 500), -127, 127).astype(np.int8)
        lay_out = ctypes.CFUNCTYPE(None, POINTER, POINTER, LONG, LONG)(family.table.lay_out_int8)
        lay_out(to, pointer(codes), *sizes)
        assert (family.codes_of_weights(panels, n, k) == codes).all()
        q, rounded, scales = family.quantise(a)
        left, right = rounded * scales[:, None].astype(float), codes * columns[:, None].astype(
            float
        )
    else:
        lay_out = ctypes.CFUNCTYPE(None, POINTER, POINTER, LONG, LONG)(family.table.lay_out)
        lay_out(to, source, *sizes)
        q, left = Quantised(), family.floats(a)
        right = family.floats(half.astype(np.float32))
    activations = family.activations(a)
    c = family.room(rows, n, np.float32 if mode == ADD_TO_FLOAT else None)
    if mode == ADD_TO_FLOAT:
        c[:] = before
    of = ["fp32", "bf16", "int8"].index(precision)
    argument = Product(mode, rows, k, of, pointer(activations), q, linear, pointer(c), n, 1)
    family.run("product", argument, n // family.table.panel)
    expected = left.astype(float) @ right.astype(float).T + bias
    if mode in ACTIVATIONS:
        expected = ACTIVATIONS[mode](expected)
    return (c, expected + before) if mode == ADD_TO_FLOAT else (family.read(c), expected)


@pytest.mark.parametrize("mode", [TO_ACTIVATION, GELU_TO_ACTIVATION, ADD_TO_FLOAT, SILU])
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_products(name: str, precision: Precision, mode: int, rng: np.random.Generator) -> None:
    family = kernels(name)
    for rows in [*range(1, 35), 47, 48, 49, 64, 65, 100]:
        k, n = int(rng.choice([64, 128, 384])), int(rng.choice([64, 96]))
        a, w = rng.normal(size=(rows, k)), rng.normal(size=(n, k)) / np.sqrt(k)
        bias, before = rng.normal(size=n).astype(np.float32), rng.normal(size=(rows, n))
        actual, expected = multiply(family, precision, mode, a, w, bias, before)
        tolerance = FLOAT_SUMS if mode not in ACTIVATIONS else POLYNOMIAL
        if family.bf16 and mode != ADD_TO_FLOAT:
            tolerance = BF16_ROUNDING
        assert error(actual, expected) < tolerance, (rows, k, n)


@pytest.mark.parametrize("width", [64, 192, 384, 1536])
def test_rounding_to_codes(family: Family, width: int, rng: np.random.Generator) -> None:
    values = rng.normal(size=(6, width)) * np.geomspace(1e-3, 100, 6)[:, None]
    values[1, 5] = 1e4  # one that is much larger than its row
    values[2] = 0  # has no scale
    _, codes, scales = family.quantise(values)
    exact = rotated(family.floats(values).astype(float))
    largest = np.abs(exact).max(axis=1)
    assert error(scales, largest / 127) < FLOAT_SUMS
    expected = exact / np.where(largest, largest, 1)[:, None] * 127
    assert np.abs(codes - expected).max() <= 0.5 + 1e-3
    assert not codes[2].any() and (np.abs(codes).max(axis=1)[[0, 1, 3, 4, 5]] == 127).all()


@pytest.mark.parametrize("width", [64, 192, 384, 1536])
def test_rotation(family: Family, width: int, rng: np.random.Generator) -> None:
    values = rng.normal(size=(1, width)).astype(np.float32)
    found = values.copy()
    run = ctypes.CFUNCTYPE(None, POINTER, LONG)(family.table.rotate)
    run(pointer(found), width)
    norm = (64 if width % 128 else 128) ** 0.5
    assert error(found / norm, rotated(values.astype(float))) < FLOAT_SUMS


@pytest.mark.parametrize("mode", ACTIVATIONS)
def test_activations(family: Family, mode: int) -> None:
    x = np.concatenate([np.linspace(-12, 12, 4032), [0.0, -0.0, 1e30, -1e30, 1e-30, -5, 5] * 8])
    x = x[: len(x) // 32 * 32].astype(np.float32)
    y = np.empty_like(x)
    run = ctypes.CFUNCTYPE(None, INT, POINTER, POINTER, LONG)(family.table.activate)
    run(mode, pointer(x), pointer(y), len(x))
    wide = np.abs(x) > 1e6
    np.testing.assert_allclose(y[wide], np.maximum(x[wide], 0), rtol=1e-6, atol=1e-6)
    exact = ACTIVATIONS[mode](x[~wide].astype(float))
    assert np.abs(y[~wide] - exact).max() < POLYNOMIAL * (1 if mode == GELU_TO_ACTIVATION else 3)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 100, 129])
def test_softmax(family: Family, length: int, rng: np.random.Generator) -> None:
    panel = family.table.panel
    width = -(-length // panel) * panel
    # Large, very different and equal scores; what lies behind `length` is not counted.
    scores = np.full((3, width), 1e9, np.float32)
    scores[0, :length], scores[1, :length] = 300 + rng.normal(size=length), -500
    scores[2, :length] = 60 * rng.normal(size=length)
    shares = family.room(3, width)
    factors, powers = np.zeros(3, np.float32), scores[:, :length].astype(float)
    run = ctypes.CFUNCTYPE(None, *[POINTER] * 3, *[INT] * 3)(family.table.softmax)
    run(pointer(scores), pointer(shares), pointer(factors), 3, length, width)
    powers = 2 ** (powers - powers.max(axis=1, keepdims=True))
    got = family.read(shares)
    tolerance = BF16_ROUNDING if family.bf16 else POLYNOMIAL
    assert np.abs(got[:, :length] - powers).max() < tolerance
    assert not got[:, length:].any()
    assert error(1 / factors, powers.sum(axis=1)) < POLYNOMIAL


@pytest.mark.parametrize("rms", [0, 1], ids=["", "rms"])
@pytest.mark.parametrize("keep", [0, 1], ids=["", "keep"])
@pytest.mark.parametrize("width", [64, 384, 768])
def test_norms(family: Family, width: int, keep: int, rms: int, rng: np.random.Generator) -> None:
    rows = 7
    x = (rng.normal(size=(rows, width)) * 3 + 10).astype(np.float32)
    x[3] = 4.0  # no variance
    gain = rng.normal(size=2 * width).astype(np.float32)
    out, held = family.room(rows, width), x.astype(float)
    precision = 1 if family.bf16 else 0
    places = pointer(x), pointer(gain), pointer(out)
    argument = Rows(rows, width, precision, 3, rms, keep, *places, Quantised(), 1e-12)
    family.run("rows", argument, 3)  # of 3, 3 and 1 rows
    mean, variance = held.mean(axis=1, keepdims=True), held.var(axis=1, keepdims=True)
    if rms:
        mean, variance = np.zeros_like(mean), (held**2).mean(axis=1, keepdims=True)
    expected = (held - mean) / np.sqrt(variance + 1e-12) * gain[:width] + gain[width:]
    assert (x == held).all() if keep else error(x, expected) < 5 * FLOAT_SUMS
    assert error(family.read(out), expected) < (BF16_ROUNDING if family.bf16 else 5 * FLOAT_SUMS)


def attention(
    qkv: Array, lengths: Sequence[int], heads: tuple[int, int, int], distances: Array, sight: Any
) -> Array:
    """In float64.

    Args:
        heads: of queries and of keys, and the width of one.
        distances: what is added for them, shape (heads, 2 * LONGEST - 1).
        sight: how far a token sees behind and ahead.
    """
    many, few, head = heads
    parts, first = [], 0
    for length in lengths:
        rows = qkv[first : first + length].astype(float).reshape(length, -1, head)
        q, k, v = np.split(rows.transpose(1, 0, 2), [many, many + few])
        k, v = (each.repeat(many // few, axis=0) for each in (k, v))
        places = np.arange(length) - np.arange(length)[:, None] + LONGEST - 1
        scores = q @ k.transpose(0, 2, 1) + distances[:, places]
        apart = places - (LONGEST - 1)
        scores[:, (apart > sight[1]) | (-apart > sight[0])] = -np.inf
        powers = 2 ** (scores - scores.max(axis=2, keepdims=True))
        shares = powers / powers.sum(axis=2, keepdims=True)
        parts.append((shares @ v).transpose(1, 0, 2).reshape(length, -1))
        first += length
    return np.concatenate(parts)


LONGEST = 100  # text


SIGHTS = {"all": (LONGEST, LONGEST), "causal": (LONGEST, 0), "near": (7, 7), "causal near": (40, 0)}


@pytest.mark.parametrize("sees", SIGHTS)
@pytest.mark.parametrize("distant", [False, True], ids=["", "distances"])
@pytest.mark.parametrize("all_heads", [(2, 2, 32), (1, 1, 64), (3, 3, 96), (4, 2, 32)])
def test_attention(
    family: Family,
    all_heads: tuple[int, int, int],
    distant: bool,
    sees: str,
    rng: np.random.Generator,
) -> None:
    lengths = [1, 2, 12, 15, 16, 17, 31, 32, 33, 64, 65, LONGEST, 3]
    heads, key_heads, head = all_heads
    total, hidden = sum(lengths), heads * head
    qkv = rng.normal(size=(total, hidden + 2 * key_heads * head)) * (0.7 * head**-0.25)
    out = family.room(total, hidden)
    starts = np.cumsum([0, *lengths], dtype=np.int32)
    held = family.activations(qkv)
    values = np.zeros((heads, 2 * LONGEST - 1 + family.table.panel), np.float32)
    if distant:
        values[:, : 2 * LONGEST - 1] = rng.normal(size=(heads, 2 * LONGEST - 1)) * 2
    middle = values.ctypes.data + 4 * (LONGEST - 1) if distant else None
    places = pointer(held), pointer(out), pointer(starts)
    argument = Attention(*places, *all_heads, *SIGHTS[sees], middle, values.shape[1])
    size = ctypes.CFUNCTYPE(LONG, INT, INT)(family.table.attention_memory)(max(lengths), head)
    family.run("attend", argument, len(lengths) * heads, size)
    expected = attention(family.floats(qkv), lengths, all_heads, values, SIGHTS[sees])
    tolerance = 2 * BF16_ROUNDING if family.bf16 else 5 * POLYNOMIAL
    assert error(family.read(out), expected) < tolerance


class Turn(ctypes.Structure):
    _fields_ = [
        *((name, INT) for name in ("rows", "chunk", "heads", "key_heads", "head")),
        ("stride", LONG),
        *((name, POINTER) for name in ("qkv", "places", "angles", "gains")),
        ("epsilon", FLOAT),
    ]


@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
@pytest.mark.parametrize(("heads", "key_heads", "head"), [(2, 2, 32), (4, 1, 64), (1, 1, 96)])
def test_turned_queries_and_keys(
    family: Family, heads: int, key_heads: int, head: int, normed: bool, rng: np.random.Generator
) -> None:
    rows, width = 7, (heads + 2 * key_heads) * head
    held = family.activations(rng.normal(size=(rows, width)))
    before = family.read(held).astype(float).reshape(rows, -1, head)
    angles = rng.uniform(-3, 3, size=(rows, head // 2))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    gains = rng.normal(size=(2, head)).astype(np.float32)
    places = rng.permutation(rows).astype(np.int32)
    given = pointer(held), pointer(places), pointer(table), pointer(gains) if normed else None
    argument = Turn(rows, 3, heads, key_heads, head, width, *given, 1e-6)
    family.run("turn", argument, 3)
    q, k, v = np.split(before, [heads, heads + key_heads], axis=1)
    parts = []
    for part, gain in zip((q, k), gains):
        if normed:
            part = part / np.sqrt((part**2).mean(axis=2, keepdims=True) + 1e-6) * gain
        a, b = np.split(part, 2, axis=2)
        cosines, sines = (f(angles[places])[:, None] for f in (np.cos, np.sin))
        parts.append(np.concatenate([a * cosines - b * sines, b * cosines + a * sines], axis=2))
    expected = np.concatenate([*parts, v], axis=1).reshape(rows, width)
    assert error(family.read(held), expected) < (BF16_ROUNDING if family.bf16 else 5 * FLOAT_SUMS)
