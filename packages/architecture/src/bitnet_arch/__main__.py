"""Command line of the library: `python -m bitnet_arch convert|info|card`."""

import argparse
import json
import pydoc_data.topics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from bitnet_arch.checkpoint import load_tokenizer, open_weights
from bitnet_arch.convert import ConversionConfig
from bitnet_arch.errors import UserError
from bitnet_arch.hub import write_model_card
from bitnet_arch.pretrained import resolve_pretrained
from bitnet_arch.quant import Granularity
from bitnet_arch.shards import MAX_SHARD_SIZE
from bitnet_arch.stream import check_source, convert_directory

CALIBRATION_ROWS, CALIBRATION_LENGTH = 4, 512

EXAMPLES = """examples:
  python -m bitnet_arch convert HuggingFaceTB/SmolLM2-135M-Instruct --out smollm2-ternary
  python -m bitnet_arch convert ./my-llama --out my-ternary --calibration sample.txt
  python -m bitnet_arch convert ./my-llama --out my-packed --packed
  python -m bitnet_arch convert ./my-llama --out my-rows --norm none --granularity row
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


def calibration_rows(tokenizer: object, text: str) -> list[Tensor]:
    """Cut a text into calibration rows, int64 `[1, 512]` each, at most four.

    Raises:
        UserError: if the text has fewer than 16 tokens.
    """
    ids = torch.tensor(tokenizer(text).input_ids[: CALIBRATION_ROWS * CALIBRATION_LENGTH], dtype=torch.int64)  # type: ignore[operator]
    if len(ids) < 16:
        raise UserError(f"the calibration text has only {len(ids)} tokens: give a longer one")
    return list(ids[None].split(CALIBRATION_LENGTH, dim=1))


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
    if arguments.out.is_dir() and any(arguments.out.iterdir()) and not arguments.force:
        raise UserError(f"{arguments.out} is not empty: choose another output, or replace the model in it with --force")
    if not 0 < arguments.max_shard_gib < float("inf"):
        raise UserError(f"--max-shard-gib must be a number of GiB above 0, not {arguments.max_shard_gib:g}")
    source = resolve_pretrained(arguments.source)
    print(f"source: {source.note}", file=sys.stderr)
    check_source(source.path, config)
    tokenizer = load_tokenizer(source.path)
    rows = None
    if config.calibrates:
        rows = calibration_rows(tokenizer, _calibration_text(arguments.calibration))
    convert_directory(
        source.path,
        arguments.out,
        config,
        rows,
        packed=arguments.packed,
        max_shard_size=round(arguments.max_shard_gib * 2**30),
        provenance=source.provenance,
    )
    result = {"out": str(arguments.out), "form": "packed" if arguments.packed else "master", "source": source.note}
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"wrote {result['form']} model to {arguments.out}")
        print("A converted model must be trained before it is useful.")


def _calibration_text(path: Path | None) -> str:
    if path is None:
        return "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the calibration text {path} cannot be read ({error})") from None


def _info(arguments: argparse.Namespace) -> None:
    with open_weights(arguments.directory) as reader:
        result = {
            "model_type": reader.config["model_type"],
            "form": reader.form,
            "scale_convention": reader.linear_class if reader.form == "packed" else None,
            "tensors": len(reader.keys()),
            "bytes": sum(f.stat().st_size for f in Path(arguments.directory).glob("*.safetensors")),
        }
    print(json.dumps(result) if arguments.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


def _card(arguments: argparse.Namespace) -> None:
    print(f"wrote {write_model_card(arguments.directory, license_id=arguments.license, parity=arguments.parity)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bitnet_arch", description="Convert and inspect model directories.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    convert = commands.add_parser(
        "convert",
        help="turn a Hugging Face model into a 1.58-bit model directory",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("source", help="a model directory or a hub id")
    convert.add_argument("--out", type=Path, required=True, help="the directory to write")
    convert.add_argument(
        "--norm", choices=["subln", "none", "allnorm", "bitlinear"], default="subln", help="where norms go (subln)"
    )
    convert.add_argument("--gain", choices=["calibrated", "one"], help="initial norm gain (calibrated)")
    convert.add_argument("--softness", type=float, help="0 inserts plain norms; larger is nearer to none (0.1)")
    convert.add_argument("--granularity", choices=get_args(Granularity), help="how many weights share a scale (tensor)")
    convert.add_argument("--rotation", action="store_true", default=None, help="rotate the inputs of o_proj and down_proj")
    convert.add_argument("--calibration", type=Path, help="a text file (default: Python's own documentation)")
    convert.add_argument("--packed", action="store_true", help="write 2-bit weights instead of float masters")
    convert.add_argument(
        "--max-shard-gib", type=float, default=MAX_SHARD_SIZE / 2**30, help="largest file, in GiB of tensors (%(default)g)"
    )
    convert.add_argument("--force", action="store_true", help="replace a model that --out holds")
    convert.add_argument("--json", action="store_true", help="print the result as JSON")
    convert.set_defaults(run=_convert)
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


if __name__ == "__main__":
    sys.exit(main())
