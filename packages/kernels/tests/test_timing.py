"""The loops that benchmarks time: what they are given is checked, and more of it is more work."""

import bitnet_kernels
import numpy as np
import pytest
from bitnet_kernels import TernaryMatrix, timing

ONE = np.ones(1, np.float32)
X = np.ones((2, 40), np.float32)
W = TernaryMatrix(np.ones((18, 40), np.int8), ONE)
ISA = bitnet_kernels.isa()


def test_seconds_are_positive():
    assert timing.kernel_seconds([W, W], ISA, X) > 0
    assert timing.product_seconds([W, W], X) > 0
    assert timing.read_seconds([W, W]) > 0


@pytest.mark.parametrize("call", [timing.dot_seconds, timing.tile_seconds])
def test_as_many_operations_run_as_are_asked_for(call):
    few, many = call(1000), call(100_000)
    assert few[0] > 0
    assert few[1] == many[1] == 0 or many[1] > 50 * few[1] > 1000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: timing.kernel_seconds([W], ISA, X[:, :39]), "x: a shape of .* is wanted, not"),
        (lambda: timing.product_seconds([W], X[:, :39]), "x: a shape of .* is wanted, not"),
        (lambda: timing.kernel_seconds([W], "sse9", X), "isa"),
        (lambda: timing.product_seconds([W, TernaryMatrix(np.ones((18, 41), np.int8), ONE)], X), "matrices: equal"),
        (lambda: timing.read_seconds([]), "matrices: at least one"),
        (lambda: timing.read_seconds([W], 0), "repeats: a number from 1 on"),
        (lambda: timing.dot_seconds(0), "count: a number from 1 on"),
        (lambda: timing.tile_seconds(0), "count: a number from 1 on"),
    ],
)
def test_what_no_loop_can_run_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
