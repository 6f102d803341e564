"""What a caller can get wrong ends in an exception that names the argument; what is only unusual works."""

import array
from collections import Counter

import bitnet_kernels
import numpy as np
import pytest
from bitnet_kernels import BlockMatrix, TernaryMatrix
from bitnet_kernels.fuzz import CALLS, NAMES, Foreign, try_once
from hypothesis import given, settings
from hypothesis import strategies as st

ONE = np.ones(1, np.float32)
CODES = np.random.default_rng(0).integers(-1, 2, (18, 40), dtype=np.int8)
X = np.random.default_rng(1).standard_normal((3, 40), dtype=np.float32)
NAN = X.copy()
NAN[1, 5] = np.nan


@pytest.fixture
def w():
    return TernaryMatrix(CODES, ONE)


def misaligned(x):
    data = np.zeros(x.nbytes + 1, np.uint8)
    data[1:] = np.frombuffer(x.tobytes(), np.uint8)
    return data[1:].view(x.dtype).reshape(x.shape)


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


USUAL = {
    "rows apart": lambda x: np.repeat(x, 2, axis=0)[::2],
    "columns apart": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "Fortran's order": np.asfortranarray,
    "misaligned": misaligned,
    "read-only": read_only,
    "a buffer": memoryview,
    "DLPack": Foreign,
    "numpy's matrix": lambda x: x.view(np.matrix),
}


@pytest.mark.parametrize("way", USUAL.values(), ids=USUAL)
def test_however_an_array_lies_the_result_is_the_same(way, w):
    assert np.array_equal(w.matmul(way(X)), w.matmul(X))
    scale = np.linspace(1, 2, 18, dtype=np.float32).reshape(18, 1)
    other = TernaryMatrix(way(CODES), way(scale))
    assert np.array_equal(other.codes(), CODES)
    assert np.array_equal(other.scale, scale)
    packed = CODES.view(np.uint8) & 1
    assert np.array_equal(TernaryMatrix.from_hf(way(packed), ONE).to_hf(), packed)


