import gguf
import numpy as np
import pytest
import torch
from bitnet_arch import UserError, open_weights, save_master, save_packed
from bitnet_arch.gguf import PROVENANCE_KEY, TYPES, export_gguf, file_differences, read_gguf
from bitnet_arch.gguf.floats import EMBEDDING_TYPES, decode_float, encode_float, round_bf16
from bitnet_arch.gguf.pieces import encoded_pieces
from bitnet_arch.gguf.types import decode_i2_s, encode_i2_s
from bitnet_arch.testing import tiny_bitnet, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture
def master(tmp_path):
    save_master(tiny_bitnet(), tmp_path / "m", tiny_tokenizer())
    return tmp_path / "m"


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(TYPES)), st.integers(1, 5), st.integers(1, 3), st.integers(0, 10_000))
def test_every_type_round_trips(name, rows, blocks, seed):
    kind = TYPES[name]
    codes = np.random.default_rng(seed).integers(-1, 2, (rows, blocks * kind.block), dtype=np.int8)
    data = kind.encode(codes, np.float16(0.25))
    assert data.shape == (rows, blocks * kind.block_bytes)
    decoded, scales = kind.decode(data)
    assert np.array_equal(decoded, codes)
    assert np.all(scales == np.float16(0.25))


@pytest.mark.parametrize("name", ["tq1_0", "tq2_0"])
def test_bytes_equal_the_reference_quantizer_on_ternary_data(name):
    codes = np.random.default_rng(0).integers(-1, 2, (8, 512), dtype=np.int8)
    reference = gguf.quants.quantize(codes.astype(np.float32) * 0.25, gguf.GGMLQuantizationType[name.upper()])
    assert np.array_equal(TYPES[name].encode(codes, np.float16(0.25)), reference)


def test_golden_q2_0_bytes():
    codes = np.zeros((1, 64), np.int8)
    codes[0, :4] = [-1, 0, 1, 1]
    data = TYPES["q2_0"].encode(codes, np.float16(1.0))[0]
    assert data.tolist() == [0x00, 0x3C, 0b10_10_01_00, *[0b01_01_01_01] * 15]


def test_golden_i2_s_bytes():
    # 128 weights: 0 but for w[0] = -1, w[1] = 1, w[32] = 1, w[65] = -1, w[127] = 1. Byte j = w[j] w[j + 32] w[j + 64] w[j + 96],
    # each code + 1 in two bits, from the top.
    codes = np.zeros((1, 128), np.int8)
    codes[0, [0, 1, 32, 65, 127]] = [-1, 1, 1, -1, 1]
    expected = [0b00_10_01_01, 0b10_01_00_01, *[0b01_01_01_01] * 29, 0b01_01_01_10]
    data = encode_i2_s(codes, np.float32(0.5))
    assert data.tolist() == [*expected, 0x00, 0x00, 0x00, 0x3F, *[0] * 28]  # 0.5 is 3F000000 in big-endian float32
    decoded, scale = decode_i2_s(data, (1, 128))
    assert np.array_equal(decoded, codes)
    assert scale == 0.5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 10_000))
def test_i2_s_round_trips(rows, blocks, seed):
    codes = np.random.default_rng(seed).integers(-1, 2, (rows, blocks * 128), dtype=np.int8)
    decoded, scale = decode_i2_s(encode_i2_s(codes, np.float32(0.1)), codes.shape)
    assert np.array_equal(decoded, codes)
    assert scale == np.float32(0.1)
    with pytest.raises(UserError, match="I2_S needs rows that are multiples of 128, not 64"):
        encode_i2_s(codes[:, :64], np.float32(0.1))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["bf16", "q8_0", "q6_k", "q4_1"]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([1e-3, 1.0, 300.0]),
    st.integers(0, 10_000),
)
def test_float_types_lie_within_half_a_step_of_what_gguf_py_reads(name, rows, blocks, size, seed):
    values = (size * np.random.default_rng(seed).standard_normal((rows, blocks * 256))).astype(np.float32)
    values[0, :32] = 0
    ggml_id = EMBEDDING_TYPES[name]
    decoded = gguf.quants.dequantize(encode_float(values, ggml_id), gguf.GGMLQuantizationType(ggml_id))
    width = {"bf16": 1, "q8_0": 32, "q6_k": 16, "q4_1": 32}[name]
    parts, error = values.reshape(-1, width), np.abs(decoded - values).reshape(-1, width)
    if name == "q4_1":
        step = np.ptp(parts, axis=1) / 15
    else:
        step = np.abs(parts).max(axis=1) / {"bf16": 128, "q8_0": 127, "q6_k": 31}[name]
    # Scales and minima are rounded, too: Q6_K's to 8 bits of the largest in 256.
    slack = {"bf16": 0.51, "q8_0": 0.6, "q6_k": 1.5, "q4_1": 0.6}[name]
    assert np.all(error.max(axis=1) <= slack * step + 2e-3 * np.abs(values).max())
    assert np.array_equal(decode_float(encode_float(values, ggml_id).view(np.uint8), ggml_id, values.shape), decoded)


