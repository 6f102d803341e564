"""Which documents are held out: a pure function of their content."""

from hashlib import blake2b


def content_digest(text: str) -> int:
    """Return 64 bits of a hash of the text, the same on every machine."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def is_heldout(text: str, share: float) -> bool:
    """Say whether a document belongs to the held-out part.

    The answer depends on the content alone, so neither order nor seed nor the other documents change it, two copies
    of a text fall on the same side, and a larger share holds out a superset.

    Args:
        text: the whole document.
        share: the expected share of held-out documents, in [0, 1].
    """
    return content_digest(text) < share * 2.0**64
