"""What was asked of the second appliance and not answered yet: comparisons and commands.

Invariants:
- each question is answered once: by its answer, or by an error when the link that carried it broke;
- bounded: COMPARES_OPEN_MAX comparisons, REQUESTS_WAITING_MAX commands.
"""

from __future__ import annotations

from typing import Final

from dedup.types import Heartbeat, Seq
from replication.answers import Answers
from replication.errors import LinkDown, LinkReset, LocalProtocolError, RequestRefused
from replication.link import Link
from replication.messages import Compare, CompareResult, Reply, Request
from replication.outbox import frame_of
from replication.session import COMPARES_OPEN_MAX

REQUESTS_WAITING_MAX: Final = 256
"""Most requests without an answer, sent or not."""


class Questions:
    """The open questions of one first appliance, over all its links."""

    def __init__(self) -> None:
        self._compares: Answers[Seq, CompareResult] = Answers()
        self._requests: Answers[int, Reply] = Answers()
        self._next_request = 1

    def expect(self, compare: Compare, link: Link | None) -> Compare | Heartbeat:
        """What to send for the Compare: itself, or without a link the Heartbeat that takes its place, and then its
        answer is a LinkReset. LocalProtocolError for one that may not be sent; nothing has changed then."""
        if len(self._compares) >= COMPARES_OPEN_MAX:
            raise LocalProtocolError(f"more than {COMPARES_OPEN_MAX} compares are open")
        frame_of(compare)  # refused now, before anything changes
        self._compares.expect(compare.seq)
        if link is not None:
            return compare
        self._compares.fail(compare.seq, LinkReset("the link is down, the comparison was not made"))
        return Heartbeat(compare.seq, compare.time, compare.run)

    async def compared(self, seq: Seq) -> bytes:
        """CompareResult.differing of the Compare `seq`; LinkReset where it was not made. One task asks, once."""
        if seq not in self._compares:
            raise LocalProtocolError(f"no compare {seq} is open")
        return (await self._compares.take(seq)).differing

    async def ask(self, link: Link | None, why_down: str, command: str, body: dict[str, object]) -> dict[str, object]:
        """The reply to a command. RequestRefused with its error, LinkDown without a link, LinkReset when that broke."""
        if link is None:
            raise LinkDown(f"no link to the second appliance: {why_down}")
        if len(self._requests) >= REQUESTS_WAITING_MAX:
            raise RequestRefused(f"{REQUESTS_WAITING_MAX} commands are waiting already")
        number = self._next_request
        self._next_request += 1
        self._requests.expect(number)
        link.command(Request(number, command, body))
        reply = await self._requests.take(number)
        if reply.error:
            raise RequestRefused(reply.error)
        return reply.body

    def compare_came(self, result: CompareResult) -> None:
        self._compares.settle(result.seq, result)

    def not_compared(self, seq: Seq) -> None:
        """The peer did not make that comparison."""
        if seq in self._compares:
            self._compares.fail(seq, LinkReset("the comparison was not made: its digests had another session's key"))

    def reply_came(self, reply: Reply) -> None:
        self._requests.settle(reply.id, reply)

    def fail_all(self, error: LinkReset) -> None:
        """The link broke: no answer will come."""
        self._compares.fail_all(error)
        self._requests.fail_all(error)
