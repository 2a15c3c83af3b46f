"""The gate in front of the store's ingest: below its hard limit batches pass, above it they meet the policy.

Invariants:
- Without a hard limit nothing waits and nothing is counted.
- A batch passes when the most that it may add still fits, by the last walk and all that passed since; what waits
  holds neither the store's lock nor a part of the store, and leaves no trace when it is cancelled.
- The hard limit is never met silently: it is logged when it is reached, and `status` says so as long as it lasts.
- At most a tenth of the time goes into walks.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import trio

from dedup.errors import RewindError, StoreError, StoreFailed, StoreFull
from dedup.retention import AtLimit, Policy, hastened, load_policy, save_policy
from dedup.space import Fit, SpaceAccount, SpaceState, space_document, state_at, used_bytes
from dedup.storage import Storage
from dedup.terminal import size_text

log = logging.getLogger("rewindfs.space")

Thinner = Callable[[Policy], Awaitable[object]]
"""Consolidates the store's history by this policy, then collects what nothing names any more; returns when both are
done. May raise StoreError; a StoreFailed it has told the writer itself."""

WALK_SECONDS: Final = 30.0
"""Between two walks when nobody asks for one."""
FULL_SECONDS: Final = 1.0
"""Between two walks at the hard limit: room may come from anywhere."""
WALK_SHARE: Final = 10
THIN_AGAIN_SECONDS_MIN: Final = 1.0
THIN_AGAIN_SECONDS_MAX: Final = 600.0
THIN_AGAIN_SHARE: Final = 8
"""After all halvings made no room they are tried again when history has aged by such a share of its finest tier."""


class SpaceGate:
    """`serve` must run for anything that waits to pass. For one event loop; nothing here is safe in other threads."""

    def __init__(self, path: Path, storage: Storage, measure: Callable[[Path], int] = used_bytes) -> None:
        """Reads the policy. A damaged one is logged: ingest goes on without caps, since it cannot ask anybody."""
        self.thinner: Thinner | None = None
        """What `thin` calls; until it is set that policy blocks."""
        self._path = path
        self._storage = storage
        self._measure_now = measure
        try:
            policy = load_policy(storage, path)
        except StoreError as error:
            log.critical("%s; until then there are no caps", error)
            policy = Policy()
        self._account = SpaceAccount(policy)
        self._asked = trio.Event()
        self._hurry = trio.Event()
        self._measured = trio.Event()
        self._walking = False
        self._waiting = 0
        self._refused: int | None = None
        """What did not fit when the hard limit was met; None: it is not met."""
        self._refused_at = 0.0
        self._soft_said = False
        self._thin_after = 0.0
        self._thinning = trio.CancelScope()
        if not self.open:
            self._asked.set()

    @property
    def policy(self) -> Policy:
        return self._account.policy

    @property
    def open(self) -> bool:
        """Whether there is no cap at all: then nobody needs to ask."""
        policy = self.policy
        return policy.hard_limit_bytes is None and policy.soft_limit_bytes is None

    async def set_policy(self, policy: Policy) -> None:
        """Durable when it returns, and in force: no history goes by the old one any more, to make room.

        BadPolicy, StoreFull, StoreFailed: the old one stays.
        """
        await trio.to_thread.run_sync(save_policy, self._storage, self._path, policy)
        self._account.policy = policy
        self._thinning.cancel()
        self._thin_after = 0.0
        log.info("the retention policy is now %s", policy)
        self.recheck()

    def recheck(self) -> None:
        """There may be room now: something was freed, or the policy is another."""
        self._hurry.set()
        self._asked.set()

    async def admit(self, growth: int, *, bare: bool) -> None:
        """Returns when so much more fits; to be followed by `landed`. StoreFull when the policy is `fail`.

        Does not wait, nor let others run, when it fits by what is known.
        """
        account = self._account
        while (fit := account.fits(growth, bare=bare)) is not Fit.YES:
            measured = self._measured
            if fit is Fit.NO:
                self._meet_limit(growth)
                if self.policy.at_limit is AtLimit.FAIL:
                    raise StoreFull(self._limit_text())
            else:
                self._asked.set()
            self._waiting += 1
            try:
                await measured.wait()
            finally:
                self._waiting -= 1
        account.begin(growth)
        if account.soft_is_due and not self._soft_said:
            self._asked.set()

    def landed(self, growth: int) -> None:
        """What was admitted is in the store, or was refused there."""
        self._account.end(growth)

    def status(self, used: int) -> dict[str, object]:
        """The `space` of `status`; `used` as it was just measured."""
        state = state_at(self.policy, used) if self._refused is None else SpaceState.HARD
        return space_document(self.policy, used, state)

    async def serve(self) -> None:
        """Measures now and then, and when asked, and thins where that is the policy; until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._thin_when_full)
            while True:
                with trio.move_on_after(self._interval()):
                    await self._asked.wait()
                self._asked, self._hurry = trio.Event(), trio.Event()
                begun = trio.current_time()
                await self._measure()
                spent = trio.current_time() - begun
                with trio.move_on_after((WALK_SHARE - 1) * spent):
                    await self._hurry.wait()

    def _interval(self) -> float:
        if self._refused is not None:
            return FULL_SECONDS
        return float("inf") if self.open and not self._waiting else WALK_SECONDS

    async def _measure(self) -> None:
        """One walk; then everyone who waits looks again."""
        account = self._account
        if not self.open:
            mark = account.begin_walk()
            self._walking = True
            used = await trio.to_thread.run_sync(self._measure_now, self._path)
            self._walking = False
            account.measured(used, mark)
            self._judge_soft(used)
        if self._refused is not None and account.fits(self._refused) is Fit.YES:
            self._refused = None
            log.warning("the store has room again: %s", self._used_text())
        measured, self._measured = self._measured, trio.Event()
        measured.set()

    def _judge_soft(self, used: int) -> None:
        above = state_at(self.policy, used) is not SpaceState.OK
        soft = self.policy.soft_limit_bytes
        if above and not self._soft_said and soft is not None:
            log.warning("the store is above its soft limit: %s of %s", size_text(used), size_text(soft))
        self._soft_said = above

    def _meet_limit(self, growth: int) -> None:
        if self._refused is None:
            self._refused, self._refused_at = growth, trio.current_time()
            log.error("%s", self._limit_text())
            self._asked.set()

    def _limit_text(self) -> str:
        what = {
            AtLimit.BLOCK: "writes wait until there is room",
            AtLimit.THIN: "writes wait while history is thinned",
            AtLimit.FAIL: "writes are refused",
        }[self.policy.at_limit]
        return (
            f"{self._path}: no space left below the hard limit: {self._used_text()}; {what}: raise it with "
            "`rewindfs retention set`, shorten the tiers, or delete snapshots and run `rewindfs gc`"
        )

    def _used_text(self) -> str:
        hard = self.policy.hard_limit_bytes
        return f"{size_text(self._account.used or 0)} used of {'no limit' if hard is None else size_text(hard)}"

    async def _thin_when_full(self) -> None:
        while True:
            await self._measured.wait()
            is_wanted = self._refused is not None and self.policy.at_limit is AtLimit.THIN
            if is_wanted and self.thinner is not None and trio.current_time() >= self._thin_after:
                await self._thin(self.thinner)

    async def _thin(self, thinner: Thinner) -> None:
        """Thins by the policy as it is, then with its tiers halved again and again, until there is room to spare, so as
        not to be back soon; gives up for a while when halving them further is no use."""
        policy, halvings = self.policy, 0
        while self.policy is policy and not self._account.has_spare:
            waited_ns = int((trio.current_time() - self._refused_at) * 1e9) if self._refused is not None else 0
            faster = hastened(policy, halvings, waited_ns)
            if faster is None:
                if self._refused is not None:
                    log.critical("history cannot be thinned further, the store is still full: %s", self._used_text())
                self._thin_later(policy)
                return
            log.warning("thinning history with every tier at 1/%d, to make room: %s", 1 << halvings, self._used_text())
            try:
                with trio.CancelScope() as self._thinning:
                    await thinner(faster)
            except StoreFailed:
                return  # the writer tells everyone
            except RewindError as error:
                log.error("history could not be thinned: %s", error)
                self._thin_later(policy)
                return
            if self._thinning.cancelled_caught:
                return
            await self._measure_anew()
            halvings += 1

    def _thin_later(self, policy: Policy) -> None:
        aged = policy.tiers[0][1] / 1e9 / THIN_AGAIN_SHARE
        self._thin_after = trio.current_time() + min(THIN_AGAIN_SECONDS_MAX, max(THIN_AGAIN_SECONDS_MIN, aged))

    async def _measure_anew(self) -> None:
        """Returns after a walk that began after the call: an older one would have history thinned for nothing."""
        if self._walking:
            await self._measured.wait()
        self.recheck()
        await self._measured.wait()
