"""A shortened BitDistill ladder on a real model: SmolLM2-135M and film reviews (the task of `sst2_local`), one seed.

uv run python benchmarks/smollm2_ladder.py --json smollm2_ladder.json --steps 64
uv run python benchmarks/smollm2_ladder.py --steps 4 --cpt 2 --test 40      # what a step costs

Every arm is fine-tuned on the same reviews, whose verdict is the only token with a loss; "+ CPT" first reads the text of other
reviews, and "+ LD" adds the logits of the fine-tuned float model over all tokens to that. Weights are the hub's, or the packaged
4-bit copy, dequantised. Steps are few: the table says how many tokens each arm has seen, and what they cost. `bitdistill_ladder.py`
has the arms in full and five seeds, on a small model.
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from bitdistill_ladder import LD
from bitnet_arch import ConversionConfig, Pretrained, convert_model, load_float_model, load_tokenizer, resolve_pretrained
from report import finish, parser, write
from speakers import CE, as_batch, train
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from wrinklefree.module import model_logits
from wrinklefree.views import Batch
from wrinklefree_eval.reviews import CHOICES, Review, load_reviews, prompt

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FLOAT, TERNARY = "float SFT (teacher)", "ternary SFT"
RATES = {FLOAT: 2e-5, "ternary": 2e-4}
"""As `model=smollm2_135m` has it for ternary weights; not tuned."""
PACKAGES = ("torch", "transformers", "wrinklefree", "scattertext")


class Task:
    """Reviews as tokens, of at most `length`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rows: int, length: int) -> None:
        self.tokenizer, self.rows, self.length = tokenizer, rows, length
        self.choices = [tokenizer(f" {choice}").input_ids[0] for choice in CHOICES]
        assert len(set(self.choices)) == len(CHOICES)

    def labelled(self, reviews: Sequence[Review]) -> Batch:
        """Return prompts that end in the verdict, the only token with a loss; padding is on the right, a document of its own."""
        return self._batch([[*self.tokenizer(prompt(r)).input_ids, self.choices[r["label"]]] for r in reviews], last=True)

    def plain(self, reviews: Sequence[Review]) -> Batch:
        """Return the reviews' text, with loss on every token but the first."""
        return self._batch([self.tokenizer(r["text"]).input_ids[: self.length] for r in reviews], last=False)

    def short(self, reviews: Sequence[Review]) -> list[Review]:
        """Return the reviews that fit."""
        return [r for r in reviews if len(self.tokenizer(prompt(r)).input_ids) < self.length]

    def batches(self, reviews: Sequence[Review], make: Callable[[Sequence[Review]], Batch], steps: int) -> Iterator[Batch]:
        """Yield batches of the reviews in order, from the beginning again at the end."""
        endless = itertools.cycle(reviews)
        return (make(list(itertools.islice(endless, self.rows))) for _ in range(steps))

    def _batch(self, texts: list[list[int]], last: bool) -> Batch:
        longest = max(map(len, texts))
        ids, labels = torch.zeros(len(texts), longest, dtype=torch.int64), torch.full((len(texts), longest), -100)
        batch = as_batch(ids, labels)
        batch["document_ids"] = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            first = len(text) - 1 if last else 1
            labels[row, first : len(text)] = ids[row, first : len(text)]
            batch["document_ids"][row, : len(text)] = 1
        return batch


@torch.no_grad()
def accuracy(model: PreTrainedModel, task: Task, reviews: Sequence[Review]) -> float:
    """Return the share of reviews whose verdict the model finds likelier than the other."""
    right = 0
    for batch in task.batches(reviews, task.labelled, len(reviews) // task.rows):
        rows, at = (batch["labels"] != -100).nonzero(as_tuple=True)
        chosen = model_logits(model, batch)[rows, at - 1][:, task.choices].argmax(-1)
        right += int((torch.tensor(task.choices)[chosen] == batch["labels"][rows, at]).sum())
    return right / (len(reviews) // task.rows * task.rows)


def ladder(source: Pretrained, task: Task, steps: int, cpt: int, test: int) -> Iterator[dict[str, Any]]:
    """Yield arms' rows as they come."""
    reviews, judged = task.short(load_reviews("train")), task.short(load_reviews("test"))[:test]
    labelled, unlabelled = reviews[: steps * task.rows], reviews[steps * task.rows : (steps + cpt) * task.rows]
    base = load_float_model(source)

    def trained(name: str, model: PreTrainedModel, data: Iterator[Batch], length: int, **options: Any) -> PreTrainedModel:
        rate = RATES.get(name, RATES["ternary"])
        return train(model, options.pop("values", CE), data, length, rate, **options)

    def row(name: str, model: PreTrainedModel, taken: int, began: float) -> dict[str, Any]:
        seconds = time.process_time() - began
        return {
            "arm": name,
            "accuracy": accuracy(model, task, judged),
            "steps": taken,
            "rows": taken * task.rows,
            "processor s a step": seconds / max(1, taken),
        }

    def tuning() -> Iterator[Batch]:
        return task.batches(labelled, task.labelled, steps)

    yield row("float, untrained", base, 0, time.process_time())
    began = time.process_time()
    teacher = trained(FLOAT, copy.deepcopy(base), tuning(), steps)
    yield row(FLOAT, teacher, steps, began)
    start = convert_model(base, ConversionConfig(), [task.plain(reviews[-2 * task.rows :])["input_ids"]])
    began = time.process_time()
    yield row(TERNARY, trained(TERNARY, copy.deepcopy(start), tuning(), steps), steps, began)
    began = time.process_time()
    read = trained("reading", start, task.batches(unlabelled, task.plain, cpt), cpt)
    reading = time.process_time() - began
    began = time.process_time() - reading
    yield row("+ CPT", trained("+ CPT", copy.deepcopy(read), tuning(), steps), steps + cpt, began)
    began = time.process_time() - reading
    yield row("+ LD", trained("+ LD", read, tuning(), steps, values=CE | LD, teacher=teacher), steps + cpt, began)


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=64, help="of fine-tuning")
    arguments.add_argument("--cpt", type=int, default=32, help="of continued pre-training before it")
    arguments.add_argument("--rows", type=int, default=8, help="reviews a step")
    arguments.add_argument("--length", type=int, default=64, help="longer reviews are left out")
    arguments.add_argument("--test", type=int, default=200, help="reviews to judge by")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    source = resolve_pretrained(MODEL)
    print(source.note, flush=True)
    task, rows = Task(load_tokenizer(source.path), given.rows, given.length), []
    for row in ladder(source, task, given.steps, given.cpt, given.test):
        rows.append(row)
        print(row, flush=True)
        if given.json:
            write(rows, [], PACKAGES, given.json)
    finish("SmolLM2-135M on film reviews, one seed", rows, [], PACKAGES, given.json)


if __name__ == "__main__":
    main()
