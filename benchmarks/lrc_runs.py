"""Low-rank correction of a small trained model through `training=lrc_calibration`: error and perplexity against total bits.

uv run python benchmarks/lrc_runs.py --json lrc_runs.json
uv run python benchmarks/lrc_runs.py --ranks 8 --dtypes int8 --seeds 1     # a part of it

The model is a stand-in: a Llama of two layers and width 128, trained as a float model, by the run itself, on texts of a Markov
chain of second order over 16 words (each pair of words has three successors), which it can learn and wrong weights spoil. It is
made ternary without further training of its weights. Ways to its adapters, all as a run has them: solved in closed form, solved and
rounded in turn, trained by gradient from a correction of zero, and solved, then trained. Beside them are plain rounding to a few
bits and the ternary model alone. Perplexity is of the run's held-out rows; the error is the median over layers of the squared error
of a layer's output over its square, on the float model's inputs. Bits are those of `benchmarks/lrc.py`.
"""

import math
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitnet_arch import load_float_model
from bitnet_arch.calibration import max_positions
from bitnet_arch.families import quantized_names
from bitnet_arch.pretrained import Pretrained
from bitnet_arch.ptq.model import quantize_model
from data_handler import PackedStream
from lrc import BASELINES, correction_bits
from ptq import Subject, round_to_nearest
from report import finish, parser
from transformers import PreTrainedModel
from wrinklefree.arm import train_arm
from wrinklefree.cli import load_run_config
from wrinklefree.config import RunConfig
from wrinklefree.evaluation import heldout_loss
from wrinklefree.models import Start, build_start, calibration_rows
from wrinklefree.teachers.load import load_teacher

WORDS, TEXTS, LENGTH = 16, 600, 200
SUCCESSORS = (0.7, 0.2, 0.1)
"""Probabilities of a pair's successors: 0.80 nats a word."""
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 512}
SOLVED = "start: solved, calibration_rows: 8"
WAYS = {
    "closed form": (SOLVED, False),
    "alternating, 3 times": (f"{SOLVED}, alternations: 3", False),
    "gradient": ("start: random, calibration_rows: null", True),
    "closed form, then gradient": (SOLVED, True),
}
"""Name to the options of `model.lrc`, and whether adapters are trained."""


@dataclass(frozen=True)
class Setting:
    """What all runs of a seed share."""

    folder: Path
    seed: int
    steps: int
    float_steps: int
    rate: float

    def config(self, lrc: str) -> RunConfig:
        """Return a run's configuration; `lrc` is the inside of `model.lrc`."""
        return load_run_config(
            [
                "model=tiny",
                *(f"model.shape.{name}={value}" for name, value in SHAPE.items()),
                "training=lrc_calibration",
                "data=text",
                f"data.sources.0.path={self.folder / 'texts'}",
                f"data.cache_dir={self.folder / 'cache'}",
                "data.sequence_length=128",
                "data.heldout_share=0.05",
                "data.heldout_tokens=4096",
                "training.rows_per_step=8",
                f"model.lrc={{{lrc}}}",
                f"training.max_steps={self.steps}",
                f"training.learning_rate={self.rate}",
                f"training.seed={self.seed}",
                "training.eval_every=0",
                "training.wandb=off",
                f"teacher.made_steps={self.float_steps}",
                f"output_dir={self.folder / 'run'}",  # one for all: the float model is made once
            ]
        )


def write_texts(folder: Path, seed: int) -> None:
    """Write texts of a chain of second order, a file each."""
    draw = random.Random(seed)
    words = [a + b for a in ("ba", "de", "fi", "go") for b in ("r", "s", "t", "x")]
    follow = {(a, b): draw.sample(range(WORDS), len(SUCCESSORS)) for a in range(WORDS) for b in range(WORDS)}
    folder.mkdir()
    for number in range(TEXTS):
        chain = [draw.randrange(WORDS), draw.randrange(WORDS)]
        while len(chain) < LENGTH:
            chain += draw.choices(follow[chain[-2], chain[-1]], SUCCESSORS)
        (folder / f"{number:04d}.txt").write_text(" ".join(words[i] for i in chain))


