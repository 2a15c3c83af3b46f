"""What happened in a history, in order: hashed, so that two runs of a seed can be held against each other."""

from __future__ import annotations

from hashlib import blake2b

import trio


class Violation(AssertionError):
    """An invariant does not hold. `invariant` is its name."""

    def __init__(self, invariant: str, text: str) -> None:
        super().__init__(f"{invariant}: {text}")
        self.invariant = invariant


class Trace:
    """`note` takes a step; a violation is kept even where somebody swallows its exception."""

    def __init__(self, *, echo: bool = False) -> None:
        self.steps = 0
        self.violations: list[Violation] = []
        self.counts: dict[str, int] = {}
        """How often each kind of step was taken; the kind is the first word."""
        self._hash = blake2b(digest_size=16)
        self._echo = echo

    def note(self, text: str) -> None:
        line = f"{trio.current_time():.6f} {text}"
        self.steps += 1
        self._hash.update(line.encode())
        if self._echo:
            print(line, flush=True)
        kind = text.split(" ", 1)[0]
        self.counts[kind] = self.counts.get(kind, 0) + 1

    @property
    def digest(self) -> str:
        """Of every step so far."""
        return self._hash.hexdigest()

    def stacks(self) -> None:
        """Prints where every task waits, where steps are printed."""
        if not self._echo:
            return
        root = trio.lowlevel.current_root_task()
        todo = [] if root is None else [root]
        while todo:
            task = todo.pop()
            print(task.name)
            for frame, line in list(task.iter_await_frames())[-6:]:
                print(f"    {frame.f_code.co_filename.rsplit('/', 2)[-1]}:{line} {frame.f_code.co_name}")
            todo += [child for nursery in task.child_nurseries for child in nursery.child_tasks]

    def violated(self, invariant: str, text: str) -> None:
        """Raises Violation, and keeps it."""
        violation = Violation(invariant, text)
        self.violations.append(violation)
        self.note(f"VIOLATION {violation}")
        raise violation
