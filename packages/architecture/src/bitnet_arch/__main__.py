"""Command line of the library: `python -m bitnet_arch convert|quantize|lrc|card|info`."""

import argparse
import json
import pydoc_data.topics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from bitnet_arch.calibration import max_positions
from bitnet_arch.checkpoint import check_head, load_tokenizer
from bitnet_arch.configs import load_config
from bitnet_arch.convert import ConversionConfig
from bitnet_arch.diffusion import DIFFUSION_KEY
from bitnet_arch.errors import UserError
from bitnet_arch.families import FAMILIES, PREFIX
from bitnet_arch.hub import write_model_card
from bitnet_arch.lrc.adapters import AdapterDtype
from bitnet_arch.lrc.directory import lrc_directory
from bitnet_arch.lrc.model import LRCConfig
from bitnet_arch.pretrained import Pretrained, resolve_pretrained
from bitnet_arch.ptq.directory import quantize_directory
from bitnet_arch.ptq.model import check_method
from bitnet_arch.ptq.quantizers import Method
from bitnet_arch.quant import Granularity
from bitnet_arch.shards import MAX_SHARD_SIZE
from bitnet_arch.stream import check_source, convert_directory
from bitnet_arch.weights import open_weights

CALIBRATION_ROWS, CALIBRATION_LENGTH = 4, 512

