"""What the values on a command line may be: names, whole numbers.

Each function takes the text and raises argparse.ArgumentTypeError for anything else.
"""

from __future__ import annotations

from argparse import ArgumentTypeError


def names(text: str) -> tuple[str, ...]:
    """Names, separated by commas or spaces."""
    if not (found := tuple(text.replace(",", " ").split())):
        raise ArgumentTypeError("empty: expected names, e.g. sha,qnrf")
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers, separated by commas or spaces."""
    try:
        return tuple(map(int, names(text)))
    except (ValueError, ArgumentTypeError):
        raise ArgumentTypeError(f"{text!r}: expected whole numbers, e.g. 5,40") from None


def number(text: str) -> int:
    """A whole number that a computer of this size can have of anything: 0 to 999,999,999."""
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise ArgumentTypeError(f"{text!r}: expected a whole number from 0 on")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not (found := number(text)):
        raise ArgumentTypeError("0: expected a whole number from 1 on")
    return found


def threads(text: str) -> int:
    """A number of threads, 1 to 1024."""
    if (found := positive(text)) > 1024:
        raise ArgumentTypeError(f"{text}: expected at most 1024")
    return found
