"""A page of a report, made by a process of its own beside the second appliance: `python -m replication.report_process`.

A process that writes a store cannot open it again to read; and what walks a long history must not take the writer's
time. The child reads as any reader does, pins included. It gets its question on standard input and answers on standard
output, both one JSON document; it lives for one page.

Invariant: at most CHILDREN_MAX of them run at a time; a question that is cancelled ends its child.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec
import trio

from dedup.errors import RewindError, StoreError
from replication.explanation import explain
from replication.reports import Subject, make_page
from replication.supervisor import child_environment, python_module

CHILDREN_MAX: Final = 2
NICE: Final = 5
"""Who asks waits for one page; who writes has many."""
PAGE_SECONDS: Final = 300.0


class Question(msgspec.Struct, frozen=True):
    """`start` is the row that the page begins with."""

    store: str
    subject: Subject
    start: int


class Answer(msgspec.Struct, frozen=True):
    """`error` is one line for a person, and then there is no page."""

    page: dict[str, object]
    error: str = ""


class ReportProcesses:
    """Makes pages of one store."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._limit = trio.CapacityLimiter(CHILDREN_MAX)

    async def page(self, subject: Subject, start: int) -> dict[str, object]:
        """The page from row `start` on. StoreError with the child's line; cancelled, its child is killed."""
        question = msgspec.json.encode(Question(str(self._store), subject, start))
        async with self._limit:
            with trio.move_on_after(PAGE_SECONDS):
                ended = await trio.run_process(
                    python_module("replication.report_process"),
                    env=child_environment(),
                    stdin=question,
                    capture_stdout=True,
                    check=False,
                    start_new_session=True,
                )
                return _page_of(ended)
        raise StoreError(f"the report {subject.kind} was not made within {PAGE_SECONDS:g} s")


def _page_of(ended: subprocess.CompletedProcess[bytes]) -> dict[str, object]:
    try:
        answer = msgspec.json.decode(ended.stdout, type=Answer)
    except msgspec.DecodeError as error:
        raise StoreError(f"the process that makes a report ended with status {ended.returncode}") from error
    if answer.error:
        raise StoreError(answer.error)
    return answer.page


def main() -> None:
    """The child."""
    os.nice(NICE)
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    try:
        answer = Answer(make_page(Path(question.store), question.subject, question.start))
    except (RewindError, OSError) as error:
        answer = Answer({}, explain(error))
    sys.stdout.buffer.write(msgspec.json.encode(answer))


if __name__ == "__main__":
    main()
