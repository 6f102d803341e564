"""Layouts of ternary matrices; their bytes are compared with those of bitnet_arch and gguf in the tests of bitnet-arch."""

import numpy as np
import pytest
from bitnet_kernels import TernaryMatrix
from bitnet_kernels.formats import TYPES
from hypothesis import given
from hypothesis import strategies as st

ONE = np.array([1], dtype=np.float32)


def random_codes(rows, columns, seed=0):
    return np.random.default_rng(seed).integers(-1, 2, (rows, columns), dtype=np.int8)


@given(rows=st.integers(1, 70), blocks=st.integers(1, 5), kind=st.sampled_from(sorted(TYPES)), seed=st.integers(0, 2**32 - 1))
def test_every_type_holds_every_matrix(rows, blocks, kind, seed):
    columns = blocks * TYPES[kind].block
    codes = random_codes(rows, columns, seed)
    scale = np.array([0.037], dtype=np.float16).astype(np.float32)
    data = TernaryMatrix(codes, scale).to_gguf(kind)
    back = TernaryMatrix.from_gguf(kind, data, (rows, columns))
    assert np.array_equal(back.codes(), codes)
    assert back.scale.tolist() == scale.tolist()


@given(quarter=st.integers(1, 40), columns=st.integers(1, 700), seed=st.integers(0, 2**32 - 1))
def test_the_hugging_face_layout_holds_every_matrix(quarter, columns, seed):
    codes = random_codes(4 * quarter, columns, seed)
    packed = TernaryMatrix(codes, ONE).to_hf()
    expected = sum((codes[p * quarter : (p + 1) * quarter] + 1).astype(np.uint8) << 2 * p for p in range(4))
    assert np.array_equal(packed, expected)
    assert np.array_equal(TernaryMatrix.from_hf(packed, ONE).codes(), codes)


@pytest.mark.parametrize(
    ("kind", "granularities"),
    [("i2_s", ["tensor"]), ("tq1_0", ["tensor", "row", "group256"]), ("tq2_0", ["tensor", "row", "group256"]),
     ("q2_0", ["tensor", "row", "group128", "group256"])],
)  # fmt: skip
def test_scales_come_back_as_they_were(kind, granularities):
    rng = np.random.default_rng(0)
    codes = random_codes(5, 768)
    x = rng.standard_normal((3, 768), dtype=np.float32)
    for granularity in ("tensor", "row", "group128", "group256"):
        shape = {"tensor": (1,), "row": (5, 1), "group128": (5, 6), "group256": (5, 3)}[granularity]
        scale = rng.integers(1, 1000, shape).astype(np.float16).astype(np.float32)
        if granularity == "group256":
            scale = np.repeat(scale, 2, axis=1)
        w = TernaryMatrix(codes, scale)
        assert np.array_equal(w.scale, scale)
        if granularity not in granularities:
            with pytest.raises(ValueError, match=r"type: .*choose"):
                w.to_gguf(kind)
            continue
        back = TernaryMatrix.from_gguf(kind, w.to_gguf(kind), (5, 768))
        assert np.array_equal(back.scale, scale)
        assert np.array_equal(back.matmul(x), w.matmul(x))


def test_a_last_group_of_64_columns():
    scale = np.array([[1, 2], [3, 4]], dtype=np.float32)
    data = TernaryMatrix(random_codes(2, 192), scale).to_gguf("q2_0")
    assert np.array_equal(TernaryMatrix.from_gguf("q2_0", data, (2, 192)).scale, scale)


def test_scales_that_no_product_here_knows_are_refused():
    data = TernaryMatrix(random_codes(2, 256), ONE).to_gguf("q2_0")
    blocks = data.reshape(-1, 18)
    blocks[1, :2] = np.array([2], "<f2").view(np.uint8)
    with pytest.raises(ValueError, match="scales of 64 columns differ within 128"):
        TernaryMatrix.from_gguf("q2_0", data, (2, 256))
    blocks[1, :2] = np.array([np.nan], "<f2").view(np.uint8)
    with pytest.raises(ValueError, match="data: a scale is a NaN"):
        TernaryMatrix.from_gguf("q2_0", data, (2, 256))


def test_a_scale_is_never_rounded_silently():
    w = TernaryMatrix(random_codes(2, 256), np.array([0.1], dtype=np.float32))
    with pytest.raises(ValueError, match=r"float16 scales, which 0\.1"):
        w.to_gguf("tq2_0")
    assert TernaryMatrix.from_gguf("i2_s", w.to_gguf("i2_s"), (2, 256)).scale == np.float32(0.1)
    with pytest.raises(ValueError, match="float16 scales, which 1e"):
        TernaryMatrix(random_codes(2, 256), np.array([1e10], dtype=np.float32)).to_gguf("tq1_0")


@pytest.mark.parametrize("kind", ["i2_s", "tq2_0", "q2_0"])
@pytest.mark.parametrize("place", [2, -40])
def test_the_unused_bit_pair_is_refused(kind, place):
    data = TernaryMatrix(random_codes(7, 256), ONE).to_gguf(kind)
    data[place] |= 0x0C
    with pytest.raises(ValueError, match="data: a code outside"):
        TernaryMatrix.from_gguf(kind, data, (7, 256))


def test_damaged_codes_of_hugging_face_are_refused():
    packed = TernaryMatrix(random_codes(8, 300), ONE).to_hf()
    packed[1, 299] |= 0xC0
    with pytest.raises(ValueError, match="packed: a code outside"):
        TernaryMatrix.from_hf(packed, ONE)


@pytest.mark.parametrize(
    ("kind", "shape", "size", "message"),
    [
        ("tq2_0", (2, 192), 99, "type: tq2_0 needs rows that are multiples of 256, not 192"),
        ("i2_s", (2, 192), 99, "type: i2_s needs rows that are multiples of 128, not 192"),
        ("q2_0", (2, 100), 99, "type: q2_0 needs rows that are multiples of 64, not 100"),
        ("q4_0", (2, 256), 99, "type: one of i2_s, tq1_0, tq2_0, q2_0 is wanted, not 'q4_0'"),
        ("tq1_0", (2, 256), 99, r"data: tq1_0 \[2, 256\] has 108 bytes, not 99"),
        ("i2_s", (2, 256), 128, r"data: i2_s \[2, 256\] has 160 bytes, not 128"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_does_not_fit_is_refused(kind, shape, size, message):
    with pytest.raises(ValueError, match=message):
        TernaryMatrix.from_gguf(kind, np.zeros(size, np.uint8), shape)


def test_what_a_layout_cannot_hold_is_refused():
    w = TernaryMatrix(random_codes(6, 100), ONE)
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        w.to_hf()
    with pytest.raises(ValueError, match="multiples of 64, not 100"):
        w.to_gguf("q2_0")
