"""One history: seeded settings, applications and faults, then everything healed, drained and compared.

Invariants: the same seed gives the same steps, in every process: no clock, no thread, no random number but the seed's;
trio's scheduler draws from the seed too.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import trio
import trio.testing

import fusefs.agent
import fusefs.agent_start
from replication.near_thread import NearThread
from replication.status import LinkState
from tests.simulation.applications import Applications, make_source
from tests.simulation.chance import Chance
from tests.simulation.checks import check_end, check_gaps, check_levels, check_marks, check_moments
from tests.simulation.faults import Faults
from tests.simulation.hosts import AgentHost, FirstHost, SecondHost
from tests.simulation.model_store import ModelStore
from tests.simulation.network import Line
from tests.simulation.process import redirected, run_inline
from tests.simulation.settings import Profile, Settings, Topology
from tests.simulation.trace import Trace, Violation

REGION_BYTES = 32 << 10
"""So that small files have several."""
COMPARE_UNITS = (4 << 10, 8 << 10, 16 << 10, REGION_BYTES)
"""From a block to a region, as the real ones are."""
IDLE_SECONDS = 2.0
HOUSEKEEPING_SECONDS = 0.7
MARK_AHEAD_REGIONS = 2
LIVELY_SECONDS = 150.0
"""Everything healed, this is enough to reconcile and to drain."""
CHECK_SECONDS = 0.5
TASK_STEPS_MAX = 3_000_000
"""A history that takes more turns on its loop than this does not end."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a history went."""

    seed: int
    settings: Settings
    violation: Violation | None
    digest: str
    steps: int
    seconds: float
    """Of the simulation."""
    points: int
    """Recovery points that were compared."""
    counts: dict[str, int] = field(default_factory=dict)


def run_history(seed: int, *, echo: bool = False) -> Outcome:
    """Runs the history of that seed. Raises nothing of the simulated program's making."""
    trace = Trace(echo=echo)
    chance = Chance(f"rewindfs {seed}")
    settings = Settings.drawn(chance.branch("settings"))
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="simulation", dir=memory if os.access(memory, os.W_OK) else None))
    history = _History(root / "source", settings, chance, trace)
    try:
        with _deterministic(seed, history.applications, echo=echo):
            trio.run(
                history.run, clock=trio.testing.MockClock(autojump_threshold=0), instruments=[_Limit(TASK_STEPS_MAX)]
            )
        violation = trace.violations[0] if trace.violations else None
    except BaseException as error:
        if _interrupted(error):
            raise
        violation = trace.violations[0] if trace.violations else _crash(error, echo=echo)
    finally:
        shutil.rmtree(root)
    return Outcome(
        seed, settings, violation, trace.digest, trace.steps, history.seconds, history.points, dict(trace.counts)
    )


