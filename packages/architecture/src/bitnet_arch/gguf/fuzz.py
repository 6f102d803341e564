"""What fuzzing a GGUF file means here: nothing that a file holds may end in anything but success or a `UserError`."""

import os
import random
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bitnet_arch.checkpoint import save_packed
from bitnet_arch.convert import ConversionConfig, convert_model
from bitnet_arch.errors import UserError
from bitnet_arch.gguf.importer import from_gguf
from bitnet_arch.gguf.reader import GgufFile, read_gguf
from bitnet_arch.gguf.tokenizer import rebuild_tokenizer
from bitnet_arch.gguf.writer import export_gguf
from bitnet_arch.testing import tiny_bitnet, tiny_llama, tiny_tokenizer

STAGES = frozenset({"read", "dequantize", "import", "tokenizer"})
"""What can refuse a file."""


def try_file(path: Path) -> str:
    """Read a file in every way; return which of `STAGES` refused it, divided by spaces ("" if none).

    Raises:
        Exception: anything but a `UserError` is a bug.
    """
    refused = []
    try:
        file = read_gguf(path)
    except UserError:
        return "read"
    for name in file.tensors:
        try:
            file.dequantize(name)
        except UserError:
            refused.append("dequantize")
            break
    actions: dict[str, Callable[[], object]] = {"import": lambda: from_gguf(path), "tokenizer": lambda: rebuild_tokenizer(file)}
    for what, action in actions.items():
        try:
            action()
        except UserError:
            refused.append(what)
    return " ".join(refused)


