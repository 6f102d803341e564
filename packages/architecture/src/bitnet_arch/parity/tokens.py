"""Does an engine cut text into the tokens that the model was trained on?

No comparison of logits sees it: those are compared on token ids, and a wrong pre-tokenizer or begin token leaves them right.
"""

from collections.abc import Callable, Sequence

from bitnet_arch.parity.report import Check, at_most

Tokenize = Callable[[str], list[int]]
"""Maps a text to all of its token ids: tokens that are put before or behind a text included, special ones in it recognised."""

LINES = (
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t",
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces in front",
    "three behind   ",
    "two  in  the   middle",
    "\n begins with a line end",
    "ends with one \n",
    "a line\r\nand another\r\n",
    "It's what they'll say: we've DON'T, I'm, he'd, you're.",
    "“Quoted” — and ‘so’ on…",
    "12345 007 3.14159 1e-9 1,000,000 0x7fff",
    "2026-01-31T23:59:59Z +49 (30) 123456",
    "١٢٣ ½ ² Ⅷ ①",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n\tprint(i, add(i, i))\n",
    "if (a >= b && c != 0) { x[i]++; y->z = ~w; } // done",
    "SELECT * FROM \"t\" WHERE a_b LIKE '%x%';",
    '{"key": [1, 2.5, null], "other": {"nested": true}}',
    "<div class='a'>&nbsp;text</div>",
    "https://example.org/a/b?c=d&e=f#g user@example.org",
    "snake_case camelCase SCREAMING_CASE kebab-case",
    "# heading\n\n* item\n* item\n\n> quote `code` **bold**",
    "naïve café, Ærøskøbing, straße ẞ, e\u0301",
    "Привет, мир! Ἀθῆναι",
    "日本語のテキスト、中文。 한국어",
    "العربية עברית हिन्दी ไทย",
    "😀 👍🏽 👨‍👩‍👧 🇩🇪",
    "∑ x² ≈ ∞, α → β, 𝒳𝓎",
    "\u00a0no-break\u00a0space\u3000wide\u200bzero\u2028line",
    "=====-----.....!!!!!",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "one<|endoftext|>two </s> <s> [INST]",
)
"""Code, prose, digits, scripts, symbols and white space: what pre-tokenizers cut differently."""


def differing_lines(expected: Tokenize, found: Tokenize, lines: Sequence[str] = LINES) -> list[str]:
    """Return the lines of which `found` makes other tokens than `expected`."""
    return [line for line in lines if list(found(line)) != list(expected(line))]


def tokenizer_check(expected: Tokenize, found: Tokenize, lines: Sequence[str] = LINES) -> Check:
    """Return the check named "tokenizer": none of the lines may differ. Its note names the first that does, with both readings.

    Args:
        expected: the model directory's tokenizer.
        found: the engine's.
        lines: what to cut.
    """
    note = f"of {len(lines)} lines"
    if differ := differing_lines(expected, found, lines):
        first = differ[0]
        note = f"{len(differ)} {note}, the first {first!r}: tokens {found(first)[:12]} instead of {expected(first)[:12]}"
    return at_most("tokenizer", len(differ), 0, note)
