"""A model card for a directory, with the metadata that the Hugging Face hub reads.

Pushing is stock: `model.push_to_hub` of any model of ours, or `huggingface_hub.upload_folder` of a directory with its card.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers.configuration_utils import PreTrainedConfig

from bitnet_arch.checkpoint import check_layers, read_provenance, skeleton
from bitnet_arch.configs import read_json_object
from bitnet_arch.diffusion import diffusion_of
from bitnet_arch.directories import CARD_FILE, CARD_MARK
from bitnet_arch.errors import UserError
from bitnet_arch.families import PREFIX, quantized_names
from bitnet_arch.modeling import form_of
from bitnet_arch.parity.proof import source_digest
from bitnet_arch.weights import WeightReader, open_weights

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?=\s|$)")
STATUSES = ("proven", "unproven")
MASK = "mask token"
"""A fact that cards of diffusion models have, and no others."""
PLACEMENTS = {
    "none": "none added",
    "subln": "before the layers that mix (SubLN)",
    "bitlinear": "in every ternary layer, in place of the block's own",
    "allnorm": "in every ternary layer, beside the block's own",
}


def write_model_card(directory: Path | str, *, license_id: str | None = None, parity: Path | str | None = None) -> Path:
    """Write a model directory's `README.md`: YAML metadata and what its files say of the model, nothing else.

    The base model is the hub id that the directory's provenance begins with, if it does.

    Args:
        directory: master or packed model directory; a card that this function wrote there before is replaced.
        license_id: the weights' licence, such as "apache-2.0"; left out where it is not known.
        parity: the `.parity.json` beside a GGUF file that was made of this directory.

    Returns:
        The card's path.

    Raises:
        UserError: if the directory is no ternary model, somebody else wrote the card that is there, or the sidecar is damaged.
    """
    directory = Path(directory)
    path = directory / CARD_FILE
    if path.exists() and CARD_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{path} was written by somebody else: move it away first")
    facts = _facts(directory) | ({} if parity is None else _parity(directory, Path(parity)))
    provenance = read_provenance(directory)
    metadata = _metadata(directory, provenance, license_id, facts)
    text = "\n".join(
        [
            "---",
            ModelCardData(**metadata).to_yaml().rstrip(),
            "---",
            CARD_MARK,
            "",
            f"# {directory.resolve().name}",
            "",
            "A language model whose linear layers have ternary weights (-1, 0, +1 times a scale) and 8-bit activations.",
            "",
            *([f"Weights: {provenance}.", ""] if provenance else []),
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in facts.items()),
            "",
            "```python",
            *_usage(facts),
            "```",
            "",
        ]
    )
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"writing {path} failed ({error.strerror}): free some space or choose another directory") from None
    return path


def _metadata(directory: Path, provenance: str | None, license_id: str | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bitnet", "ternary", "1.58-bit", "wrinklefree"],
        "bits_per_weight": facts["bits per weight, as stored"],
    }
    if provenance and (base := HUB_ID.match(provenance)):
        found["base_model"] = base[0]
    if license_id:
        found["license"] = license_id
    if "parity" in facts:
        found["parity"] = facts["parity"].split()[0]
    return found


def _facts(directory: Path) -> dict[str, Any]:
    """Return what a directory's files say of its model, by name."""
    with open_weights(directory) as reader:
        if reader.form == "float":
            raise UserError(f"{directory} is a float model: convert it before it gets a card")
        model = skeleton(reader)
        check_layers(model, reader)
        layers = {f"{name}.weight" for name in quantized_names(model)}
        stored = [name for name, _ in model.named_parameters()]
        weights = {name: _count(reader.shape(name)) for name in {*stored, *layers}}
        form = form_of(model.config)
        ternary, total = sum(weights[name] for name in layers), sum(weights.values())
        return {
            "architecture": type(model).__name__,
            "family": model.config.model_type.removeprefix(PREFIX),
            "form": "2-bit codes" if reader.form == "packed" else "float master weights, made ternary in the forward pass",
            "norms": PLACEMENTS[form.norm] if form else "of the stock architecture",
            "a scale for": form.granularity if form else "tensor",
            **({"low-rank correction": f"rank {form.lrc_rank:g}, {form.lrc_dtype}"} if form and form.lrc_rank else {}),
            **_diffusion(model.config),
            "rotation": "block Hadamard before the layers that mix" if form and form.rotation else "none",
            "ternary weights": ternary,
            "other weights": total - ternary,
            "bits per weight, as stored": round(8 * _bytes(reader) / total, 3),
            "bits per ternary weight, as stored": round(8 * _bytes(reader, layers) / ternary, 3),
        }


