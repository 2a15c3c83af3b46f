"""A link without a connection: what is asked is answered here, by way of the bytes that would travel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from dedup.types import Seq, TimeNs
from replication.errors import LinkDown, ProtocolError
from replication.held_moments import HeldMoments
from replication.history_answers import HistoryAnswers
from replication.history_link import SessionChanged
from replication.history_queries import (
    Answer,
    Blocks,
    Held,
    Hold,
    Question,
    Refused,
    Release,
    answer_bytes,
    answer_of,
    error_of,
    question_bytes,
    question_of,
)

A = TypeVar("A")


class DirectLink:
    """As `HistoryLink`. `mangle` may change an answer on its way; `session` begins another session."""

    address = "direct"

    def __init__(self, answers: HistoryAnswers) -> None:
        self.held = HeldMoments()
        self.mangle: Callable[[Question, Answer], Answer] = lambda _question, answer: answer
        self.asked: list[Question] = []
        self.blocks = 0
        """Blocks that were asked for."""
        self.breaks = 0
        self._turn = threading.Lock()
        self._answers = answers
        self.session(answers)

    @property
    def generation(self) -> int:
        return self.held.generation

    def session(self, answers: HistoryAnswers) -> None:
        """The link broke, and stands again: with these answers."""
        self._answers = answers
        held: set[Seq] = set()
        while self.held.renew(held) is None:
            for seq in self.held.missing(held):
                answer = answers.answer(Hold(seq))
                if isinstance(answer, Held):
                    held.add(seq)
                self.held.settle(seq, TimeNs(answer.time) if isinstance(answer, Held) else None)

    def ask(self, question: Question, kind: type[A], generation: int | None = None) -> A:
        with self._turn:
            if generation not in (None, self.generation):
                raise SessionChanged
            self.asked.append(question)
            if isinstance(question, Blocks):
                self.blocks += sum(count for _, count in question.spans)
            answer = self.mangle(question, self._answers.answer(question_of(question_bytes(question))))
            answer = answer_of(answer_bytes(answer, compress=len(self.asked) % 2 == 0))
        if isinstance(answer, Refused):
            raise error_of(answer)
        if not isinstance(answer, kind):
            raise ProtocolError(f"{type(answer).__name__} instead of {kind.__name__}")
        return answer

    def tell(self, question: Question) -> None:
        assert isinstance(question, Release)
        self._answers.answer(question)

    def unsettled(self) -> LinkDown:
        return LinkDown("unsettled")

    def broken(self, error: str) -> ProtocolError:
        self.breaks += 1
        return ProtocolError(error)
