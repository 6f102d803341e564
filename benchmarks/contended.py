"""What two threads keep of their speed when a neighbour takes a processor: our pool beside llama.cpp's.

uv run python benchmarks/contended.py --json contended.json

Both decode the same GGUF file of a random ternary model (TQ2_0), one token after the other, alone and beside processes that only
count, in turns: `bitnet_kernels.Engine`, and llama.cpp (xllamacpp, an AVX2 build). "products" are those of our layers alone,
without attention, norms and head.
"kept" is the median over rounds of the speed beside the neighbour as a part of the speed alone in the same round. Needs as
many idle processors as threads.

Bar: ours keeps at least 45%. A fair share of two processors for three who want them is 67%.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import bitnet_kernels
import numpy as np
from bitnet_arch import ConversionConfig, PackedBitLinear, convert_model, pack_model, save_master
from bitnet_arch.gguf import export_gguf
from bitnet_arch.testing import tiny_llama, tiny_tokenizer
from bitnet_kernels import Engine, TernaryMatrix, matmul_many
from report import bar, finish, median_ratio, parser
from transformers import PreTrainedModel

SHAPE = {"hidden": 1024, "ffn": 2816, "heads": 16, "kv_heads": 4}
COUNT = "while True: pass"
PROMPT = [5, 6, 7]


def products(model: PreTrainedModel, seconds: float) -> Callable[[], float]:
    """Return what measures the tokens a second of our products alone."""
    layers = [layer for layer in pack_model(model).modules() if isinstance(layer, PackedBitLinear)]
    matrices = [TernaryMatrix.from_hf(layer.weight.numpy(), layer.weight_scale.numpy()) for layer in layers]
    # q, k and v share their input, and so do gate and up.
    shared = [matrices[i + a : i + b] for i in range(0, len(matrices), 7) for a, b in ((0, 3), (3, 4), (4, 6), (6, 7))]
    inputs = {w.columns: np.random.default_rng(0).standard_normal((1, w.columns), dtype=np.float32) for w in matrices}

    def measure() -> float:
        start, tokens = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds:
            for group in shared:
                matmul_many(group, inputs[group[0].columns])
            tokens += 1
        return tokens / passed

    return measure


def ours(file: Path, tokens: int) -> Callable[[], float]:
    """Return what measures the tokens a second that our engine decodes."""
    engine = Engine(file, context=len(PROMPT) + tokens, cache="f16")

    def measure() -> float:
        engine.truncate(0, 0)
        token = int(engine.step({0: PROMPT})[0].argmax())
        start = time.perf_counter()
        for _ in range(tokens):
            token = int(engine.step({0: [token]})[0].argmax())
        return tokens / (time.perf_counter() - start)

    return measure


def peer(file: Path, threads: int, tokens: int) -> Callable[[], float]:
    """Return what measures the tokens a second that llama.cpp decodes."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel = len(PROMPT) + tokens + 1, 1
    params.fit_params, params.ui, params.verbosity = False, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    request = {"prompt": PROMPT, "n_predict": tokens, "ignore_eos": True, "cache_prompt": False, "temperature": -1.0}

    def measure() -> float:
        answer = server.handle_completions(request)
        timings: dict[str, Any] = (json.loads(answer) if isinstance(answer, str | bytes) else answer)["timings"]
        return float(timings["predicted_per_second"])

    return measure


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keep as many processors busy."""
    running = [subprocess.Popen([sys.executable, "-c", COUNT]) for _ in range(count)]
    try:
        time.sleep(0.3)  # until they have started and the scheduler has placed them
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.set_defaults(threads=2)
    arguments.add_argument("--layers", type=int, default=8, help="of the model, 12.4 million weights each")
    arguments.add_argument("--seconds", type=float, default=1.0, help="of each measurement of the products")
    arguments.add_argument("--tokens", type=int, default=200, help="of each measurement of an engine")
    arguments.add_argument("--neighbours", type=int, default=1, help="busy processes")
    given = arguments.parse_args()
    bitnet_kernels.set_threads(given.threads)
    model = convert_model(tiny_llama(layers=given.layers, **SHAPE), ConversionConfig(gain="one"))
    with tempfile.TemporaryDirectory() as folder:
        directory, file = Path(folder, "model"), Path(folder, "model.gguf")
        save_master(model, directory, tiny_tokenizer())
        export_gguf(directory, file, "tq2_0")
        contenders = {
            "ours": ours(file, given.tokens),
            "ours, products": products(model, given.seconds),
            "llama.cpp": peer(file, given.threads, given.tokens),
        }
        speeds: dict[str, list[float]] = {f"{name}, {how}": [] for name in contenders for how in ("alone", "contended")}
        for number in range(given.rounds + 1):
            for how, count in (("alone", 0), ("contended", given.neighbours)):
                with neighbours(count):
                    for name, measure in contenders.items():
                        speed = measure()
                        if number:
                            speeds[f"{name}, {how}"].append(speed)
    rows, bars = [], []
    for name in contenders:
        alone, contended = speeds[f"{name}, alone"], speeds[f"{name}, contended"]
        kept = median_ratio(contended, alone)
        row = {"what": name, "tokens/s alone": median(alone), "contended": median(contended), "kept": kept}
        rows.append(row | {"kept, least": min(b / a for a, b in zip(alone, contended, strict=True))})
        if name == "ours":
            bars.append(bar("kept by ours", kept, ">=", 0.45))
    title = f"{given.threads} threads beside {given.neighbours} busy, {bitnet_kernels.isa()}"
    finish(title, rows, bars, ("bitnet-kernels", "xllamacpp"), given.json)


if __name__ == "__main__":
    main()
