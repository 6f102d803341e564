"""bitnet-kernels' converters against the bytes that this package and gguf write."""

import gguf
import numpy as np
import pytest
import torch
from bitnet_arch.gguf.types import TYPES, encode_i2_s
from bitnet_arch.packing import pack_codes
from bitnet_kernels import TernaryMatrix
from bitnet_kernels._arrays import activations

SHAPES = [(4, 256), (20, 768), (68, 2560)]
SCALE = np.float16(0.037)


def random_codes(shape):
    return np.random.default_rng(sum(shape)).integers(-1, 2, shape, dtype=np.int8)


@pytest.mark.parametrize("shape", [*SHAPES, (64, 576), (8, 33)], ids=str)
def test_checkpoints_of_hugging_face(shape):
    codes = random_codes(shape)
    packed = pack_codes(torch.from_numpy(codes))
    scale = torch.full((1,), 0.3)
    w = TernaryMatrix.from_hf(packed, scale)  # torch's tensors by DLPack
    assert np.array_equal(w.codes(), codes)
    assert w.scale == np.float32(0.3)
    assert np.array_equal(w.to_hf(), packed.numpy())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_block_types(kind, shape):
    codes = random_codes(shape)
    for scale in (SCALE, np.linspace(0.5, 2, shape[0]).astype(np.float16).reshape(-1, 1)):
        data = TYPES[kind].encode(codes, scale)
        w = TernaryMatrix.from_gguf(kind, data, shape)
        assert np.array_equal(w.codes(), codes)
        assert np.array_equal(w.scale, np.float32(scale).reshape(w.scale.shape))
        assert np.array_equal(w.to_gguf(kind).reshape(data.shape), data)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_i2_s(shape):
    codes = random_codes(shape)
    data = encode_i2_s(codes, np.float32(0.1))
    w = TernaryMatrix.from_gguf("i2_s", data.tobytes(), shape)
    assert np.array_equal(w.codes(), codes)
    assert w.scale == np.float32(0.1)
    assert np.array_equal(w.to_gguf("i2_s"), data)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_bytes_of_gguf_itself(kind):
    codes = random_codes((20, 768))
    weights = codes * np.float32(SCALE)
    weights[3] *= 2  # another scale for a row
    weights[4, :256] *= 2  # and for a block
    data = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind])
    w = TernaryMatrix.from_gguf(kind, data, weights.shape)
    assert np.array_equal(w.codes(), codes)
    assert np.array_equal(w.codes() * np.repeat(w.scale, 128, axis=1), weights)
    assert np.array_equal(w.to_gguf(kind), data.reshape(-1))


def test_tensors_on_the_cpu_are_read_where_they_lie():
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    assert np.shares_memory(activations(x), x.numpy())
    w = TernaryMatrix(torch.from_numpy(random_codes((8, 40))), torch.ones(8, 1))
    assert np.array_equal(w.matmul(x), w.matmul(x.numpy()))
    assert np.array_equal(w.matmul(x.T.contiguous().T), w.matmul(x))


@pytest.mark.parametrize(
    "x",
    [torch.zeros(3, 40, requires_grad=True), torch.zeros(3, 40, dtype=torch.bfloat16), torch.zeros(3, 40, device="meta")],
    ids=["gradient", "bfloat16", "no memory"],
)
def test_other_tensors_are_refused_by_name(x):
    w = TernaryMatrix(random_codes((8, 40)), np.ones(1, np.float32))
    with pytest.raises(TypeError, match="x: this Tensor shows no array"):
        w.matmul(x)
