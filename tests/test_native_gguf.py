"""The C++ reader of GGUF files against `bitnet_arch`'s, on whole and on damaged files."""

import os
import random
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from bitnet_arch import UserError
from bitnet_arch.gguf import read_gguf
from bitnet_arch.gguf.fuzz import mutate, write_corpus
from bitnet_kernels import _native
from hypothesis import given, settings
from hypothesis import strategies as st

TYPES = {0, 1, 3, 8, 14, 30, 34, 35, 36, 42}
"""What the C++ reader knows: F32, F16, Q4_1, Q8_0, Q6_K, BF16, TQ1_0, TQ2_0, I2_S, Q2_0."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def both(path):
    """Read a file with both readers; return what each makes of it, None where it refuses."""
    refusal = None
    try:
        ours = _native.Gguf(path.read_bytes())
    except ValueError as error:
        ours, refusal = None, str(error)
    try:
        reference = read_gguf(path)
    except UserError:
        reference = None
    assert refusal is None or ("\n" not in refusal and "export or download it again" in refusal)
    return ours, reference


def assert_same(ours, reference):
    assert ours.tensors() == {name: list(info.shape) for name, info in reference.tensors.items()}
    values = ours.values()
    assert values.keys() == reference.metadata.keys()
    for key, expected in reference.metadata.items():
        found = values[key].decode(errors="replace") if isinstance(values[key], bytes) else values[key]
        wanted = len(expected) if isinstance(expected, list) else expected
        assert type(found) is type(wanted), key
        assert found == wanted or found != found, key
    for name in reference.tensors:
        np.testing.assert_array_equal(ours.floats(name), reference.dequantize(name), err_msg=name)


def test_every_value_of_every_type_is_the_reference_readers(corpus):
    types = set()
    for path in corpus:
        ours, reference = both(path)
        assert_same(ours, reference)
        types |= {info.ggml_id for info in reference.tensors.values()}
    assert types == TYPES - {35}  # which has a test of its own


def test_tq2_0_is_the_reference_readers(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "file.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint64("large", 2**64 - 1)
    writer.add_array("flags", [True, False])
    writer.add_array("words", ["a", "", "é"])
    blocks = np.random.default_rng(0).integers(0, 256, (6, 2 * 66), dtype=np.uint8)
    blocks[:, [65, 131]] = 0x20  # scales that are numbers
    blocks &= np.where(np.arange(132) % 66 < 64, 0b10101010, 255).astype(np.uint8)  # no code of 3
    writer.add_tensor("t", blocks, raw_dtype=gguf.GGMLQuantizationType.TQ2_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_same(*both(path))


def test_a_file_cut_off_anywhere_in_its_header_is_refused(corpus):
    for path in corpus:
        data, header = path.read_bytes(), read_gguf(path).tensors_start
        for end in range(header + 1):
            with pytest.raises(ValueError, match="is not a usable GGUF file"):
                _native.Gguf(data[:end])


def test_tensors_that_share_bytes_are_refused_by_both_readers(tmp_path):
    def file(second):
        """Two tensors of 64 float32 each, the second one at an offset."""
        infos = b"".join(
            struct.pack("<Q", 1) + name + struct.pack("<IQIQ", 1, 64, 0, offset) for name, offset in ((b"a", 0), (b"b", second))
        )
        head = b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + infos
        path = tmp_path / "file.gguf"
        path.write_bytes(head + bytes(-len(head) % 32) + np.arange(128, dtype=np.float32).tobytes())
        return path

    assert_same(*both(file(256)))
    for offset in (0, 32, 224):
        with pytest.raises(ValueError, match="two tensors share bytes"):
            _native.Gguf(file(offset).read_bytes())
        with pytest.raises(UserError, match="two tensors share bytes"):
            read_gguf(file(offset))


@pytest.mark.parametrize(
    ("alignment", "offset", "says"),
    [
        (None, 258, "offset is no multiple of its alignment"),
        (None, 264, "offset is no multiple of its alignment"),
        (64, 288, "offset is no multiple of its alignment"),
        (1, 257, "alignment is"),
        (4, 256, "alignment is"),
        (12, 264, "alignment is"),
        (8, 264, None),
        (64, 320, None),
    ],
)
def test_numbers_lie_where_processors_can_read_them_or_both_readers_refuse(alignment, offset, says, tmp_path):
    """GGUF's specification: the alignment is a multiple of 8, and offsets are of the alignment."""
    keys = b"" if alignment is None else struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, alignment)
    infos = b"".join(struct.pack("<Q", 1) + name + struct.pack("<IQIQ", 1, 64, 0, at) for name, at in ((b"a", 0), (b"b", offset)))
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, int(alignment is not None)) + keys + infos
    path = tmp_path / "file.gguf"
    path.write_bytes(head + bytes(-len(head) % (alignment or 32)) + np.arange(160, dtype=np.float32).tobytes())
    if says is None:
        return assert_same(*both(path))
    with pytest.raises(ValueError, match=says):
        _native.Gguf(path.read_bytes())
    with pytest.raises(UserError, match=says):
        read_gguf(path)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_what_is_accepted_of_a_damaged_file_is_what_the_reference_accepts(corpus, data):
    path = data.draw(st.sampled_from(corpus))
    header = read_gguf(path).tensors_start
    changed = mutate(path.read_bytes(), header, random.Random(data.draw(st.integers(0, 2**64))))
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(changed)
        file.flush()
        ours, reference = both(Path(file.name))
        if ours is not None:
            assert reference is not None
            assert_same(ours, reference)
        elif reference is not None:  # refused by this reader alone: for a type that no decoder here reads, or for a name
            names = [*reference.metadata, *reference.tensors]
            plain = all(name.isascii() and name.isprintable() for name in names)
            assert not plain or {info.ggml_id for info in reference.tensors.values()} - TYPES


@pytest.mark.slow
def test_no_damage_makes_the_reader_read_beyond_its_bytes(corpus, tmp_path):
    """cpp/tests/runtime_check.cpp: every byte of every header changed, cut off at each, and random damage, under the sanitizers."""
    if shutil.which("g++") is None:
        (pytest.fail if os.environ.get("WF_REQUIRE_NATIVE") else pytest.skip)(
            "not installed: g++ (.ci/run installs Debian's packages)"
        )
    cpp = Path(__file__).parents[1] / "packages" / "kernels" / "cpp"
    flags = ["-std=c++20", "-O1", "-g", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-I", str(cpp)]
    files = ["runtime/gguf.cpp", "runtime/numbers.cpp", "ternary/pool.cpp", "tests/runtime_check.cpp"]
    subprocess.run(["g++", *flags, *(str(cpp / file) for file in files), "-o", str(tmp_path / "check")], check=True)
    done = subprocess.run([tmp_path / "check", "300", *corpus], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr
