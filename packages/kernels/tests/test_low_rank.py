"""Low-rank corrections against float64 products, on every instruction set."""

import numpy as np
import pytest
from bitnet_kernels.low_rank import LowRank

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_products_are_those_of_float64(dtype):
    rng = np.random.default_rng(0)
    for rows, columns, rank in [(1, 1, 1), (17, 5, 3), (64, 100, 16), (33, 577, 40), (576, 1536, 64)]:
        if dtype == np.int8:
            u, v = (rng.integers(-127, 128, (n, rank), dtype=np.int8) for n in (rows, columns))
            scales = [rng.random(rank, dtype=np.float32) / 100 for _ in range(2)]
        else:
            u, v = (rng.standard_normal((n, rank)).astype(np.float16) for n in (rows, columns))
            u[0, 0] = np.float16(6e-8)  # subnormal
            scales = []
        adapters = LowRank(u, v, *scales)
        whole = [a.astype(np.float64) * s for a, s in zip((u, v), scales or (1, 1), strict=True)]
        for tokens in (0, 1, 3, 4, 9):
            x = rng.standard_normal((tokens, columns), dtype=np.float32)
            expected = x.astype(np.float64) @ whole[1] @ whole[0].T
            y = adapters.matmul(x)
            assert y.shape == (tokens, rows)
            assert (
                tokens == 0
                or np.abs(y - expected).max() <= 2e-6 * np.abs(x).max() * np.abs(whole[0]).max() * np.abs(whole[1]).sum()
            )
            if tokens > 4:
                assert np.array_equal(adapters.matmul(x[4:5])[0], y[4])


def test_every_float16_is_read_exactly():
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    numbers = numbers[np.isfinite(numbers)].reshape(-1, 1)
    y = LowRank(numbers, np.ones((1, 1), np.float16)).matmul(np.ones((1, 1), np.float32))
    assert np.array_equal(y[0], numbers[:, 0].astype(np.float32))


def test_adapters_that_do_not_fit_are_refused():
    half, small, scale = np.ones((4, 2), np.float16), np.ones((4, 2), np.int8), np.ones(2, np.float32)
    for arguments, what in [
        ((half.astype(np.float32), half), "u: float16 or int8 is wanted"),
        ((half, small), "v: float16 is wanted"),
        ((small, half, scale, scale), "v: int8 is wanted"),
        (([1], half), "u: an array is wanted"),
    ]:
        with pytest.raises(TypeError, match=what):
            LowRank(*arguments)
    for arguments, what in [
        ((half, np.ones((4, 3), np.float16)), "v: a shape of"),
        ((half[0], half), "u: a shape of"),
        ((half[:, :0], half), "u: a shape of"),
        ((small, small, np.ones(3, np.float32), scale), "u_scale: a shape of"),
        ((small, small), "u_scale: int8 needs"),
        ((small, small, scale), "v_scale: int8 needs"),
        ((half, half, scale, scale), "u_scale: .*float16 has none"),
        ((half, half, None, scale), "v_scale: .*float16 has none"),
    ]:
        with pytest.raises(ValueError, match=what):
            LowRank(*arguments)
    with pytest.raises(ValueError, match="x: a shape of"):
        LowRank(half, half).matmul(np.ones((1, 5), np.float32))
