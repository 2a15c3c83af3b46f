"""The agent's part in healing a store: it asks which blocks of its volumes' latest state are damaged there, and sends
what the source holds once more.

That changes nothing of the history: the source's bytes are what the store should hold at that seq. Where they hash to
what the damaged slot is to hold, the store heals the slot itself, and every past moment with it (dedup/healing.py).
"""

from __future__ import annotations

import logging
from typing import Final

import trio

from dedup.types import WRITE_BYTES_MAX, VolumeId
from fusefs.agent import Agent
from fusefs.agent_source import AgentSource
from replication.errors import HistoryLost, LinkDown, LinkReset, RequestRefused
from replication.reconcile import Reconciler

log = logging.getLogger(__name__)

ASK_SECONDS: Final = 5.0
"""Between two questions; each is answered at once, nearly always by: nothing."""
SEND_SECONDS: Final = 60.0
"""How long one range may take: what the source cannot give, or in an outage, is left to the next verification."""


async def heal(agent: Agent) -> None:
    """Asks and sends until cancelled, or until the history is lost."""
    while True:
        await trio.sleep(ASK_SECONDS)
        if not agent.link.equal:
            continue  # a reconcile is due or under way; it sends whatever the store does not hold
        try:
            await _send_wanted(agent, await agent.first.request("heal.wanted", {}))
        except (LinkDown, LinkReset, RequestRefused) as error:
            log.debug("nothing is healed now: %s", error)
        except HistoryLost:
            return
        except OSError as error:
            log.error("what is damaged at the store cannot be read here: %s", error)


async def _send_wanted(agent: Agent, reply: dict[str, object]) -> None:
    ranges = reply.get("ranges")
    if not isinstance(ranges, list):
        raise RequestRefused(f"the reply to heal.wanted has no ranges: {reply}")
    reconciler = Reconciler(agent.link, AgentSource(agent))
    for one in ranges:
        match one:
            case [int(volume), int(offset), int(length)] if offset >= 0 and 0 < length <= WRITE_BYTES_MAX:
                known = agent.volumes.get(VolumeId(volume))
                length = 0 if known is None else min(length, known.size - offset)
                if length > 0:
                    with trio.move_on_after(SEND_SECONDS):
                        await reconciler.send(VolumeId(volume), offset, length)
            case _:
                raise RequestRefused(f"the reply to heal.wanted names what cannot be a range: {one}")
    if ranges:
        log.warning("%d ranges that are damaged at the store were sent to it once more", len(ranges))
