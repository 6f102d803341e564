"""Write the corpus that `fuzz.sh` starts from: tiny files of every architecture, type and form that the decoder runs.

`uv run python packages/kernels/cpp/fuzz/corpus.py FOLDER`. Weights are random. Each file is followed by `TRAILER` bytes that say
what `gguf_fuzz.cpp` does with it.
"""

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bitnet_arch import ConversionConfig, convert_model, save_packed
from bitnet_arch.diffusion import add_mask_token
from bitnet_arch.gguf import export_gguf, read_gguf
from bitnet_arch.gguf.fuzz import assemble
from bitnet_arch.lrc.model import start_lrc
from bitnet_arch.testing import SMALL_SHAPE, tiny_decoder, tiny_tokenizer
from transformers import PreTrainedModel

TRAILER = 24
WORDS = 19  # rows of embedding and head that a file keeps: an odd number, and small
ROWS = ("token_embd.weight", "output.weight")

CASES: list[tuple[str, str, dict[str, Any], str, str, int]] = [  # name, variant, form, type, embedding, width
    ("bitnet", "bitnet", {"norm": "none"}, "q2_0", "f16", 64),
    ("bitnet-tq1", "bitnet", {"norm": "none"}, "tq1_0", "q6_k", 256),
    ("llama", "llama-biases", {"norm": "none"}, "f16", "q8_0", 64),
    ("llama-i2s", "llama-biases", {"norm": "none"}, "i2_s", "q4_1", 128),
    ("qwen2", "qwen2", {"norm": "none"}, "bf16", "bf16", 64),
    ("qwen3", "qwen3", {"norm": "none"}, "q2_0", "q8_0", 64),
    ("gemma3", "gemma3", {"norm": "none"}, "q2_0", "q4_1", 64),
    ("ours-rows", "qwen3", {"norm": "subln", "granularity": "row", "rotation": True}, "q2_0", "f16", 64),
    ("ours-groups", "llama-biases", {"norm": "allnorm", "granularity": "group128"}, "tq2_0", "q6_k", 256),
    ("ours-i2s", "gemma3-capped", {"norm": "bitlinear", "granularity": "group128"}, "i2_s", "q8_0", 128),
    ("ours-lrc", "llama-biases", {"norm": "subln"}, "q2_0", "q8_0", 64),
    ("ours-share", "llama-biases", {"norm": "subln"}, "q2_0", "q8_0", 64),
    ("ours-diffusion", "qwen2", {"norm": "subln"}, "q2_0", "q8_0", 64),
]


def model_of(name: str, variant: str, form: dict[str, Any], width: int) -> PreTrainedModel:
    """Return a random ternary model of one layer, where the variant has no number of its own."""
    shape = SMALL_SHAPE | {
        "vocab_size": 300,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": width // 16,
        "num_key_value_heads": 1,
        "max_position_embeddings": 40,
    }
    gain = {} if form["norm"] == "none" else {"gain": "one"}
    model = convert_model(tiny_decoder(variant, shape), ConversionConfig(**form, **gain))
    if name in ("ours-lrc", "ours-share"):
        model = start_lrc(model, 2 if name == "ours-lrc" else 0.1)
        with torch.no_grad():
            for parameter, values in model.named_parameters():
                if parameter.endswith("lrc_u"):
                    values.normal_()
    return model


def shrunk(path: Path, architecture: str | None = None) -> bytes:
    """Return a file without its tokenizer and with `WORDS` tokens, under another architecture's name where one is given."""
    old = read_gguf(path)
    before = old.metadata["general.architecture"]
    small = {f"{before}.vocab_size": WORDS, f"{before}.diffusion.mask_token_id": WORDS - 1}
    after = architecture or before
    keys = {"general.architecture": after} | {
        key.replace(before, after, 1): small.get(key, value) for key, value in old.metadata.items() if key.startswith(f"{before}.")
    }
    tensors = []
    for name, info in old.tensors.items():
        data = bytes(old.data[info.offset : info.offset + info.nbytes])
        if name in ROWS:
            tensors.append((name, (WORDS, info.shape[1]), info.ggml_id, data[: len(data) // info.shape[0] * WORDS]))
        else:
            tensors.append((name, info.shape, info.ggml_id, data))
    return assemble(keys, tensors)


def main(folder: Path) -> None:
    """Write the corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    pick = random.Random(0)
    for name, variant, form, matrix, embedding, width in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            model, tokenizer = model_of(name, variant, form, width), tiny_tokenizer(300)
            if name == "ours-diffusion":
                model.resize_token_embeddings(299)
                tokenizer = tiny_tokenizer(299)
                add_mask_token(model, tokenizer, block_size=4, token_shift=True)
            save_packed(model, Path(scratch) / "m", tokenizer)
            export_gguf(Path(scratch) / "m", Path(scratch) / "f.gguf", matrix, embedding=embedding)
            for architecture in (None, "bitnet-25", "bitnet-b1.58") if name == "bitnet" else (None,):
                data = shrunk(Path(scratch) / "f.gguf", architecture)
                (folder / f"{name}-{architecture or 'own'}").write_bytes(data + pick.randbytes(TRAILER))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