@pytest.mark.parametrize(("name", "bound"), [("bf16", 4e-6), ("q8_0", 4e-5), ("q6_k", 4e-4), ("q4_1", 8e-3)])
def test_float_types_cost_what_their_bits_say(name, bound):
    values = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    decoded = decode_float(encode_float(values, EMBEDDING_TYPES[name]).view(np.uint8), EMBEDDING_TYPES[name], values.shape)
    assert bound / 4 < ((decoded - values) ** 2).mean() < bound


@pytest.mark.parametrize("name", ["q8_0", "bf16"])
def test_bytes_equal_the_reference_quantizer_of_float_types(name):
    values = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    reference = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name.upper()])
    assert encode_float(values, EMBEDDING_TYPES[name]).tobytes() == reference.tobytes()


@pytest.mark.parametrize("name", ["auto", "f16", *TYPES])
def test_every_type_holds_the_same_numbers(name, master, tmp_path):
    report = export_gguf(master, tmp_path / "out.gguf", name)
    written = read_gguf(tmp_path / "out.gguf")
    assert report.tensors["blk.0.ffn_down.weight"] == ("tq2_0" if name == "auto" else name)
    with open_weights(master) as reader:
        codes, scale = reader.ternary("model.layers.1.mlp.down_proj.weight")
    expected = codes.numpy() * np.float32(np.float16(float(scale)))
    assert np.array_equal(written.dequantize("blk.1.ffn_down.weight"), expected)
    assert written.metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert written.metadata["tokenizer.chat_template"] == tiny_tokenizer().chat_template
    assert written.metadata["tokenizer.ggml.tokens"][0] == "<|endoftext|>"
    assert written.metadata["bitnet.attention.head_count_kv"] == 2


@pytest.mark.parametrize(("name", "scale_of"), [("bf16", round_bf16), ("i2_s", np.float32)], ids=["bf16", "i2_s"])
def test_two_types_round_the_scale_otherwise(name, scale_of, master, tmp_path):
    export_gguf(master, tmp_path / "out.gguf", name)
    with open_weights(master) as reader:
        codes, scale = reader.ternary("model.layers.1.mlp.down_proj.weight")
    expected = codes.numpy() * scale_of(np.array([scale], np.float32))
    assert np.array_equal(read_gguf(tmp_path / "out.gguf").dequantize("blk.1.ffn_down.weight"), expected)


def test_packed_and_master_give_the_same_weights(master, tmp_path):
    save_packed(tiny_bitnet(), tmp_path / "p", tiny_tokenizer())
    export_gguf(master, tmp_path / "m.gguf")
    export_gguf(tmp_path / "p", tmp_path / "p.gguf")
    a, b = read_gguf(tmp_path / "m.gguf"), read_gguf(tmp_path / "p.gguf")
    assert all(np.array_equal(a.raw(name), b.raw(name)) for name in a.tensors)


def test_a_width_of_576_is_refused_by_name_and_auto_takes_q2_0(tmp_path):
    save_master(tiny_bitnet(hidden=576, ffn=1536, heads=9, kv_heads=3, layers=1), tmp_path / "m", tiny_tokenizer())
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight has rows of 576, but TQ2_0 needs a multiple of 256"):
        export_gguf(tmp_path / "m", tmp_path / "out.gguf", "tq2_0")
    assert not (tmp_path / "out.gguf").exists()
    tensors = export_gguf(tmp_path / "m", tmp_path / "out.gguf").tensors
    assert (tensors["blk.0.attn_q.weight"], tensors["blk.0.ffn_down.weight"]) == ("q2_0", "tq2_0")


@pytest.mark.parametrize(
    ("around", "begin", "end"),
    [
        (None, False, False),
        ("$A", False, False),
        ("<|begin|> $A", True, False),
        ("$A <|endoftext|>", False, True),
        ("<|begin|> $A <|endoftext|>", True, True),
    ],
    ids=["nothing", "empty-template", "begin", "end", "both"],
)
def test_the_file_says_what_the_tokenizer_puts_around_a_text(around, begin, end, tmp_path):
    save_master(tiny_bitnet(hidden=64, ffn=128, layers=1), tmp_path / "m", tiny_tokenizer(around=around))
    export_gguf(tmp_path / "m", tmp_path / "out.gguf")
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["tokenizer.ggml.add_bos_token"] is begin
    assert metadata["tokenizer.ggml.add_eos_token"] is end
    assert metadata["tokenizer.ggml.eos_token_id"] == 0
    assert metadata.get("tokenizer.ggml.bos_token_id") == (None if around is None else 1)


