"""Matrices of llama.cpp's 8, 6 and 4 bits against gguf-py's dequantisation and a product in double precision."""

import bitnet_kernels
import numpy as np
import pytest
from bitnet_kernels import BLOCK_TYPES, BlockMatrix
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

BLOCK = {"q8_0": (32, 34, 1), "q4_1": (32, 20, 2), "q6_k": (256, 210, 1)}
"""Columns and bytes of a block, and how many f16 it has."""


def random_blocks(kind, rows, columns, seed=0):
    """Return bytes `[rows, row_bytes]` in which every code and factor occurs and every f16 scale is ordinary, and the weights."""
    rng = np.random.default_rng(seed)
    width, size, halves = BLOCK[kind]
    blocks = rng.integers(0, 256, (rows, columns // width, size), dtype=np.uint8)
    scales = rng.normal(0, 0.01, (rows, columns // width, halves)).astype(np.float16)
    scales[0, 0, 0] = 2.0**-24  # the smallest that f16 has
    where = slice(-2, None) if kind == "q6_k" else slice(0, 2 * halves)
    blocks[..., where] = scales.view(np.uint8)
    data = blocks.reshape(rows, -1)
    return data, dequantize(data, GGMLQuantizationType[kind.upper()])


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_rows_are_those_of_gguf(kind):
    for rows, blocks in ((1, 1), (16, 2), (37, 3)):
        data, weights = random_blocks(kind, rows, blocks * BLOCK[kind][0])
        matrix = BlockMatrix(data, kind, weights.shape[1])
        assert np.array_equal(matrix.lookup(np.arange(rows)), weights)
        padding = 2 * blocks if kind == "q6_k" else 0  # what aligns it, 1%
        assert matrix.nbytes == -(-rows // 16) * 16 * (data.shape[1] + padding)
        some = np.array([rows - 1, 0, rows - 1])
        assert np.array_equal(matrix.lookup(some), weights[some])


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_products_are_those_of_floats(isa, kind, threads):
    before = bitnet_kernels.threads()
    bitnet_kernels.set_threads(threads)
    rng = np.random.default_rng(1)
    for rows, blocks, tokens in (
        (1, 1, 1),
        (15, 2, 2),
        (16, 1, 3),
        (150, 3, 1),
        (131, 1, 5),
        (70, 2, 6),
        (33, 1, 7),
        (1100, 4, 13),
    ):
        data, weights = random_blocks(kind, rows, blocks * BLOCK[kind][0], seed=rows)
        x = rng.standard_normal((tokens, weights.shape[1]), dtype=np.float32)
        x[:, 3] *= 100  # one that stands out, beside which 8-bit activations would lose the others
        expected = x.astype(np.float64) @ weights.astype(np.float64).T
        size = np.sqrt((x.astype(np.float64) ** 2) @ (weights.astype(np.float64) ** 2).T)  # of a sum that happens to be small
        got = BlockMatrix(data, kind, weights.shape[1]).matmul(x)
        assert np.abs(got - expected).max() <= 1e-6 * np.maximum(np.abs(expected), size).max(), (rows, blocks, tokens)
    bitnet_kernels.set_threads(before)


def test_small_codes_of_q6_k_do_not_cancel(isa):
    """Codes that stand for -1, 0 and 1 lie around 32: nothing as large as 32 times the activations may be taken away in floats."""
    data, _ = random_blocks("q6_k", 64, 512)
    rng = np.random.default_rng(3)
    codes = rng.integers(31, 34, (64, 2, 256), dtype=np.uint8).reshape(64, 2, 2, 2, 2, 32)  # half, high bits' pair, nibble's byte
    blocks = data.reshape(64, 2, 210)
    low = codes & 15
    blocks[..., :128] = (low[:, :, :, 0] | low[:, :, :, 1] << 4).reshape(64, 2, 128)
    high = (codes >> 4).reshape(64, 2, 2, 4, 32)
    blocks[..., 128:192] = (high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6).reshape(64, 2, 64)
    weights = dequantize(data, GGMLQuantizationType.Q6_K)
    units = weights.reshape(64, 2, 16, 16)
    factors = np.abs(units).max(-1, keepdims=True)
    assert np.isin(np.divide(units, factors, out=np.zeros_like(units), where=factors > 0), (-1, 0, 1)).all()
    x = rng.standard_normal((5, 512), dtype=np.float32) + 100
    expected = x.astype(np.float64) @ weights.astype(np.float64).T
    got = BlockMatrix(data, "q6_k", 512).matmul(x)
    assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max()


def test_activations_are_not_quantised(isa):
    data, weights = random_blocks("q8_0", 64, 64)
    x = np.random.default_rng(2).standard_normal((1, 64), dtype=np.float32)
    x[0, 0] = 1000
    rounded = np.rint(x * (127 / 1000)) * (1000 / 127)
    expected = x @ weights.T
    assert np.abs(rounded @ weights.T - expected).max() > 1e-4 * np.abs(expected).max()
    assert np.abs(BlockMatrix(data, "q8_0", 64).matmul(x) - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_input_is_named(isa, value):
    data, _ = random_blocks("q8_0", 20, 64)
    matrix = BlockMatrix(data, "q8_0", 64)
    x = np.ones((2, 64), np.float32)
    x[1, 7] = value
    for call, name in (
        (lambda: BlockMatrix(data, "q5_0", 64), "kind"),
        (lambda: BlockMatrix(data, "q8_0", 65), "columns"),
        (lambda: BlockMatrix(data, "q8_0", 0), "columns"),
        (lambda: BlockMatrix(data, "q8_0", -32), "columns"),
        (lambda: BlockMatrix(data, "q8_0", 96), "data"),
        (lambda: BlockMatrix(data.astype(np.int8), "q8_0", 64), "data"),
        (lambda: BlockMatrix(data[:0], "q8_0", 64), "data"),
        (lambda: matrix.lookup(np.array([20])), "ids"),
        (lambda: matrix.lookup(np.array([-1])), "ids"),
        (lambda: matrix.lookup(np.array([0.0])), "ids"),
        (lambda: matrix.matmul(x[:, :63]), "x"),
        (lambda: matrix.matmul(x.astype(np.float64)), "x"),
        (lambda: matrix.matmul(x), "x: token 1"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}"):
            call()