EXAMPLES = """examples:
  python -m bitnet_arch convert HuggingFaceTB/SmolLM2-135M-Instruct --out smollm2-ternary
  python -m bitnet_arch convert ./my-llama --out my-ternary --calibration sample.txt
  python -m bitnet_arch convert ./my-llama --out my-packed --packed
  python -m bitnet_arch convert ./my-llama --out my-rows --norm none --granularity row
"""
QUANTIZE_EXAMPLES = """examples:
  python -m bitnet_arch quantize HuggingFaceTB/SmolLM2-135M-Instruct --out smollm2-gptq --method gptq
  python -m bitnet_arch quantize ./my-llama --out my-ptq --method least_squares --granularity group128 --packed
  python -m bitnet_arch quantize ./my-ternary --out my-gptq --method gptq_act_order --calibration sample.txt
"""
LRC_EXAMPLES = """examples:
  python -m bitnet_arch lrc HuggingFaceTB/SmolLM2-135M-Instruct --out smollm2-lrc --rank 64
  python -m bitnet_arch lrc ./my-llama --out my-lrc --rank 0.1 --dtype int8 --packed
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (0 done, 1 failed, 2 the user's mistake, 75 interrupted)."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written; run the command again", file=sys.stderr)
        return 75
    return 0


def calibration_rows(tokenizer: object, text: str, positions: int | None = None) -> list[Tensor]:
    """Cut a text into calibration rows, int64 `[1, 512]` each or as long as the model's positions, at most four.

    Raises:
        UserError: if the text has fewer than 16 tokens.
    """
    length = min(CALIBRATION_LENGTH, positions or CALIBRATION_LENGTH)
    ids = torch.tensor(tokenizer(text).input_ids[: CALIBRATION_ROWS * length], dtype=torch.int64)  # type: ignore[operator]
    if len(ids) < 16:
        raise UserError(f"the calibration text has only {len(ids)} tokens: give a longer one")
    return list(ids[None].split(length, dim=1))


def _conversion(arguments: argparse.Namespace) -> ConversionConfig:
    """Return what is asked for; an option that would have no effect is refused."""
    for why, vain in (("--norm none", ("gain", "softness", "calibration")), ("--gain one", ("softness", "calibration"))):
        option, value = why.removeprefix("--").split()
        given = [name for name in vain if getattr(arguments, name) is not None]
        if getattr(arguments, option) == value and given:
            raise UserError(f"--{given[0]} has no effect with {why}: leave one of them out")
    options = ("norm", "gain", "softness", "granularity", "rotation")
    chosen = {name: value for name in options if (value := getattr(arguments, name)) is not None}
    return ConversionConfig(**chosen)


def _convert(arguments: argparse.Namespace) -> None:
    config = _conversion(arguments)
    source = _source(arguments)
    check_source(source.path, config)
    rows = None
    if config.calibrates:
        rows = _calibration(arguments, source)
    convert_directory(
        source.path,
        arguments.out,
        config,
        rows,
        packed=arguments.packed,
        max_shard_size=round(arguments.max_shard_gib * 2**30),
        provenance=source.provenance,
    )
    _done(arguments, source, "A converted model must be trained before it is useful.")


def _source(arguments: argparse.Namespace) -> Pretrained:
    """Find the model that a command starts from, unless its output must not be written."""
    if arguments.out.is_dir() and any(arguments.out.iterdir()) and not arguments.force:
        raise UserError(f"{arguments.out} is not empty: choose another output, or replace the model in it with --force")
    if not 0 < arguments.max_shard_gib < float("inf"):
        raise UserError(f"--max-shard-gib must be a number of GiB above 0, not {arguments.max_shard_gib:g}")
    source = resolve_pretrained(arguments.source)
    print(f"source: {source.note}", file=sys.stderr)
    return source


def _done(arguments: argparse.Namespace, source: Pretrained, advice: str) -> None:
    result = {"out": str(arguments.out), "form": "packed" if arguments.packed else "master", "source": source.note}
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"wrote {result['form']} model to {arguments.out}")
        print(advice)


def _quantize(arguments: argparse.Namespace) -> None:
    # Least squares looks at weights alone unless it is given something to look at besides.
    calibrates = arguments.method.startswith("gptq") or arguments.calibration is not None
    check_method(arguments.method, [] if calibrates else None, 0.0)
    source = _source(arguments)
    rows = _calibration(arguments, source) if calibrates else None
    quantize_directory(source.path, arguments.out, arguments.method, rows, **_writing(arguments, source))
    _done(arguments, source, "No method without training leaves a good model: measure it before you use it.")


def _lrc(arguments: argparse.Namespace) -> None:
    config = LRCConfig(rank=arguments.rank, dtype=arguments.dtype, quantizer=arguments.quantizer, steps=arguments.steps)
    source = _source(arguments)
    rows = _calibration(arguments, source)
    lrc_directory(source.path, arguments.out, config, rows, **_writing(arguments, source))
    _done(arguments, source, "Only this library loads a model with a low-rank correction.")


def _writing(arguments: argparse.Namespace, source: Pretrained) -> dict[str, Any]:
    def progress(done: int, of: int) -> None:
        print(f"block {done} of {of}", file=sys.stderr)

    return {
        "granularity": arguments.granularity,
        "packed": arguments.packed,
        "max_shard_size": round(arguments.max_shard_gib * 2**30),
        "provenance": source.provenance,
        "progress": progress,
    }


def _rank(text: str) -> int | float:
    """Parse a rank: a whole number, or a share."""
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _calibration(arguments: argparse.Namespace, source: Pretrained) -> list[Tensor]:
    text = _calibration_text(arguments.calibration)
    return calibration_rows(load_tokenizer(source.path), text, max_positions(load_config(source.path)))


def _calibration_text(path: Path | None) -> str:
    if path is None:
        return "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the calibration text {path} cannot be read ({error})") from None


def _info(arguments: argparse.Namespace) -> None:
    with open_weights(arguments.directory) as reader:
        family = FAMILIES.get(reader.config["model_type"].removeprefix(PREFIX))  # of others, too, it can be said what they hold
        check_head(reader, family.head if family else "lm_head")
        result = {
            "model_type": reader.config["model_type"],
            "form": reader.form,
            "scale_convention": reader.linear_class if reader.form == "packed" else None,
            "diffusion": reader.config.get(DIFFUSION_KEY),
            "tensors": len(reader.keys()),
            "bytes": sum(f.stat().st_size for f in Path(arguments.directory).glob("*.safetensors")),
        }
    print(json.dumps(result) if arguments.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


def _card(arguments: argparse.Namespace) -> None:
    print(f"wrote {write_model_card(arguments.directory, license_id=arguments.license, parity=arguments.parity)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bitnet_arch", description="Convert and inspect model directories.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    convert = _writer(commands, "convert", _convert, EXAMPLES, "turn a Hugging Face model into a 1.58-bit model directory")
    convert.add_argument(
        "--norm", choices=["subln", "none", "allnorm", "bitlinear"], default="subln", help="where norms go (subln)"
    )
    convert.add_argument("--gain", choices=["calibrated", "one"], help="initial norm gain (calibrated)")
    convert.add_argument("--softness", type=float, help="0 inserts plain norms; larger is nearer to none (0.1)")
    convert.add_argument("--granularity", choices=get_args(Granularity), help="how many weights share a scale (tensor)")
    convert.add_argument("--rotation", action="store_true", default=None, help="rotate the inputs of o_proj and down_proj")
    quantize = _writer(commands, "quantize", _quantize, QUANTIZE_EXAMPLES, "make a model ternary without training")
    quantize.add_argument("--method", choices=get_args(Method), required=True, help="how codes and scales are chosen")
    lrc = _writer(commands, "lrc", _lrc, LRC_EXAMPLES, "make a model ternary and correct it with low-rank adapters")
    lrc.add_argument("--rank", type=_rank, required=True, help="a whole number, or a share of a layer's smaller side below 1")
    lrc.add_argument("--dtype", choices=get_args(AdapterDtype), default="float16", help="what adapters are kept in (%(default)s)")
    lrc.add_argument("--quantizer", choices=get_args(Method), default="gptq", help="what rounds the weights (%(default)s)")
    lrc.add_argument("--steps", type=int, default=1, help="how often weights and adapters are solved for in turn (%(default)s)")
    for parser_of_floats in (quantize, lrc):
        parser_of_floats.add_argument(
            "--granularity", choices=get_args(Granularity), help="how many weights share a scale, for a float source (tensor)"
        )
    card = commands.add_parser("card", help="write a model directory's README.md, with the metadata that the hub reads")
    card.add_argument("directory", type=Path)
    card.add_argument("--license", help="the weights' licence, such as apache-2.0 (left out where it is not known)")
    card.add_argument("--parity", type=Path, help="the .parity.json of a GGUF file that was made of the directory")
    card.set_defaults(run=_card)
    info = commands.add_parser("info", help="say what a model directory holds")
    info.add_argument("directory", type=Path)
    info.add_argument("--json", action="store_true", help="print as JSON")
    info.set_defaults(run=_info)
    return parser


def _writer(commands: Any, name: str, run: object, examples: str, help_text: str) -> argparse.ArgumentParser:
    """Add a command that writes a model directory, with the options that all of them have."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help_text, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a model directory or a hub id")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--calibration", type=Path, help="a text file (default: Python's own documentation)")
    parser.add_argument("--packed", action="store_true", help="write 2-bit weights instead of float masters")
    parser.add_argument(
        "--max-shard-gib", type=float, default=MAX_SHARD_SIZE / 2**30, help="largest file, in GiB of tensors (%(default)g)"
    )
    parser.add_argument("--force", action="store_true", help="replace a model that --out holds")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
