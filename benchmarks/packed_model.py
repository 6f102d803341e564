"""SmolLM2-135M through Hugging Face's `generate`: ternary on our kernels beside the same in torch, in float32 and in bfloat16.

uv run python benchmarks/packed_model.py --json packed_model.json

The ternary model is converted, not trained: it is as fast as a trained one, and writes nonsense. "BitLinear" quantises its
weights in every forward, "kept" once (`constant_weights`); "packed" holds them in 2 bits. "prefill" is `generate` of one
token from the prompt, "decode" what every further token takes. "layers MB" are the ternary layers' weights as they lie in
memory, the kernels' own layout included; embedding and head, which are one matrix, are float in all of them. "agree" is the
share of generated tokens that are those of the packed model in torch. Python between the layers costs a good part of a
token's time here, and the same for all.

Bars: on the kernels, generated tokens are those of torch, and decoding is not slower than in float32 or bfloat16.
"""

import copy
import pydoc_data.topics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import bitnet_kernels
import torch
from bitnet_arch import (
    ConversionConfig,
    convert_model,
    kernel_ops,
    load_float_model,
    load_tokenizer,
    pack_model,
    resolve_pretrained,
)
from bitnet_arch.bitlinear import constant_weights
from bitnet_arch.families import quantized_names
from report import bar, finish, interleaved, median_ratio, parser
from torch import Tensor
from transformers import PreTrainedModel

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Contender:
    """A model and how it is run."""

    def __init__(self, model: PreTrainedModel, kernels: bool = False, kept: bool = False) -> None:
        """Take a model, which packed layers run on the kernels or not, and whose weights are kept quantised or not."""
        self.model, self.kernels, self.kept = model.eval(), kernels, kept

    def generate(self, prompt: Tensor, tokens: int) -> Tensor:
        """Return that many new tokens, greedily."""
        kernel_ops.use_kernels("on" if self.kernels else "off")
        with constant_weights(self.model) if self.kept else nullcontext():
            mask = torch.ones_like(prompt)
            out: Tensor = self.model.generate(  # type: ignore[operator]
                prompt, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        return out[0, prompt.shape[1] :]

    def layer_bytes(self, names: list[str]) -> int:
        """Return what the ternary layers' weights take."""
        total = 0
        for name in names:
            weight = self.model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            total += weight.nbytes * (2 if self.kernels or self.kept else 1)  # a second layout of 2 bits, or what is kept
        return total


def contenders(original: PreTrainedModel) -> dict[str, Contender]:
    """Return the contenders by name."""
    ternary = convert_model(copy.deepcopy(original), ConversionConfig(gain="one"))
    packed = pack_model(copy.deepcopy(ternary))
    assert isinstance(packed, PreTrainedModel)
    return {
        "float32": Contender(original),
        "bfloat16": Contender(copy.deepcopy(original).to(torch.bfloat16)),
        "BitLinear": Contender(ternary),
        "BitLinear, kept": Contender(ternary, kept=True),
        "packed, torch": Contender(packed),
        "packed, kernels": Contender(packed, kernels=True),
    }


def runs(found: dict[str, Contender], prompt: Tensor, tokens: int) -> dict[str, Callable[[], object]]:
    """Return what is timed."""
    timed: dict[str, Callable[[], object]] = {}
    for name, one in found.items():
        timed[f"{name}: prefill"] = lambda one=one: one.generate(prompt, 1)
        timed[f"{name}: all"] = lambda one=one: one.generate(prompt, tokens + 1)
    return timed


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--model", default=SMOLLM2, help="a hub id or a model directory")
    arguments.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    arguments.add_argument("--tokens", type=int, default=32, help="tokens that are decoded")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    bitnet_kernels.set_threads(given.threads)
    source = resolve_pretrained(given.model)
    original = load_float_model(source)
    names = quantized_names(original)
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[key] for key in sorted(topics))[: 20 * given.prompt]
    prompt = torch.tensor(load_tokenizer(source.path)(text).input_ids[: given.prompt])[None]
    found = contenders(original)
    seconds = interleaved(runs(found, prompt, given.tokens), given.rounds)
    decode = {name: [a - p for a, p in zip(seconds[f"{name}: all"], seconds[f"{name}: prefill"], strict=True)] for name in found}
    written = {name: one.generate(prompt, given.tokens) for name, one in found.items()}
    rows: list[dict[str, Any]] = []
    for name, one in found.items():
        prefill, all_of_it = (sorted(times)[len(times) // 2] for times in (seconds[f"{name}: prefill"], decode[name]))
        rows.append(
            {
                "what": name,
                "prefill tokens/s": given.prompt / prefill,
                "decode tokens/s": given.tokens / all_of_it,
                "decode x float32": median_ratio(decode["float32"], decode[name]),
                "layers MB": one.layer_bytes(names) / 1e6,
                "agree": float((written[name] == written["packed, torch"]).float().mean()),
            }
        )
    ours = "packed, kernels"
    bars = [bar("tokens of the kernels that are torch's", rows[-1]["agree"], ">=", 1.0)]
    bars += [
        bar(f"decode: kernels / {name}", median_ratio(decode[name], decode[ours]), ">=", 1.0) for name in ("float32", "bfloat16")
    ]
    title = f"{source.note or given.model}, {given.threads} threads, {bitnet_kernels.isa()}"
    finish(title, rows, bars, ("torch", "transformers", "bitnet-arch", "bitnet-kernels"), given.json)


if __name__ == "__main__":
    main()