class _History:
    def __init__(self, source: Path, settings: Settings, chance: Chance, trace: Trace) -> None:
        self.points = 0
        self.seconds = 0.0
        self._settings = settings
        self._chance = chance
        self._trace = trace
        make_source(source, chance.branch("source"))
        self.store = ModelStore(trace, chance.branch("store"))
        near = far = Line("second", chance.branch("line"), trace, settings.delay_max)
        self.first: FirstHost | None = None
        if settings.topology is Topology.RELAYED:
            near = Line("first", chance.branch("near line"), trace, settings.delay_max)
            self.first = FirstHost(near, far, settings, chance.branch("first"), trace)
        self.lines = [far] if near is far else [near, far]
        self.second = SecondHost(self.store, far, chance.branch("second"), trace)
        self.agent = AgentHost(source, near, self.second, settings, chance.branch("agent"), trace)
        self.applications = Applications(self.agent, self.second, chance.branch("applications"), trace)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            faults = Faults(
                nursery,
                self.agent,
                self.second,
                self.first,
                self.lines,
                self.applications,
                self._chance.branch("faults"),
                self._trace,
            )
            await self.second.start(nursery)
            if self.first is not None:
                self.first.start(nursery)
            await faults.mount()
            nursery.start_soon(self._check_now_and_then, faults)
            with trio.move_on_after(self._settings.seconds):
                if self._settings.profile in (Profile.CALM, Profile.SHORT):
                    await self.agent.serves.wait()
                async with trio.open_nursery() as trouble:
                    for _ in range(3 if self._settings.profile is Profile.STORM else 1):
                        trouble.start_soon(faults.go_on)
                    await trio.sleep_forever()
            faults.heal()
            self._trace.note("healed")
            await self._settle(faults)
            self.seconds = trio.current_time()
            nursery.cancel_scope.cancel()
        self.points = check_moments(self.agent, self.second, self._trace)
        check_gaps(self.agent, self.second, self._trace, spells=self.agent.spells, lost=bool(self.agent.lost))

    async def _settle(self, faults: Faults) -> None:
        with trio.move_on_after(LIVELY_SECONDS) as patience:
            await self._until_equal(faults)
            # Applications go on for a moment, as nothing is wrong any more; then all ends well.
            await trio.sleep(1)
            self.applications.active = False
            await self.agent.unmount()
            while not self.agent.left_clean:
                # The end met an outage that had begun before: the next mount goes on.
                await faults.mount()
                await self._until_equal(faults)
                await self.agent.unmount()
        if patience.cancelled_caught:
            self._trace.stacks()
            self._trace.violated("liveness", f"all is healed, and nothing is drained: {self._stuck()}")
        check_end(self.agent, self.second, self._trace)

    async def _until_equal(self, faults: Faults) -> None:
        while True:
            agent = self.agent.agent
            if agent is not None and self.agent.serves.is_set():
                if agent.first.link is LinkState.LOST:
                    await self.agent.unmount()
                    await faults.mount()
                elif agent.link.equal and not agent.link.degraded:
                    return
            await trio.sleep(0.1)

    def _stuck(self) -> str:
        agent = self.agent.agent
        if agent is None:
            return f"no agent, {self.agent.requests} requests"
        status = agent.first.status()
        return (
            f"{status} equal={agent.link.equal} degraded={agent.link.degraded} last={agent.link.last} "
            f"requests={self.agent.requests} store={self.second.group.held}/{self.second.group.durable}"
        )

    async def _check_now_and_then(self, faults: Faults) -> None:
        while True:
            await trio.sleep(CHECK_SECONDS)
            check_levels(self.agent, self.second, self._trace)
            agent = self.agent.agent
            is_new = self.agent.epoch > faults.since
            if (
                faults.put_back
                and is_new
                and agent is not None
                and agent.link.equal
                and agent.first.link is LinkState.CONNECTED
            ):
                faults.put_back = False
            if not faults.put_back:
                check_marks(self.agent, self.second, self._trace)


class _Limit(trio.abc.Instrument):
    """Ends what never ends without time going on."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left < 0:
            raise Violation("liveness", f"more than {TASK_STEPS_MAX} turns")


@contextmanager
def _deterministic(seed: int, applications: Applications, *, echo: bool) -> Iterator[None]:
    import trio._core._run as scheduler

    with ExitStack() as stack:
        put = stack.enter_context

        def replace(module: object, name: str, value: object) -> None:
            put(patch.object(module, name, value))

        state = scheduler._r.getstate()
        stack.callback(scheduler._r.setstate, state)
        scheduler._r.seed(seed)
        replace(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        replace(trio.to_thread, "run_sync", run_inline)
        replace(NearThread, "run", lambda _thread, function, *args: run_inline(function, *args))
        put(patch.dict(redirected, {os.ftruncate: applications.resize}, clear=True))
        replace(fusefs.agent, "write_at", applications.write_at)
        replace(fusefs.agent, "monotonic", trio.current_time)
        replace(fusefs.agent_start, "monotonic", trio.current_time)
        for name, value in {
            "REGION_BYTES": REGION_BYTES,
            "IDLE_SECONDS": IDLE_SECONDS,
            "HOUSEKEEPING_SECONDS": HOUSEKEEPING_SECONDS,
            "COMPARE_UNITS": COMPARE_UNITS,
            "SUM_UNITS": COMPARE_UNITS[1:3],
            "OFFER_BLOCKS_MIN": 1,
            "MARK_AHEAD_REGIONS": MARK_AHEAD_REGIONS,
        }.items():
            for module in _modules_with(name):
                replace(module, name, value)
        if not echo:
            logging.disable(logging.CRITICAL)
            stack.callback(logging.disable, logging.NOTSET)
        yield


def _modules_with(name: str) -> list[object]:
    packages = ("replication.", "fusefs.")
    return [module for key, module in sorted(sys.modules.items()) if key.startswith(packages) and hasattr(module, name)]


def _interrupted(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_interrupted(inner) for inner in error.exceptions)
    return isinstance(error, KeyboardInterrupt)


def _crash(error: BaseException, *, echo: bool) -> Violation:
    text = "".join(traceback.format_exception(error))
    if echo:
        print(text)
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, Violation):
        return error
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Violation("crash", f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})")


Report = Callable[[Outcome], None]
