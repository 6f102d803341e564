"""Target Concrete Score distillation where the truth is known: estimators against exact conditionals, students against posteriors.

The teacher is a tiny autoregressive model of six kinds of tokens, trained for some steps on noisy counting (synthetic), and *is*
the truth: texts are drawn from it, and posteriors are summed over all 7,776 continuations of a first token. Errors are mean KL
divergences from the exact conditionals of drawn texts (E0), in nats. Students, ternary, see equally many texts; their figure is
KL(true posterior || student) of masked tokens.
"""

import statistics
from collections import defaultdict
from itertools import product
from typing import Any

import torch
from bitnet_arch import ConversionConfig, convert_model
from bitnet_arch.testing import SMALL_SHAPE
from report import finish, parser
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from wrinklefree.diffusion import METHODS, DiffusionSettings, TCSSettings, diffusion_step, tcs_step
from wrinklefree.diffusion.loss import log_probabilities
from wrinklefree.diffusion.step import masked_states, view_states
from wrinklefree.diffusion.tcs import ESTIMATORS, Target, Teacher
from wrinklefree.diffusion.views import make_views

KINDS, LENGTH, TOP = 6, 6, 3
SHAPE = SMALL_SHAPE | {"hidden_size": 32, "intermediate_size": 48}
HOW = DiffusionSettings(mask_token_id=KINDS, **METHODS["fast_dllm_v2"] | {"block_size": LENGTH})
ARMS = {"tokens": None, "E0 exact": "exact", "E1 topk": "topk", "E2 gradient": "gradient", "E3 causal": "causal"}


def as_batch(ids: Tensor, first: int) -> dict[str, Tensor]:
    """Return texts as the trainer gets them, the first of them number `first` of the data."""
    labels = ids.clone()
    labels[:, 0] = -100
    positions = torch.arange(LENGTH).expand(len(ids), -1)
    index = torch.arange(len(ids)) + first
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "document_ids": torch.ones_like(ids),
        "sample_index": index,
    }


def train_teacher(seed: int, steps: int) -> PreTrainedModel:
    """Return a frozen model that has read noisy counting for some steps: a quarter of the steps go anywhere."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": KINDS})).float()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        jumps = torch.where(torch.rand(32, LENGTH) < 0.75, torch.randint(1, 3, (32, 1)), torch.randint(0, KINDS, (32, LENGTH)))
        ids = jumps.cumsum(1) % KINDS
        loss = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


class Truth:
    """All texts of a teacher, and how likely each is given its first token."""

    def __init__(self, teacher: PreTrainedModel) -> None:
        """Score every text."""
        self.texts = torch.tensor(list(product(range(KINDS), repeat=LENGTH)))
        scores = []
        with torch.no_grad():
            for part in self.texts.split(4096):
                log_p = teacher(input_ids=part).logits.log_softmax(-1)
                scores.append(log_p[:, :-1].gather(2, part[:, 1:, None])[..., 0].sum(1))
        self.likelihood = torch.cat(scores).double().exp()

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return texts drawn from the teacher, first tokens evenly, int64 `[rows, LENGTH]`."""
        return self.texts[torch.multinomial(self.likelihood, rows, replacement=True, generator=generator)]

    def posteriors(self, noisy: Tensor, masked: Tensor) -> Tensor:
        """Return p(x_i | what is not masked) of every masked token, `[N, KINDS]`, in the order of `masked`."""
        found = []
        for row, mask in zip(noisy, masked, strict=True):
            weights = torch.where((self.texts[:, ~mask] == row[~mask]).all(1), self.likelihood, 0.0)
            for i in mask.nonzero()[:, 0].tolist():
                sums = torch.zeros(KINDS, dtype=torch.float64).index_add_(0, self.texts[:, i], weights)
                found.append(sums / weights.sum())
        return torch.stack(found)