@pytest.mark.parametrize("around", ["<|endoftext|> $A", "<|begin|> <|begin|> $A", "$A <|begin|>"], ids=["other", "twice", "behind"])
def test_what_llama_cpp_cannot_put_around_a_text_is_refused(around, tmp_path):
    save_master(tiny_bitnet(hidden=64, ffn=128, layers=1), tmp_path / "m", tiny_tokenizer(around=around))
    made = around.replace("$A", "a").replace("|", r"\|")
    with pytest.raises(UserError, match=rf"tokenizer\.json makes '{made}' of the text 'a'.* change the post_processor"):
        export_gguf(tmp_path / "m", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_the_file_says_where_its_weights_come_from(master, tmp_path):
    export_gguf(master, tmp_path / "plain.gguf")
    assert PROVENANCE_KEY not in read_gguf(tmp_path / "plain.gguf").metadata
    save_master(tiny_bitnet(), master, tiny_tokenizer(), provenance="a 4-bit copy")
    export_gguf(master, tmp_path / "out.gguf")
    assert read_gguf(tmp_path / "out.gguf").metadata["wrinklefree.provenance"] == "a 4-bit copy"
    with open_weights(master) as reader:
        assert file_differences(reader, tmp_path / "out.gguf") == []
        assert file_differences(reader, tmp_path / "plain.gguf") == ["key wrinklefree.provenance"]


def test_what_the_architecture_cannot_hold_is_refused(tmp_path):
    save_master(tiny_bitnet(tied=False, hidden=64, ffn=128), tmp_path / "m", tiny_tokenizer())
    with pytest.raises(UserError, match="untied head"):
        export_gguf(tmp_path / "m", tmp_path / "out.gguf", architecture="bitnet")
    assert not (tmp_path / "out.gguf").exists()
    assert export_gguf(tmp_path / "m", tmp_path / "out.gguf").architecture == "wrinklefree"
    save_master(tiny_bitnet(hidden=64, ffn=128), tmp_path / "n", tiny_tokenizer())
    with pytest.raises(UserError, match="unknown GGUF type 'q4_0'"):
        export_gguf(tmp_path / "n", tmp_path / "out.gguf", "q4_0")
    with pytest.raises(UserError, match="unknown type 'q4_0' of embeddings"):
        export_gguf(tmp_path / "n", tmp_path / "out.gguf", embedding="q4_0")
    with pytest.raises(UserError, match=r"token_embd\.weight has rows of 64, which Q6_K cannot have"):
        export_gguf(tmp_path / "n", tmp_path / "out.gguf", embedding="q6_k")
    with pytest.raises(UserError, match="has rows of 64, but I2_S needs a multiple of 128"):
        export_gguf(tmp_path / "n", tmp_path / "out.gguf", "i2_s")


def test_a_full_disk_leaves_no_file(master, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", full)
    with pytest.raises(UserError, match="No space left on device"):
        export_gguf(master, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_damaged_write_is_caught(master, tmp_path, monkeypatch):
    def flipped(*args):
        for rows, data in encoded_pieces(*args):
            data = data.copy()
            data.view(np.uint8).reshape(-1)[-1] ^= 1
            yield rows, data

    monkeypatch.setattr("bitnet_arch.gguf.writer.encoded_pieces", flipped)
    with pytest.raises(RuntimeError, match="reads back differently"):
        export_gguf(master, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2_000), st.integers(0, 255))
def test_a_hostile_header_ends_in_one_sentence_or_a_valid_file(tmp_path_factory, position, value):
    path = tmp_path_factory.getbasetemp() / "good.gguf"
    if not path.exists():
        save_master(tiny_bitnet(hidden=64, ffn=128, layers=1), path.parent / "h", tiny_tokenizer())
        export_gguf(path.parent / "h", path)
    data = bytearray(path.read_bytes())
    data[position] = value
    bad = path.with_name("bad.gguf")
    bad.write_bytes(data)
    try:
        tensors = read_gguf(bad).tensors
    except UserError as error:
        tensors = str(error)
    assert tensors if isinstance(tensors, dict) else "bad.gguf" in tensors


@pytest.mark.parametrize(("embedding", "value"), [("f16", 1e6), ("q4_1", 1e6), ("q8_0", 1e8), ("q6_k", 3e38)])
def test_embeddings_beyond_f16_are_refused(embedding, value, tmp_path):
    model = tiny_bitnet(hidden=256, ffn=256, layers=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[2, 3] = value
    save_master(model, tmp_path / "m", tiny_tokenizer())
    with pytest.raises(UserError, match=r"model.embed_tokens.weight holds values that f16 or f32 cannot"):
        export_gguf(tmp_path / "m", tmp_path / "out.gguf", embedding=embedding)
    assert not (tmp_path / "out.gguf").exists()
