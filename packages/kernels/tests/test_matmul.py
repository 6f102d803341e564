"""Every instruction set against the textbook product."""

import itertools

import bitnet_kernels
import numpy as np
import pytest
from bitnet_kernels import TernaryMatrix


def inverse_scale(x):
    """Return 127 / absmax as torch computes a number over a tensor: the reciprocal times the number, rounded twice."""
    return np.float32(1) / np.maximum(np.abs(x).max(1, keepdims=True), np.float32(1e-5)) * np.float32(127)


def textbook(codes, x):
    """Return the quantised activations' integer product, activations quantised as training does it."""
    inverse = inverse_scale(x)
    q = np.rint(x * inverse).astype(np.int64)
    return q @ codes.astype(np.int64).T, np.float32(1) / inverse


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 29])
def test_every_width_gives_the_textbooks_integers(isa, tokens):
    rng = np.random.default_rng(tokens)
    for columns in range(1, 601, 1 if tokens == 1 else 29):
        rows = int(rng.integers(1, 150))  # up to ten panels
        codes = rng.integers(-1, 2, (rows, columns), dtype=np.int8)
        x = rng.standard_normal((tokens, columns), dtype=np.float32)
        w = TernaryMatrix(codes, np.array([0.25], dtype=np.float32))
        assert np.array_equal(w.codes(), codes)
        expected, scale = textbook(codes, x)
        assert np.array_equal(w.matmul_integer(x), expected), columns
        np.testing.assert_array_equal(w.matmul(x), expected.astype(np.float32) * (scale * np.float32(0.25)))


@pytest.mark.parametrize("columns", [33, 4096, 140_000, 600_000])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_largest_sums_do_not_overflow(isa, columns, sign, tokens):
    codes = np.full((17, columns), sign, dtype=np.int8)
    x = np.ones((tokens, columns), dtype=np.float32)
    w = TernaryMatrix(codes, np.array([1], dtype=np.float32))
    assert (w.matmul_integer(x) == sign * 127 * columns).all()


@pytest.mark.parametrize("kind", ["row", "group"])
def test_scales_of_rows_and_groups(isa, kind):
    rng = np.random.default_rng(0)
    for columns, tokens in itertools.product((1, 100, 128, 129, 300, 576), (1, 6, 11)):
        codes = rng.integers(-1, 2, (119, columns), dtype=np.int8)
        scale = rng.random((119, 1 if kind == "row" else -(-columns // 128)), dtype=np.float32)
        x = rng.standard_normal((tokens, columns), dtype=np.float32)
        _, activation = textbook(codes, x)
        q = bitnet_kernels.quantize_activations(x)[0]
        wide = np.repeat(scale.astype(np.float64), columns if kind == "row" else 128, axis=1)[:, :columns]
        expected = (q.astype(np.float64) @ (codes * wide).T) * activation
        got = TernaryMatrix(codes, scale).matmul(x)
        assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 63, 128, 129, 255, 600, 5000])
def test_activations_are_quantised_as_the_textbook_does(isa, columns):
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((7, columns), dtype=np.float32)
    x[1] = 0
    x[2] *= np.float32(1e-9)  # below the floor of absmax
    x[3] *= np.float32(1e30)
    x[4] = np.resize(np.arange(-127, 128), columns) + np.float32(0.5)  # ties
    x[4, 0] = 127
    x[5] = -(2.0**-149)  # the smallest denormal
    codes, scale = bitnet_kernels.quantize_activations(x)
    inverse = inverse_scale(x)
    assert np.array_equal(codes, np.rint(x * inverse).astype(np.int8))
    assert np.array_equal(scale, np.float32(1) / inverse)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 130])
def test_a_value_that_is_not_finite_is_refused(isa, value, place):
    x = np.ones((2, 131), dtype=np.float32)
    x[1, place] = value
    with pytest.raises(ValueError, match="token 1"):
        bitnet_kernels.quantize_activations(x)
