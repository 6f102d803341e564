"""What fuzzing a model directory's weights means: whatever a safetensors file holds ends in success or a `UserError`."""

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitnet_arch.checkpoint import load_model, save_master, save_packed
from bitnet_arch.convert import ConversionConfig, convert_model
from bitnet_arch.errors import UserError
from bitnet_arch.gguf.fuzz import mutate
from bitnet_arch.shards import DTYPES, WEIGHTS_FILE
from bitnet_arch.stream import convert_directory
from bitnet_arch.testing import tiny_bitnet, tiny_llama
from bitnet_arch.weights import WeightReader, open_weights


def write_directories(folder: Path | str) -> list[Path]:
    """Write small model directories of every form; return them."""
    folder = Path(folder)
    small: dict[str, Any] = {"hidden": 32, "ffn": 32, "layers": 1, "heads": 2, "kv_heads": 1, "vocab": 16}
    groups = ConversionConfig(norm="allnorm", gain="one", granularity="group128", rotation=True)
    save_master(tiny_llama(**small), folder / "float")
    save_master(tiny_bitnet(**small), folder / "master")
    save_packed(tiny_bitnet(**small), folder / "packed")
    save_packed(convert_model(tiny_llama(tied=False, **small), groups), folder / "ours")
    return [folder / name for name in ("float", "master", "packed", "ours")]


def try_directory(directory: Path) -> str:
    """Read a directory in every way; return which of them refused it ("" if none).

    Raises:
        Exception: anything but a `UserError` of one sentence is a bug.
    """
    try:
        with open_weights(directory) as reader:
            names = reader.keys()
            for name in names:
                assert reader.get(name).shape == reader.spec(name).shape
                assert sum(piece.numel() for piece in reader.pieces(name, 64)) == reader.get(name).numel()
            actions: dict[str, Callable[[], object]] = {
                "load": lambda: load_model(directory),
                "codes": lambda: _codes(reader),
                "convert": lambda: _convert(directory),
            }
            return " ".join(what for what, action in actions.items() if _refuses(action))
    except UserError as error:
        _check_sentence(error)
        return "open"


def _refuses(action: Callable[[], object]) -> bool:
    try:
        action()
    except UserError as error:
        _check_sentence(error)
        return True
    return False


def _check_sentence(error: UserError) -> None:
    if "\n" in str(error):
        raise ValueError(f"not one sentence: {error}")


def _codes(reader: WeightReader) -> None:
    names = reader.keys()
    for name in names:
        if name.endswith("_proj.weight"):
            reader.ternary(name)


def _convert(directory: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        convert_directory(directory, Path(temporary) / "out", ConversionConfig(norm="none"))


def try_weights(directory: Path, data: bytes) -> str:
    """Read a directory as if its weights were these bytes, which are left there."""
    (directory / WEIGHTS_FILE).write_bytes(data)
    return try_directory(directory)


def header_size(data: bytes) -> int:
    """Return how many bytes of a safetensors file are its header and the header's length."""
    return 8 + int.from_bytes(data[:8], "little")


def rewritten_weights(data: bytes, pick: random.Random) -> bytes:
    """Return a file whose header is JSON and says other things than in `data`: what a mutation of bytes hardly ever is."""
    header: dict[str, Any] = json.loads(data[8 : header_size(data)])
    first = {name: dict(entry) for name, entry in header.items() if name != "__metadata__"}
    names = list(first)
    for _ in range(1 << pick.randrange(3)):
        name = pick.choice(names)
        entry = header.get(name)
        kind = pick.randrange(8)
        if not isinstance(entry, dict) or kind == 0:
            header.pop(name, None)
        elif kind == 1:
            entry["dtype"] = pick.choice((*DTYPES, "F4", "C64", "", 3, None))
        elif kind == 2:
            entry["shape"] = pick.choice((*_SHAPES, first[name]["shape"][::-1], first[pick.choice(names)]["shape"]))
        elif kind == 3:
            entry["data_offsets"] = pick.choice((*_OFFSETS, first[pick.choice(names)]["data_offsets"]))
        elif kind == 4:
            header[pick.choice((*names, "", "lm_head.weight", f"{name}_scale", name.replace("weight", "bias")))] = entry
        elif kind == 5:
            header["__metadata__"] = pick.choice(({}, {"format": "tf"}, {"a": 3}, [], None, "x"))
        elif kind == 6:
            entry.pop(pick.choice(("dtype", "shape", "data_offsets")), None)
        else:
            header[name] = dict(first[pick.choice(names)])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = bytearray(data[header_size(data) :])
    if pick.random() < 0.3:
        body[pick.randrange(len(body))] = pick.randrange(256)
    return len(text).to_bytes(8, "little") + text + bytes(body)


CRASH = "crash"
"""Name of the directory that shows a finding."""

_SHAPES: tuple[Any, ...] = ([], [0], [1], [-1], [2**62, 4], [1, 1, 1], [32, 32], [1.5], None, "x")
_OFFSETS: tuple[Any, ...] = ([0, 0], [0, 4], [4, 0], [-4, 0], [0, 2**63], [0], None, "x")


def fuzz_directories(folder: Path | str, seconds: float, seed: int = 0) -> dict[str, int]:
    """Mutate the weights of copies of `write_directories` for some processor seconds; return how often each stage refused.

    Raises:
        Exception: the first finding; the directory that shows it is left as `crash` in the folder, in place of an earlier one.
    """
    folder, pick, refused = Path(folder), random.Random(seed), Counter[str]()
    corpus = [path for path in sorted(folder.iterdir()) if path.name != CRASH and (path / WEIGHTS_FILE).is_file()]
    with tempfile.TemporaryDirectory() as scratch:
        copies = [Path(shutil.copytree(path, Path(scratch) / path.name)) for path in corpus]
        contents = [(path / WEIGHTS_FILE).read_bytes() for path in copies]
        end = time.process_time() + seconds
        while time.process_time() < end:
            directory, data = pick.choice(list(zip(copies, contents, strict=True)))
            changed = rewritten_weights(data, pick) if pick.random() < 0.5 else mutate(data, header_size(data), pick)
            try:
                refused[try_weights(directory, changed) or "nothing"] += 1
            except BaseException:
                shutil.rmtree(folder / CRASH, ignore_errors=True)
                shutil.copytree(directory, folder / CRASH)
                raise
    return dict(refused)