def test_good_arrays_are_not_copied():
    from bitnet_kernels._arrays import activations

    assert np.shares_memory(activations(X), X)
    assert np.shares_memory(activations(Foreign(X)), X)
    assert np.shares_memory(activations(memoryview(X)), X)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X.astype(np.float64), "x: float32 is wanted, not float64"),
        (X.astype(">f4"), "x: float32 is wanted, not >f4"),
        (X.tolist(), "x: an array is wanted, not list"),
        ("x", "x: an array is wanted, not str"),
        (None, "x: an array is wanted, not NoneType"),
        (array.array("d", [1.0]), "x: float32 is wanted, not float64"),
        (np.empty((3, 40), object), "x: float32 is wanted, not object"),
        (Foreign(X, error=BufferError("it has\na gradient")), r"x: this Foreign shows no array \(it has a gradient\)"),
    ],
    ids=["float64", "big-endian", "list", "str", "None", "array.array", "object", "no DLPack"],
)
def test_another_dtype_or_no_array_is_a_type_error(w, x, message):
    for call in (w.matmul, w.matmul_integer, bitnet_kernels.quantize_activations):
        with pytest.raises(TypeError, match=message):
            call(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[0], r"x: a shape of \[tokens, .*\] is wanted, not \[40\]"),
        (X[:, :0], r"x: a shape of .* is wanted, not \[3, 0\]"),
        (X[None], r"x: a shape of .* is wanted, not \[1, 3, 40\]"),
        (NAN, "x: token 1 holds a NaN or an infinity"),
        (np.broadcast_to(X[:1], (2**45, 40)), "x: at most .* elements are possible"),
        (Foreign(X, device=(2, 0)), "x: an array in the CPU's memory is wanted, not on DLPack's device 2"),
    ],
    ids=["1-dimensional", "K of 0", "3-dimensional", "NaN", "huge", "on a GPU"],
)
def test_another_shape_place_or_value_is_a_value_error(w, x, message):
    for call in (w.matmul, w.matmul_integer, bitnet_kernels.quantize_activations):
        with pytest.raises(ValueError, match=message):
            call(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TernaryMatrix(np.full((2, 3), 2, np.int8), ONE), "codes: a code outside of -1, 0 and 1"),
        (lambda: TernaryMatrix(np.full((2, 3), -128, np.int8), ONE), "codes: a code outside"),
        (lambda: TernaryMatrix(np.zeros((2, 0), np.int8), ONE), r"codes: a shape of \[rows, columns\] is wanted, not \[2, 0\]"),
        (
            lambda: TernaryMatrix(CODES, np.ones(2, np.float32)),
            r"scale: a shape of \[1\], \[18, 1\] or \[18, 1\] is wanted, not \[2\]",
        ),
        (lambda: TernaryMatrix(np.broadcast_to(CODES[:1, :1], (1, 2**23 + 1)), ONE), "codes: at most 8388608 columns"),
        (lambda: TernaryMatrix(np.broadcast_to(CODES[:1], (2**40, 40)), ONE), "codes: at most .* elements"),
        (lambda: TernaryMatrix.from_hf(np.broadcast_to(np.uint8([0]), (2**62, 1)), ONE), "packed: at most"),
        (lambda: TernaryMatrix.from_gguf("tq2_0", b"", (2**62, 2**62)), "shape: at most"),
        (lambda: TernaryMatrix.from_gguf("tq2_0", b"", (0, 256)), "shape: rows and columns from 1 on are wanted"),
        (lambda: TernaryMatrix.from_gguf("tq2_0", b"", (-1, 256)), "shape: rows and columns from 1 on are wanted"),
        (lambda: TernaryMatrix.from_gguf("q2_0", np.broadcast_to(np.uint8(0), 2**45), (1, 64)), "data: .* has 18 bytes, not"),
        (lambda: BlockMatrix(np.zeros((2, 34), np.uint8), "q8_0", 2**62), "columns: at most"),
        (lambda: BlockMatrix(np.zeros((2, 34), np.uint8), "q5_0", 32), "kind: q8_0 or q6_k or q4_1 is wanted"),
        (lambda: bitnet_kernels.use_isa("sse9"), "isa 'sse9' is not available here"),
        (lambda: bitnet_kernels.set_threads(0), "count: from 1 to 64"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_tokens_give_no_results(w):
    assert w.matmul(X[:0]).shape == (0, 18)
    assert bitnet_kernels.quantize_activations(X[:0])[0].shape == (0, 40)


def end_of(name, seed):
    """Make a call and return how it ended; what it set is undone."""
    isa, threads = bitnet_kernels.isa(), bitnet_kernels.threads()
    try:
        return try_once(name, seed)
    finally:
        bitnet_kernels.use_isa(isa)
        bitnet_kernels.set_threads(threads)


@given(name=st.sampled_from(sorted(CALLS)), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=400, deadline=None)
def test_whatever_is_passed_in_is_refused_by_name_or_works(name, seed):
    assert end_of(name, seed) in {"done", "refused", "no memory", *NAMES}


@pytest.mark.parametrize("name", CALLS)
def test_some_calls_of_every_kind_work_and_some_are_refused(name):
    ends = Counter(end_of(name, seed) for seed in range(400))
    assert 10 < ends["done"] < 390


def test_the_fuzzer_sees_a_message_that_names_nothing(monkeypatch):
    def message(rng):
        raise ValueError("no such thing")

    monkeypatch.setitem(CALLS, "message", message)
    with pytest.raises(AssertionError, match="no argument is named"):
        try_once("message", 0)


def test_matrices_are_any_that_can_be_counted(w):
    expected = w.matmul(X)
    got = bitnet_kernels.matmul_many((matrix for matrix in (w, w)), X)
    assert len(got) == 2
    assert all(np.array_equal(y, expected) for y in got)
    for wrong in (None, w, 3):
        with pytest.raises(TypeError, match=r"^matrices: "):
            bitnet_kernels.matmul_many(wrong, X)
