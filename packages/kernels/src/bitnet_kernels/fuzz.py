"""What fuzzing this package means: whatever a caller passes in, the answer is a result or an exception that names an argument.

Anything else is a finding: another exception, or a crash, after which the last line of the log says what was called.
"""

import atexit
import ctypes
import functools
import os
import random
import re
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import bitnet_kernels
from bitnet_kernels import BLOCK_TYPES, BlockMatrix, Engine, TernaryMatrix
from bitnet_kernels.formats import TYPES
from bitnet_kernels.low_rank import LowRank
from bitnet_kernels.ops import KV_TYPES, KvCache, rms_norm, rope

NAMES = (
    "blocks",
    "codes",
    "columns",
    "count",
    "data",
    "ids",
    "kind",
    "matrices",
    "packed",
    "scale",
    "shape",
    "type",
    "x",
    "rows",
    "isa",
    "capacity",
    "cos",
    "epsilon",
    "head_dim",
    "heads",
    "keys",
    "q",
    "ranges",
    "sin",
    "u",
    "u_scale",
    "v",
    "v_scale",
    "values",
    "weight",
)
"""Arguments that a message may begin with; `rows` is what `to_hf` says of the matrix itself."""

_SAYS = re.compile(
    r"(slots?|source|to|length|max_tokens|top_k|top_p|temperature|seed|stop|context|cache|rows|bidirectional|sequences|tokens|prompts?)\b"
    r"|a token(:| is )|the (length|slot|context|temperature|number of slots|block's size) |a sequence has no tokens"
    r"|\d+ tokens do not fit"
    r"|a prompt (of|and) |the engine has no tokenizer|expected str, bytes or os.PathLike|.* cannot be read \("
)
"""How a message about an engine's arguments begins."""

DTYPES = (
    "int8",
    "uint8",
    "int64",
    "float32",
    ">f4",
    "float16",
    "float64",
    "bool",
    "complex64",
    "object",
    "datetime64[s]",
    "S3",
    "U2",
)
SIZES = (0, 1, 2, 3, 4, 15, 16, 17, 18, 31, 32, 34, 54, 63, 64, 66, 100, 127, 128, 129, 144, 256, 300, 512)


class Foreign:
    """What shows an array by DLPack, as a torch tensor does, or fails to."""

    def __init__(self, array: Any, device: Any = (1, 0), error: Exception | None = None) -> None:
        self.array, self.device, self.error = array, device, error

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        return self.array.__dlpack__(**options)