def try_bytes(data: bytes) -> str:
    """Do to bytes what `try_file` does to a file."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        return try_file(Path(file.name))


def write_corpus(folder: Path | str) -> list[Path]:
    """Write small files of several types, architectures and scales; return them."""
    folder = Path(folder)
    small: dict[str, Any] = {"hidden": 128, "ffn": 128, "layers": 1, "heads": 2, "kv_heads": 1, "vocab": 300}
    groups = ConversionConfig(norm="subln", gain="one", granularity="group128", rotation=True)
    makers: dict[str, tuple[Callable[[], PreTrainedModel], str, str]] = {
        "bitnet-q2_0": (lambda: tiny_bitnet(**small), "q2_0", "f16"),
        "bitnet-i2_s": (lambda: tiny_bitnet(**small), "i2_s", "q4_1"),
        "llama-bf16": (lambda: convert_model(tiny_llama(**small), ConversionConfig(norm="none")), "bf16", "bf16"),
        "ours-groups": (lambda: convert_model(tiny_llama(**small), groups), "q2_0", "q8_0"),
        "ours-scales": (lambda: convert_model(tiny_llama(tied=False, **small), groups), "i2_s", "q8_0"),
        "llama-tq1_0": (
            lambda: convert_model(tiny_llama(**small | {"hidden": 256, "ffn": 256}), ConversionConfig(norm="none")),
            "tq1_0",
            "q6_k",
        ),
    }
    paths = []
    for name, (maker, kind, embedding) in makers.items():
        with tempfile.TemporaryDirectory() as model:
            save_packed(maker(), Path(model) / "m", tiny_tokenizer(300))
            export_gguf(Path(model) / "m", folder / f"{name}.gguf", kind, embedding=embedding)
        paths.append(folder / f"{name}.gguf")
    return paths


def mutate(data: bytes, header: int, pick: random.Random) -> bytes:
    """Return a file with some bytes or numbers changed, cut out, doubled or cut off, mostly in its header."""
    changed = bytearray(data)
    for _ in range(1 << pick.randrange(5)):
        at = pick.randrange(header if pick.random() < 0.8 else len(changed))
        kind = pick.randrange(6)
        if kind == 0:
            changed[at] = pick.randrange(256)
        elif kind == 1:
            changed[at] ^= 1 << pick.randrange(8)
        elif kind == 2:
            size = pick.choice((4, 8))
            value = pick.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, pick.randrange(64), len(data)))
            changed[at : at + size] = (value % 256**size).to_bytes(size, "little")
        elif kind == 3 and pick.random() < 0.2:
            del changed[at : at + pick.randrange(1, 64)]
        elif kind == 4 and pick.random() < 0.2:
            changed[at:at] = changed[at : at + pick.randrange(1, 64)]
        elif kind == 5 and pick.random() < 0.05:
            del changed[at:]
        if not changed:
            return b""
        header = min(header, len(changed))
    return bytes(changed)


def rewritten(file: GgufFile, pick: random.Random) -> bytes:
    """Return a well-formed file with some keys or tensors other than in `file`: what a mutation of bytes hardly ever is."""
    keys = dict(file.metadata)
    infos: list[list[Any]] = [
        [name, list(info.shape), info.ggml_id, info.offset - file.tensors_start] for name, info in file.tensors.items()
    ]
    for _ in range(1 << pick.randrange(3)):
        kind = pick.randrange(6)
        info = pick.choice(infos)
        if kind == 0:
            del keys[pick.choice([key for key in keys if key != "general.architecture"])]
        elif kind in (1, 2):
            key = pick.choice(list(keys))
            keys[key] = pick.choice((*_STRANGE, keys[pick.choice(list(keys))], keys[key]))
        elif kind == 3:
            info[0] = pick.choice((pick.choice(infos)[0], str(info[0]) + ".scale", "rope_freqs.weight", "output.weight", ""))
        elif kind == 4:
            info[1] = pick.choice((info[1][::-1], [1], [*info[1], 1], pick.choice(infos)[1], [256], [128, 1], [1, 1]))
        else:
            info[2] = pick.choice((0, 1, 8, 14, 30, 34, 35, 36, 42, info[2]))
            info[3] = pick.choice((0, info[3], 32 * pick.randrange(99)))
    return _header(keys, infos) + file.data[file.tensors_start :].tobytes()


def assemble(keys: Mapping[str, Any], tensors: Sequence[tuple[str, Sequence[int], int, bytes]]) -> bytes:
    """Return a file of these keys (integers and floats of 64 bits) and tensors, whatever they say.

    Args:
        keys: metadata.
        tensors: name, row-major shape, ggml's number of the type, and bytes of each.
    """
    infos, data = [], b""
    for name, shape, ggml_id, values in tensors:
        infos.append([name, list(shape), ggml_id, len(data)])
        data += values + bytes(-len(values) % 32)
    return _header(keys, infos) + data


def _header(keys: Mapping[str, Any], infos: Sequence[list[Any]]) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(keys))
    header += b"".join(_text(key) + _value(value) for key, value in keys.items())
    for name, shape, ggml_id, offset in infos:
        header += _text(str(name)) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], ggml_id, offset)
    return header + bytes(-len(header) % 32)


_NUMBERS = (0, 1, 2, 3, 7, 64, 128, 2**31, -1, 0.0, 1e-30, 1e30, float("nan"), float("inf"), True, False)
_WORDS = (
    "",
    "none",
    "linear",
    "llama",
    "qwen3",
    "qwen2",
    "gemma3_text",
    "bitnet",
    "subln",
    "allnorm",
    "bitlinear",
    "row",
    "group128",
)
_LISTS: tuple[list[Any], ...] = ([], [True], [1], ["a", "a"], [0.5])
_STRANGE: tuple[Any, ...] = (*_NUMBERS, *_WORDS, *_LISTS)


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    if not isinstance(value, list):
        number, data = _kind(value)
        return struct.pack("<I", number) + data
    number = _kind(value[0])[0] if value else 4
    return struct.pack("<IIQ", 9, number, len(value)) + b"".join(_kind(item)[1] for item in value)


def _kind(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 11, struct.pack("<q", value)
    if isinstance(value, float):
        return 12, struct.pack("<d", value)
    return 8, _text(value)


def fuzz_random(folder: Path | str, seconds: float, seed: int = 0) -> dict[str, int]:
    """Mutate a corpus for some processor seconds, half of the time keeping it well-formed; return how often each stage refused.

    Raises:
        Exception: the first finding; the input is kept as `crash.bin` beside the corpus.
    """
    folder, pick, refused = Path(folder), random.Random(seed), Counter[str]()
    corpus = [read_gguf(path) for path in sorted(folder.glob("*.gguf"))]
    end = time.process_time() + seconds
    handle, name = tempfile.mkstemp(suffix=".bin", dir=folder)
    os.close(handle)
    path = Path(name)
    while time.process_time() < end:
        file = pick.choice(corpus)
        path.write_bytes(rewritten(file, pick) if pick.random() < 0.5 else mutate(file.data.tobytes(), file.infos_end, pick))
        try:
            refused[try_file(path) or "nothing"] += 1
        except BaseException:
            path.replace(folder / "crash.bin")
            raise
    path.unlink()
    return dict(refused)