class TinySubject(Subject):
    """The float model that was made on the spot, judged on a run's held-out rows."""

    def __init__(self, start: Start, config: RunConfig) -> None:
        assert start.original is not None
        self.note = start.note
        self.original = load_float_model(Pretrained(start.original, "directory", start.note))
        self.names = quantized_names(self.original)
        self.stream = PackedStream(config.data, start.tokenizer, seed=config.training.seed, split="heldout")
        self.heldout = torch.stack([row["input_ids"] for row in self.stream.rows()])[:8]
        rows = calibration_rows(config.data, start.tokenizer, max_positions(self.original.config), 8)
        self.rows = list(rows)

    def nll(self, model: PreTrainedModel) -> float:
        """Return the held-out loss in nats a token."""
        return heldout_loss(model, self.stream)


def corrected(config: RunConfig, folder: Path, trained: bool) -> PreTrainedModel:
    """Return the model of a run, with its adapters solved and, if they are to be, trained."""
    start = build_start(config)
    if not trained:
        return start.model.eval()
    size = start.model.config.vocab_size
    teacher = load_teacher(config.teacher, start.original, start.note, start.tokenizer, size, config.tops())
    train, held = (
        PackedStream(config.data, start.tokenizer, seed=config.training.seed, split=split) for split in ("train", "heldout")
    )
    arm = {"config": config, "quantized": True, "resume": None, "logger": None, "tokenizer": None, "teacher": teacher}
    return train_arm("ternary", start.model, train, held, folder, **arm).model.eval()  # type: ignore[arg-type]


def rows_of(setting: Setting, ranks: list[int], dtypes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the lines of one seed's table."""
    config = setting.config("rank: 0.1")
    subject = TinySubject(build_start(config), config)
    yield subject.row("float", subject.original, 32.0, 32.0, 0.0)
    for bits, group in BASELINES:
        model, total = round_to_nearest(subject, bits, group)
        yield subject.row(f"{bits}-bit rounding, group {group}", model, total, total, 0.0)
    code, stored = subject.ternary_bits("tensor")
    for method in ("absmean", "gptq"):
        model = quantize_model(subject.fresh(), method, None if method == "absmean" else subject.rows)
        yield subject.row(f"ternary alone, {method}", model, code, stored, 0.0)
    for dtype in dtypes:
        for rank in ranks:
            more = correction_bits(subject, rank, dtype)
            for way, (options, trained) in WAYS.items():
                begin = time.process_time()
                folder = setting.folder / f"{dtype}-{rank}-{way}"
                model = corrected(setting.config(f"rank: {rank}, dtype: {dtype}, {options}"), folder, trained)
                name = f"rank {rank}, {dtype}: {way}"
                yield subject.row(name, model, code + more, stored + more, time.process_time() - begin)


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--ranks", nargs="*", type=int, default=[4, 8, 16], help="ranks of the corrections")
    arguments.add_argument("--dtypes", nargs="*", default=["int8"], help="what adapters are stored in")
    arguments.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    arguments.add_argument("--steps", type=int, default=60, help="of training adapters")
    arguments.add_argument("--float-steps", type=int, default=500, help="of training the float model")
    arguments.add_argument("--rate", type=float, default=2e-3, help="learning rate of the adapters")
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = []
    for seed in range(chosen.seeds):
        with tempfile.TemporaryDirectory() as folder:
            write_texts(Path(folder, "texts"), seed)
            setting = Setting(Path(folder), seed, chosen.steps, chosen.float_steps, chosen.rate)
            for row in rows_of(setting, chosen.ranks, chosen.dtypes):
                rows.append({"seed": seed, **row})
                found = f"{row['bits/weight']:.2f} bits, error {row['layer error']:.4f}, NLL {row['NLL']:.4f}"
                print(f"{seed} {row['what']}: {found}", flush=True)
    for row in rows:
        assert math.isfinite(row["NLL"])
    title = f"low-rank corrections of a small model, {chosen.float_steps} float steps, {chosen.steps} of the adapters"
    finish(title, rows, [], ("torch", "transformers", "wrinklefree"), chosen.json)


if __name__ == "__main__":
    main()
