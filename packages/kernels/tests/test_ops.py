"""Norm, rotary embedding and attention of every instruction set against numpy in double precision."""

import numpy as np
import pytest
from bitnet_kernels.ops import KvCache, rms_norm, rope


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_rms_norm(isa):
    for columns in (*range(1, 70), 576, 2560):
        x, weight = normal(3, columns, seed=columns), normal(columns)
        x[1] *= 1e-4  # where epsilon counts
        x[2] = 0
        wide = x.astype(np.float64)
        expected = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * weight
        np.testing.assert_allclose(rms_norm(x, weight, 1e-5), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("head_dim", [2, 6, 16, 64, 80, 128])
def test_rope_turns_pairs_and_leaves_the_rest(isa, head_dim):
    for half in sorted({1, head_dim // 4 or 1, head_dim // 2}):
        x = normal(5, 3, head_dim)
        angles = np.random.default_rng(1).uniform(-9, 9, (5, half))
        pairs = x[..., :half] + 1j * x[..., half : 2 * half]
        turned = pairs * np.exp(1j * angles)[:, None]
        got = rope(x, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
        np.testing.assert_allclose(got[..., :half], turned.real, atol=2e-6)
        np.testing.assert_allclose(got[..., half : 2 * half], turned.imag, atol=2e-6)
        assert np.array_equal(got[..., 2 * half :], x[..., 2 * half :])


def kept(x, kind):
    """Return what a cache keeps of float32 `[positions, heads, head_dim]`, in double precision."""
    if kind == "f32":
        return x.astype(np.float64)
    if kind == "f16":
        return x.astype(np.float16).astype(np.float64)
    largest = np.abs(x).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(x * inverse).astype(np.float64) * (largest / np.float32(127))


def textbook(q, k, v, ranges, scale):
    """Return attention in double precision: query head h has the keys and values of head h // (query heads / heads)."""
    out = np.zeros(q.shape)
    turn = q.shape[1] // k.shape[1]
    for token, (first, last) in enumerate(ranges):
        for head in range(q.shape[1] if last > first else 0):
            scores = k[first:last, head // turn] @ q[token, head].astype(np.float64) * scale
            weights = np.exp(scores - scores.max())
            out[token, head] = weights / weights.sum() @ v[first:last, head // turn]
    return out


def masks(tokens, start):
    """Return ranges of the ways to attend: causal, a window of 5, blocks of 4 in both directions, and odd ones."""
    position = start + np.arange(tokens)
    return {
        "causal": np.stack([0 * position, position + 1], 1),
        "window": np.stack([np.maximum(0, position - 4), position + 1], 1),
        "block": np.stack([0 * position, np.minimum(start + tokens, (position // 4 + 1) * 4)], 1),
        "odd": np.stack([position // 2, position // 2 + position % 3], 1),  # some are empty
    }


@pytest.mark.parametrize("kind", ["f32", "f16", "int8"])
@pytest.mark.parametrize(("heads", "group", "head_dim"), [(1, 1, 16), (2, 2, 64), (1, 3, 80), (3, 5, 32), (2, 4, 20), (1, 9, 128)])
def test_attention(isa, kind, heads, group, head_dim):
    positions, tokens = 200, 7
    k, v = normal(positions, heads, head_dim, seed=1), normal(positions, heads, head_dim, seed=2)
    k[:, :, 0] *= 6  # so that weights differ by far
    v[17] = 0
    q = normal(tokens, heads * group, head_dim, seed=3)
    cache = KvCache(kind, heads, head_dim, positions)
    cache.append(k[:150], v[:150])
    cache.append(k[150:], v[150:])
    assert len(cache) == positions
    scale = head_dim**-0.5
    seen = []
    for start in (0, 60, positions - tokens):
        for ranges in masks(tokens, start).values():
            expected = textbook(q, kept(k, kind), kept(v, kind), ranges, scale)
            got = cache.attention(q, ranges, scale)
            assert np.abs(got - expected).max() <= 2e-6 * np.abs(v).max()
            seen.append(got)
    assert not np.allclose(seen[4], seen[5], atol=1e-2)  # a mask changes what comes out
    assert not np.allclose(seen[4], seen[6], atol=1e-2)


def test_scores_that_differ_by_hundreds(isa):
    k, v = np.zeros((130, 1, 16), np.float32), normal(130, 1, 16)
    k[:, 0, 0] = np.arange(130) * 10  # the largest comes last: every earlier sum is scaled down
    q = np.ones((1, 1, 16), np.float32)
    cache = KvCache("f16", 1, 16, 130)
    cache.append(k, v)
    got = cache.attention(q, np.array([[0, 130]]), 1.0)
    np.testing.assert_allclose(got[0, 0], kept(v, "f16")[129, 0] + np.exp(-10) * (kept(v, "f16")[128, 0] - v[129, 0]), atol=1e-5)


def test_halves_are_rounded_as_numpy_does(isa):
    values = np.concatenate(
        [
            np.array([2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 2.0**-14, 65519.9, -0.0, 1 + 2.0**-11, 1 + 3 * 2.0**-11], np.float32),
            np.arange(0, 2**16, 7, dtype=np.uint16).view(np.float16).astype(np.float32),
            normal(4000) * 10.0 ** np.random.default_rng(5).integers(-9, 6, 4000).astype(np.float32),
        ]
    ).astype(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 65520)][: 16 * 800].reshape(-1, 1, 16)
    cache = KvCache("f16", 1, 16, len(values))
    cache.append(values, values)
    for position in range(len(values)):  # attention to one position gives its value
        got = cache.attention(np.zeros((1, 1, 16), np.float32), np.array([[position, position + 1]]), 1.0)
        assert np.array_equal(got[0], values[position].astype(np.float16).astype(np.float32))


def test_what_is_not_finite_stays_so(isa):
    """A key beyond float16 becomes infinite, and times 0 NaN: no instruction set may turn that into a weight."""
    keys, values = normal(70, 1, 16), normal(70, 1, 16)
    q, ranges = np.zeros((1, 1, 16), np.float32), np.array([[0, 70]])
    for position in (0, 3, 63, 64, 69):
        for key, lost in ((1e5, True), (6e4, False)):
            cache = KvCache("f16", 1, 16, 70)
            cache.append(np.where(np.arange(70)[:, None, None] == position, np.float32(key), keys), values)
            assert np.isnan(cache.attention(q, ranges, 0.25)).all() == lost


def test_tiny_vectors_are_kept_as_zero(isa):
    x = np.zeros((2, 1, 16), np.float32)
    x[0, 0, :2] = 1e-38, -3e-37  # 127 / 3e-37 is beyond float32
    x[1, 0, :2] = 1e-36, -4e-37
    cache = KvCache("int8", 1, 16, 2)
    cache.append(x, x)
    got = [cache.attention(x[:1, :], np.array([[i, i + 1]]), 1.0)[0, 0] for i in range(2)]
    assert not got[0].any()
    np.testing.assert_allclose(got[1], x[1, 0], atol=1e-38)


def test_bad_input_is_named():
    cache = KvCache("int8", 2, 16, 4)
    x = normal(3, 2, 16)
    cache.append(x, x)
    whole = np.array([[0, 3]] * 3)
    broken = [np.where(np.arange(16) == 15, np.float32(value), x[:1]) for value in (np.nan, np.inf, -np.inf)]
    for call, name in (
        (lambda: KvCache("f64", 2, 16, 4), "kind"),
        (lambda: KvCache("f16", 0, 16, 4), "heads"),
        (lambda: cache.append(x, x), "keys: there is room for 1"),
        (lambda: cache.append(x[:1], x), "values"),
        (lambda: cache.append(x[:1].astype(np.float64), x[:1]), "keys"),
        (lambda: cache.attention(x[:, :1], whole, 1.0), "q"),
        (lambda: cache.attention(x, whole[:2], 1.0), "ranges"),
        (lambda: cache.attention(x, whole + 1, 1.0), "ranges"),
        (lambda: cache.attention(x, -whole, 1.0), "ranges"),
        *((lambda bad=bad: cache.append(bad, x[:1]), "keys: finite") for bad in broken),
        *((lambda bad=bad: cache.append(x[:1], bad), "values: finite") for bad in broken),
        *((lambda bad=bad: cache.attention(bad, whole[:1], 1.0), "q: finite") for bad in broken),
        *((lambda bad=bad: cache.attention(x, whole, bad), "scale") for bad in (np.nan, np.inf, 1e39, 10**400, "a", None)),
        (lambda: KvCache("f16", "2", 16, 4), "heads"),
        (lambda: KvCache("f16", 2, 1.5, 4), "head_dim"),
        (lambda: KvCache("f16", 2, 16, None), "capacity"),
        (lambda: KvCache(["f16"], 2, 16, 4), "kind"),
        *((lambda bad=bad: rms_norm(x[0], x[0, 0], bad), "epsilon") for bad in (None, "a", np.nan, np.inf)),
        (lambda: rms_norm(x[0], np.ones(15, np.float32), 1e-5), "weight"),
        (lambda: rms_norm(x[0], np.ones(16, np.float32), -1.0), "epsilon"),
        (lambda: rope(x, np.ones((3, 9), np.float32), np.ones((3, 9), np.float32)), "cos"),
        (lambda: rope(x, np.ones((3, 8), np.float32), np.ones((2, 8), np.float32)), "sin"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}"):
            call()