def divergence(p: Tensor, q: Tensor) -> float:
    """Return the mean KL(p || q) of distributions `[N, K]`."""
    p, q = p.double(), q.double().clamp(min=1e-12)
    return float((p * (p.clamp(min=1e-300).log() - q.log())).sum(1).mean())


def target_errors(teacher: PreTrainedModel, truth: Truth, seed: int) -> dict[str, float]:
    """Return each estimator's error on 64 drawn texts."""
    ids = truth.draw(64, torch.Generator().manual_seed(seed))
    rows = as_batch(ids, 0)
    look = Teacher(teacher, rows, rows["labels"] != -100, torch.full_like(ids, LENGTH))
    exact = ESTIMATORS["exact"](look, KINDS, None).dense(KINDS)

    def error(target: Target) -> float:
        return divergence(exact, target.dense(KINDS))

    return {
        "E1 topk, K=6": error(ESTIMATORS["topk"](look, KINDS, None)),
        "E1 topk, K=3": error(ESTIMATORS["topk"](look, TOP, None)),
        "E1 topk, K=6, W=1": error(ESTIMATORS["topk"](look, KINDS, 1)),
        "E2 gradient": error(ESTIMATORS["gradient"](look, KINDS, None)),
        "E3 causal": error(ESTIMATORS["causal"](look, KINDS, None)),
    }


def train_student(teacher: PreTrainedModel, truth: Truth, seed: int, estimator: str | None, steps: int) -> float:
    """Return KL(true posterior || student) after training on drawn texts."""
    torch.manual_seed(seed)
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": KINDS + 1})).float()
    student = convert_model(llama, ConversionConfig(gain="one")).train()
    optimizer = torch.optim.AdamW(student.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = as_batch(truth.draw(16, generator), 16 * step)
        if estimator is None:
            loss = diffusion_step(student, rows, HOW)["dlm"]
        else:
            top = {} if estimator == "exact" else {"top_k": TOP}
            loss = tcs_step(student, teacher, rows, TCSSettings(diffusion=HOW, estimator=estimator, **top), plain=False)["tcs"]
        optimizer.zero_grad()
        (loss / (16 * (LENGTH - 1))).backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        optimizer.step()
    student.eval()
    rows = as_batch(truth.draw(64, torch.Generator().manual_seed(10**6)), 10**6)
    views = make_views(rows, HOW)
    with torch.no_grad():
        states = masked_states(view_states(student, rows, views, HOW), views, HOW)
        q = log_probabilities(student, states, KINDS).exp()[:, :KINDS]
    return divergence(truth.posteriors(views.input_ids, views.masked), q)


def main() -> None:
    """Print the estimators' errors and the students', means and deviations over seeds."""
    arguments = parser("Target Concrete Score distillation against the truth.")
    arguments.add_argument("--seeds", type=int, default=5, help="teachers, and students of each")
    arguments.add_argument("--teacher-steps", type=int, nargs="+", default=[0, 250], help="how long teachers have been trained")
    arguments.add_argument("--steps", type=int, default=200, help="of a student, 16 texts each; 0 trains none")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    values: dict[tuple[int, str], list[float]] = defaultdict(list)
    for seed in track(range(given.seeds), "seeds"):
        for teacher_steps in given.teacher_steps:
            teacher = train_teacher(seed, teacher_steps)
            truth = Truth(teacher)
            for name, value in target_errors(teacher, truth, seed).items():
                values[teacher_steps, f"target {name}"].append(value)
            if given.steps and teacher_steps == max(given.teacher_steps):
                for name, estimator in ARMS.items():
                    value = train_student(teacher, truth, seed, estimator, given.steps)
                    values[teacher_steps, f"student {name}"].append(value)
                    print(seed, name, value, flush=True)
    rows: list[dict[str, Any]] = [
        {"teacher steps": steps, "what": what, "mean": statistics.mean(found), "deviation": statistics.pstdev(found)}
        for (steps, what), found in values.items()
    ]
    finish("KL, nats", rows, [], ["torch", "transformers"], given.json)


if __name__ == "__main__":
    main()
