"""An error as a person is told it."""

from __future__ import annotations

import os

from dedup.errors import RewindError


def cause(error: BaseException) -> BaseException:
    """The one error inside nested exception groups that says most: the first meant for a person, else the first."""
    leaves: list[BaseException] = []
    pending = [error]
    while pending:
        one = pending.pop()
        if isinstance(one, BaseExceptionGroup):
            pending.extend(reversed(one.exceptions))
        else:
            leaves.append(one)
    return next((leaf for leaf in leaves if isinstance(leaf, RewindError)), leaves[0])


def is_expected(error: BaseException) -> bool:
    """Whether `error` is something that happens to a person; anything else is a bug."""
    return isinstance(error, (RewindError, OSError))


def explain(error: BaseException) -> str:
    """`error` as one line for a person."""
    if isinstance(error, RewindError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
        text = ": ".join([" → ".join(names), error.strerror] if names else [error.strerror])
    else:
        text = f"{type(error).__name__}: {error}"
    return " ".join(text.split())