def any_array(rng: random.Random, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> Any:
    """Return an array, of a dtype and shape where these are given, that may lie anyhow and hold anything; or what is none."""
    if rng.random() < 0.15:
        return any_object(rng)
    if dtype is None or rng.random() < 0.1:
        dtype = rng.choice(DTYPES)
    if shape is None or rng.random() < 0.1:
        shape = tuple(rng.choice(SIZES if n < 2 else (0, 1, 2)) for n in range(rng.choice((0, 1, 1, 2, 2, 2, 3))))
    numbers = np.random.default_rng(rng.randrange(2**32))
    size = int(np.prod(shape, dtype=np.int64))
    kind = np.dtype(dtype)
    if kind.hasobject or kind.kind in "SUMm":
        array = np.zeros(shape, kind)
    elif kind.kind in "fc":
        array = numbers.standard_normal(shape).astype(kind)
        if size and rng.random() < 0.2:
            array.reshape(-1)[rng.randrange(size)] = (
                rng.choice((np.nan, np.inf, -np.inf, 3e38, 1e-45, -0.0)) if kind.itemsize > 2 else 0
            )
    elif kind.kind == "b" or rng.random() < 0.7:
        array = numbers.integers(-1 if kind.kind == "i" else 0, 2, shape).astype(kind)
    else:
        array = np.frombuffer(numbers.bytes(size * kind.itemsize), kind).reshape(shape).copy()
    return laid_out(rng, array)


def laid_out(rng: random.Random, array: Any) -> Any:
    """Return the same array, as it is or in another way."""
    way = rng.randrange(14)
    if way == 0 and array.ndim:
        return np.repeat(array, 2, axis=-1)[..., ::2]
    if way == 1:
        return np.asfortranarray(array)
    if way == 2:
        return array[::-1] if array.ndim else array
    if way == 3 and not array.dtype.hasobject:  # misaligned
        data = np.zeros(array.nbytes + 1, np.uint8)
        data[1:] = np.frombuffer(array.tobytes(), np.uint8)
        return data[1:].view(array.dtype).reshape(array.shape) if array.nbytes else array
    if way == 4:
        array.flags.writeable = False
    elif way == 5 and array.ndim == 2 and array.size:
        return np.broadcast_to(array[:1], (rng.choice((array.shape[0], 7, 2**45)), array.shape[1]))
    elif way == 6 and array.dtype.isnative:
        return Foreign(
            array, rng.choice(((1, 0), (1, 0), (2, 0), (13, 7), (), None, "cpu")), rng.choice((None, None, BufferError("no")))
        )
    elif way == 7 and not array.dtype.hasobject and array.dtype.kind not in "Mm":
        return memoryview(array)
    elif way == 8 and array.ndim == 2:
        return array.view(np.matrix)
    elif way == 9:
        return np.ma.masked_array(array)
    return array


def any_object(rng: random.Random) -> Any:
    """Return what is no array, or hardly one."""
    plain: tuple[Any, ...] = (
        None,
        0,
        -1,
        2**70,
        1.5,
        "x",
        "",
        b"",
        b"abcd",
        bytearray(64),
        (),
        [],
        [1, 2],
        [[1.0]],
        {},
        object(),
        range(3),
        print,
    )
    near = (np.float32(1), (ctypes.c_float * 4)(), np.zeros(2).__array_interface__, Foreign(None), Foreign(np.zeros(3)))
    return rng.choice((*plain, *near))


def any_integer(rng: random.Random) -> Any:
    """Return an integer, or hardly one."""
    return rng.choice((*SIZES, 2**23, 2**23 + 64, 2**31, 2**40, 2**63, 2**64, -1, -256, True, 64.0, "64", None, np.int64(64)))


def any_matrix(rng: random.Random) -> TernaryMatrix:
    """Return a matrix."""
    rows, columns = (rng.choice([size for size in SIZES if size]) for _ in range(2))
    codes = np.random.default_rng(rng.randrange(2**32)).integers(-1, 2, (rows, columns), np.int8)
    shape = rng.choice(((1,), (rows, 1), (rows, -(-columns // 128))))
    return TernaryMatrix(codes, np.full(shape, rng.choice((1.0, 0.1)), np.float32))


def _construct(rng: random.Random) -> object:
    rows, columns = rng.choice(SIZES), rng.choice(SIZES)
    scale = rng.choice(((1,), (rows, 1), (rows, -(-columns // 128))))
    return TernaryMatrix(any_array(rng, "int8", (rows, columns)), any_array(rng, "float32", scale)).codes()


def _from_hf(rng: random.Random) -> object:
    rows, columns = rng.choice(SIZES), rng.choice(SIZES)
    return TernaryMatrix.from_hf(any_array(rng, "uint8", (rows, columns)), any_array(rng, "float32", (1,))).to_hf()


def _from_gguf(rng: random.Random) -> object:
    name: Any = rng.choice((*TYPES, *TYPES, "TQ2_0", "q4_0", None, 7))
    kind = TYPES.get(str(name).lower(), TYPES["tq1_0"])
    rows, columns = rng.choice(SIZES), kind.block * rng.randrange(3)
    size = kind.nbytes(rows, columns) + rng.choice((0, 0, 0, 0, 1, -1))
    shape: Any = rng.choice(
        ((rows, columns), (rows, columns), [rows, columns], (any_integer(rng), any_integer(rng)), any_object(rng))
    )
    return TernaryMatrix.from_gguf(name, any_array(rng, "uint8", (max(size, 0),)), shape).codes()


def _to(rng: random.Random) -> object:
    matrix = any_matrix(rng)
    name = rng.choice((*TYPES, "hf", any_object(rng)))
    return matrix.to_hf() if isinstance(name, str) and name == "hf" else matrix.to_gguf(name)


def _matmul(rng: random.Random) -> object:
    matrix = any_matrix(rng)
    x = any_array(rng, "float32", (rng.randrange(20), matrix.columns))
    return rng.choice((matrix.matmul, matrix.matmul_integer, bitnet_kernels.quantize_activations))(x)


def _many(rng: random.Random) -> object:
    first = any_matrix(rng)
    matrices = rng.choice(([first, first], [first, any_matrix(rng)], [first, any_object(rng)], [], (first,)))
    return bitnet_kernels.matmul_many(matrices, any_array(rng, "float32", (rng.randrange(4), first.columns)))


def _blocks(rng: random.Random) -> object:
    kind = rng.choice((*BLOCK_TYPES, *BLOCK_TYPES, any_object(rng)))
    blocks = rng.randrange(3)
    columns, size = {"q8_0": (32, 34), "q6_k": (256, 210), "q4_1": (32, 20)}.get(kind if isinstance(kind, str) else "", (32, 34))
    rows = rng.choice(SIZES)
    width = rng.choice((columns * blocks, columns * blocks, any_integer(rng)))
    matrix = BlockMatrix(any_array(rng, "uint8", (rows, size * blocks)), kind, width)
    if rng.random() < 0.5:
        return matrix.lookup(any_array(rng, "int64", (rng.randrange(5),)))
    return matrix.matmul(any_array(rng, "float32", (rng.randrange(6), matrix.columns)))


def _rms_norm(rng: random.Random) -> object:
    columns = rng.choice(SIZES)
    x, weight = any_array(rng, "float32", (rng.randrange(4), columns)), any_array(rng, "float32", (columns,))
    return rms_norm(x, weight, rng.choice((1e-5, 0.0, -1.0, 1e39, any_object(rng))))


def _rope(rng: random.Random) -> object:
    tokens, half = rng.randrange(4), rng.randrange(20)
    x = any_array(rng, "float32", (tokens, rng.randrange(3), rng.choice((2 * half, 2 * half + 3))))
    return rope(x, any_array(rng, "float32", (tokens, half)), any_array(rng, "float32", (tokens, half)))


def _attention(rng: random.Random) -> object:
    heads, head_dim, kept, tokens = rng.randrange(1, 4), rng.choice((1, 2, 16, 20, 64)), rng.randrange(70), rng.randrange(4)
    sizes = [rng.choice((size, size, size, any_object(rng))) if rng.random() < 0.1 else size for size in (heads, head_dim, 70)]
    cache = KvCache(rng.choice((*KV_TYPES, *KV_TYPES, any_object(rng))), *sizes)
    cache.append(any_array(rng, "float32", (kept, heads, head_dim)), any_array(rng, "float32", (kept, heads, head_dim)))
    q = any_array(rng, "float32", (tokens, heads * rng.randrange(1, 6), head_dim))
    return cache.attention(q, any_array(rng, "int64", (tokens, 2)), rng.choice((0.125, 0.125, np.nan, any_object(rng))))


def _low_rank(rng: random.Random) -> object:
    kind, rows, columns, rank = rng.choice(("float16", "int8")), rng.choice(SIZES), rng.choice(SIZES), rng.choice(SIZES[:10])
    scales = [any_array(rng, "float32", (rank,)) if kind == "int8" or rng.random() < 0.1 else None for _ in range(2)]
    adapters = LowRank(any_array(rng, kind, (rows, rank)), any_array(rng, kind, (columns, rank)), *scales)
    return adapters.matmul(any_array(rng, "float32", (rng.randrange(6), columns)))


def _settings(rng: random.Random) -> object:
    if rng.random() < 0.5:
        bitnet_kernels.use_isa(rng.choice((*bitnet_kernels.available_isas(), any_object(rng))))
    else:
        bitnet_kernels.set_threads(rng.choice((1, 1, 2, 3, 0, any_object(rng))))
    return None


_TENSORS = {
    "output_norm": (32,),
    "blk.0.attn_norm": (32,),
    "blk.0.attn_q": (32, 32),
    "blk.0.attn_k": (16, 32),
    "blk.0.attn_v": (16, 32),
    "blk.0.attn_output": (32, 32),
    "blk.0.ffn_norm": (32,),
    "blk.0.ffn_gate": (48, 32),
    "blk.0.ffn_up": (48, 32),
    "blk.0.ffn_down": (32, 48),
}


def tiny_gguf(vocabulary: int = 19, context: int = 24) -> bytes:
    """Return a GGUF file of a `llama` with one block, whose tensors are float32 and whose matrices are ternary."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def whole(key: str, value: int) -> bytes:
        return text(f"llama.{key}") + struct.pack("<II", 4, value)

    def real(key: str, value: float) -> bytes:
        return text(f"llama.{key}") + struct.pack("<If", 6, value)

    numbers = np.random.default_rng(0)
    keys = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    keys += [
        whole("block_count", 1),
        whole("context_length", context),
        whole("embedding_length", 32),
        whole("feed_forward_length", 48),
    ]
    keys += [whole("attention.head_count", 2), whole("attention.head_count_kv", 1), whole("rope.dimension_count", 16)]
    keys += [real("attention.layer_norm_rms_epsilon", 1e-5), real("rope.freq_base", 1e4)]
    header, data = b"", b""
    tensors = {"token_embd": (vocabulary, 32), **_TENSORS}
    for name, shape in tensors.items():
        header += text(f"{name}.weight") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), 0, len(data))
        data += numbers.integers(-1 if len(shape) > 1 else 1, 2, shape).astype("<f4").tobytes()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + header
    return head + bytes(-len(head) % 32) + data


@functools.cache
def _file() -> str:
    handle, path = tempfile.mkstemp(suffix=".gguf")
    os.close(handle)
    Path(path).write_bytes(tiny_gguf())
    atexit.register(os.unlink, path)
    return path


def _tokens(rng: random.Random) -> Any:
    good = [rng.randrange(19) for _ in range(rng.randrange(1, 7))]
    return rng.choice(
        (good, good, good, tuple(good), np.array(good), [*good, rng.choice((19, -1, any_object(rng)))], any_object(rng))
    )


def _option(rng: random.Random, *good: Any) -> Any:
    return rng.choice(good) if rng.random() < 0.9 else rng.choice((any_object(rng), any_integer(rng), any_array(rng)))


def _engine(rng: random.Random) -> object:
    path = _option(rng, *[_file()] * 20, os.fsencode(_file()), Path(_file()))
    engine = Engine(path, slots=_option(rng, 1, 2, 3), context=_option(rng, None, 24, 12), cache=_option(rng, "f32", "f16", "int8"))
    for _ in range(rng.randrange(12)):
        try:
            _use(rng, engine)
        except (TypeError, ValueError) as error:
            if not _SAYS.match(str(error)) or "\n" in str(error):
                raise
        found = [engine.length(slot) for slot in range(engine.slots)]
        assert found == [len(held) for held in engine._held], "what is known of a slot is as long as the slot"
    return None


def _use(rng: random.Random, engine: Engine) -> None:
    slot = _option(rng, *range(engine.slots), engine.slots)
    match rng.randrange(6):
        case 0:
            engine.truncate(slot, _option(rng, 0, 1, 3))
        case 1:
            engine.copy(slot, _option(rng, 0, 1), _option(rng, 0, 1, 3))
        case 2:
            engine.prefill(_tokens(rng), slot=slot)
        case 3:
            sampling = {"temperature": _option(rng, 0.0, 0.7, 1), "top_k": _option(rng, 0, 3), "top_p": _option(rng, 1.0, 0.5)}
            more: dict[str, Any] = {"seed": _option(rng, 0, 2**64 - 1), "stop": _option(rng, (), [3], {1})}
            if rng.random() < 0.5:
                list(engine.generate(_tokens(rng), _option(rng, 1, 3), slot=slot, **sampling, **more))
            else:
                list(engine.generate_many(_option(rng, [_tokens(rng), _tokens(rng)], []), _option(rng, 1, 3), **sampling, **more))
        case _:
            name = rng.choice(("step", "log_probabilities", "hidden_states"))
            sequences = _option(rng, {slot: _tokens(rng)}) if _hashable(slot) else any_object(rng)
            rows, bidirectional = _option(rng, "none", "last", "all"), _option(rng, False, True)
            results = getattr(engine, name)(sequences, rows=rows, bidirectional=bidirectional)
            assert results.ndim == 2
            assert np.isfinite(results).all()


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except (TypeError, ValueError):  # the latter of a memoryview
        return False
    return True


CALLS: dict[str, Callable[[random.Random], object]] = {
    "construct": _construct,
    "from_hf": _from_hf,
    "from_gguf": _from_gguf,
    "to": _to,
    "matmul": _matmul,
    "many": _many,
    "blocks": _blocks,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "attention": _attention,
    "low_rank": _low_rank,
    "engine": _engine,
    "settings": _settings,
}


def try_once(name: str, seed: int) -> str:
    """Make one call; return "done", or the argument that an exception names.

    Of an engine also "refused", by a sentence, or "no memory".

    Raises:
        AssertionError: for an exception that names none.
        Exception: of another type is a finding, too.
    """
    try:
        CALLS[name](random.Random(seed))
    except MemoryError:
        if name != "engine":
            raise
        return "no memory"  # for a list of what only seems to be an array of 2^45 rows
    except (TypeError, ValueError) as error:
        if name == "engine" and _SAYS.match(str(error)) and "\n" not in str(error):
            return "refused"
        named = str(error).partition(":")[0].partition(" '")[0]
        if named not in NAMES:
            raise AssertionError(f"{name} {seed}: no argument is named by {type(error).__name__}: {error}") from error
        return named
    return "done"


def fuzz(seconds: float, first: int = 0, log: Path | None = None) -> Counter[str]:
    """Make calls for a time, with seeds from `first` on; return how many ended how.

    `log` gets each call before it is made: its last line is what crashed.
    """
    ends: Counter[str] = Counter()
    before, threads = bitnet_kernels.isa(), bitnet_kernels.threads()
    end = time.monotonic() + seconds
    seed = first
    lines = log.open("w") if log is not None else None
    try:
        while time.monotonic() < end:
            for name in CALLS:
                if lines is not None:
                    lines.seek(0)
                    lines.write(f"{name} {seed:12d}\n")
                    lines.flush()
                ends[f"{name}: {try_once(name, seed)}"] += 1
            seed += 1
    finally:
        bitnet_kernels.use_isa(before)
        bitnet_kernels.set_threads(threads)
        if lines is not None:
            lines.close()
    return ends