def _usage(facts: Mapping[str, Any]) -> list[str]:
    """Return the lines of Python that load a model, and those that decode one that diffuses."""
    load = 'AutoModelForCausalLM.from_pretrained("path/or/id")'
    if MASK in facts:
        return [
            "from bitnet_arch.generation import DecodeOptions, decode  # transformers' generate would run it causally",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = {load}.eval()",
            'tokenizer = AutoTokenizer.from_pretrained("path/or/id")',
            'prompt = tokenizer("The ", return_tensors="pt").input_ids[0]',
            "print(tokenizer.decode(decode(model, prompt, DecodeOptions(max_tokens=64, threshold=0.9)).tokens))",
        ]
    ours = (
        ["import bitnet_arch  # its classes are not in stock transformers"] if facts["architecture"].startswith("Ternary") else []
    )
    return [*ours, "from transformers import AutoModelForCausalLM", "", f"model = {load}"]


def _diffusion(config: PreTrainedConfig) -> dict[str, str]:
    """Return how a model fills in masked tokens, if it does."""
    form = diffusion_of(config)
    if form is None:
        return {}
    blocks = "the whole text" if form.block_size is None else f"blocks of {form.block_size}, from left to right,"
    return {
        "decoding": f"by diffusion: masked tokens of {blocks} are filled in, several in one forward",
        MASK: f"number {form.mask_token_id}",
        "a token is read from": "the position before it" if form.token_shift else "its own position",
    }


def _count(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _bytes(reader: WeightReader, weights: set[str] | None = None) -> int:
    """Return the stored size of all tensors, or of some weights with their scales and low-rank corrections."""
    names = reader.keys()
    if weights is not None:
        parts = {part for name in weights for part in _parts(name)}
        names = [name for name in names if name in parts]
    return sum(reader.spec(name).nbytes for name in names)


def _parts(weight: str) -> tuple[str, ...]:
    layer = weight.removesuffix(".weight")
    return weight, f"{weight}_scale", f"{layer}.lrc_u", f"{layer}.lrc_v"


def _parity(directory: Path, path: Path) -> dict[str, str]:
    """Return what the sidecar of a GGUF file that was made of a directory says, in one line."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the .parity.json beside a GGUF file")
    report = read_json_object(path)
    details = report.get("details")
    status = report.get("status")
    if status not in STATUSES:
        raise UserError(f"{path} is no report of a GGUF export that holds (its status is {status!r:.40}): export again")
    if status == "unproven":
        return {"parity": f"unproven ({path.name.removesuffix('.parity.json')}: {report.get('reason')})"}
    with open_weights(directory) as reader:
        if not isinstance(details, dict) or details.get("source_sha256") != source_digest(reader):
            raise UserError(f"{path} is the report of another model's file: export {directory} and name that report")
    engine = f"{report.get('engine')} {report.get('engine_version')}"
    facts = [f"{path.name.removesuffix('.parity.json')}: {engine}, {report.get('positions')} positions"]
    if report.get("reason"):
        facts.append(str(report["reason"]))
    return {"parity": f"proven ({'; '.join(facts)})"}
