"""A group's head and its past moments, seen beside a writer that adds to its history and thins it out.

Invariants:
- each view was synthesized from one state of the index and of the journal: where the history is rewritten meanwhile, it
  is done again. A segment that is missing is damage only if the manifest is what it was;
- pointers are looked up for a view only while its stretch of history is as it was (`check`): nothing was rewritten
  since, or the moment has been held since before the view was made (`no-wrong-bytes`);
- a moment is held only if it was there, found and pinned inside the barrier of `pins`;
- between the manifest of a rewritten history and its index (a writer may be killed there) an anchor whose place in the
  journal is gone is passed over for the one before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Final, TypeVar

from dedup.catalog import Catalog, Index, Txn
from dedup.errors import Damaged, MomentGone, StoreBusy
from dedup.group_state import Checkpoint, GroupState
from dedup.group_walk import GroupWalk
from dedup.journal_reader import JournalPosition, Scanned, SegmentFile, chain, first_position, scan
from dedup.manifest import read_number
from dedup.metadata_journal import Logged, read
from dedup.pins import ReaderPins
from dedup.pointer_map import SEQ_MAX
from dedup.stamps import Stamps
from dedup.storage import Storage
from dedup.synthesis import View, start_of
from dedup.types import Seq

VIEWS_MAX: Final = 8
"""Synthesized moments kept; each at most one checkpoint's overlay (a few MB)."""
ATTEMPTS_MAX: Final = 8
"""How often a view is made anew because the history was rewritten under it: once for each rewriting."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class DatedView:
    """A view, and the number of the manifest that it was made under; `indexed`: the index was that manifest's.

    `whole`: it is what `at` would make for its own seq, from the same anchor.
    """

    view: View
    number: int
    indexed: bool
    whole: bool


class GroupViews:
    """The views of one group. Not for two threads at once, but for `check`."""

    def __init__(
        self, storage: Storage, index: Index, catalog: Catalog, directory: Path, name: str, pins: ReaderPins | None
    ) -> None:
        """`pins` None: nothing can be held; for the writer's own process, and its helpers."""
        self._storage = storage
        self._index = index
        self._catalog = catalog
        self._directory = directory
        self._name = name
        self._pins = pins
        self._latest: Checkpoint | None = None
        self._position: JournalPosition | None = None
        self._indexed = 0
        self._manifest = 0
        self._state = GroupState()
        self._chain: tuple[int, list[SegmentFile]] | None = None
        """The journal's files as they were listed under a manifest of that number, and those that came behind."""
        self._listed = False
        """Whether that was within the attempt that is made now."""
        self._views: OrderedDict[Seq, DatedView] = OrderedDict()
        self._walk: GroupWalk | None = None
        self._held: dict[Seq, int] = {}
        """Moments held, and the manifest's number when that began."""
        self.refresh()

    @property
    def state(self) -> GroupState:
        """The head as of the last refresh; not to be changed."""
        return self._state

    @property
    def rewritten(self) -> tuple[int, int]:
        """Differs from what it was if the history may have been rewritten between two refreshes."""
        return self._manifest, self._indexed

    def refresh(self) -> None:
        """Sees everything that was journalled before this call."""
        self._settled(self._catch_up)

    def _catch_up(self, manifest: int) -> None:
        with self._index.read() as txn:
            indexed = self._catalog.journal_number(txn)
            if (manifest, indexed) != (self._manifest, self._indexed):
                self._position = None
                self._manifest, self._indexed = manifest, indexed
                self._walk = None
                self._drop_views()
            latest = self._catalog.anchor(txn, SEQ_MAX)
            if self._position is None or latest != self._latest:
                anchor = self._anchor(txn, SEQ_MAX, manifest)
                state, position = start_of(self._storage, self._directory, self._catalog, txn, anchor)
                self._state, self._position, self._latest = state, position, latest
        while True:
            # A file is complete when the next one is there. Looked at before it is read: its end is read then, too.
            held, is_complete = self._state.held, self._next_file() is not None
            files = self._files_from(self._position)
            for logged, position in read(self._storage, self._directory, self._position, files=files):
                self._state.apply(logged)
                self._position = position
            following = self._next_file()
            if following is None:
                return
            if is_complete and self._state.held == held:
                self._files().append(following)
                self._position = following.start

    def _settled(self, step: Callable[[int], _T]) -> _T:
        """What the step gives, once no history is rewritten under it; it is told the manifest's number."""
        for _ in range(ATTEMPTS_MAX):
            self._listed = False
            manifest = read_number(self._storage, self._directory)
            try:
                return step(manifest)
            except Damaged:
                # A writer that recovers may have removed a last file that was empty: listed anew, it is not missing.
                was_listed, self._chain, self._position = self._listed, None, None
                if was_listed and read_number(self._storage, self._directory) == manifest:
                    raise
        raise StoreBusy(f"group {self._name}: its history is being thinned out faster than it is read; try again")

    def _files_from(self, start: JournalPosition) -> list[SegmentFile]:
        """The journal's files now, from there on."""
        files = self._files()
        return files[bisect_left(files, start.segment, key=lambda file: file.first) :]

    def _files(self) -> list[SegmentFile]:
        """From the first one on. Listed when there is another manifest; what comes behind, `_catch_up` adds."""
        number = read_number(self._storage, self._directory)
        if self._chain is None or self._chain[0] != number:
            self._chain = number, chain(self._storage, self._directory)
            self._listed = True
        return self._chain[1]

    def _next_file(self) -> SegmentFile | None:
        """The file behind the one that the head is in, if it is there and not known yet."""
        files, following = self._files(), SegmentFile(Seq(self._state.held + 1))
        known = bool(files) and files[-1] == following
        return None if known or not self._storage.exists(following.path(self._directory)) else following

    def _anchor(self, txn: Txn, seq: Seq, manifest: int) -> Checkpoint | None:
        """The last checkpoint at or before `seq` from which the journal can be read on."""
        anchor = self._catalog.anchor(txn, seq)
        if anchor is None or self._catalog.journal_number(txn) == manifest:
            return anchor
        files = set(self._files())
        while anchor is not None:
            if SegmentFile(anchor.position.segment, anchor.position.generation) in files:
                return anchor
            anchor = self._catalog.anchor(txn, Seq(anchor.held - 1)) if anchor.held else None
        return None

    # -- past moments ------------------------------------------------------------------------------------------------

    def at(self, seq: Seq) -> DatedView:
        """The group at the last record at or before `seq` that the history still tells from others."""
        seq = min(seq, self._state.held)
        dated = self._views.get(seq)
        if dated is None:
            dated = self._settled(partial(self._synthesize, lambda logged: logged.seq > seq, seq, seq))
            self._keep(seq, dated)
        self._views.move_to_end(seq)
        return dated

    def _keep(self, seq: Seq, dated: DatedView) -> None:
        self._views[seq] = dated
        if len(self._views) > VIEWS_MAX:
            self._views.popitem(last=False)

    def listed(self, seq: Seq) -> GroupState:
        """As the state of `at(seq)`, but for its overlay; only until the next call. Cheap for moments that ascend."""
        seq = min(seq, self._state.held)
        dated = self._views.get(seq)
        return self._settled(partial(self._walk_to, seq)) if dated is None else dated.view.state

    def _walk_to(self, seq: Seq, manifest: int) -> GroupState:
        with self._index.read() as txn:
            manifest = max(manifest, self._catalog.journal_number(txn))
            if self._walk is None or self._walk.number != manifest:
                self._walk = GroupWalk(manifest, self._catalog, self._directory, self._known_entries_from)
            try:
                return self._walk.state_at(txn, seq, self._anchor(txn, seq, manifest))
            except BaseException:
                self._walk = None
                raise

    def _known_entries_from(self, start: JournalPosition | None) -> Iterator[Scanned]:
        """Up to the head as it is now: what is behind may still be taken back."""
        held = self._state.held
        return takewhile(lambda entry: entry.seq <= held, self._entries_from(start))

    def _entries_from(self, start: JournalPosition | None) -> Iterator[Scanned]:
        start = first_position(self._storage, self._directory) if start is None else start
        return scan(self._storage, self._directory, start, files=self._files_from(start))

    def before(self, stop: Callable[[Logged], bool], after: Seq) -> DatedView:
        """The group before the first entry for which `stop` is true; `after` is a seq at or before that entry.

        What is replayed is at most one checkpoint's entries when that seq is close. `stop` may be asked about an entry
        more than once.
        """
        dated = self._settled(partial(self._synthesize, stop, after, None))
        if dated.whole and dated.view.state.held not in self._views:
            # Who has found a moment will ask for it.
            self._keep(dated.view.state.held, dated)
        return dated

    def _synthesize(self, stop: Callable[[Logged], bool], after: Seq, upto: Seq | None, manifest: int) -> DatedView:
        """`upto`: the seq that is asked for, if it is known; where an anchor has it, nothing is replayed."""
        with self._index.read() as txn:
            # A commit between the two looks: the index is the newer one, and the journal read below is not older.
            indexed = self._catalog.journal_number(txn)
            manifest = max(manifest, indexed)
            anchor = self._anchor(txn, after, manifest)
            state, start = start_of(self._storage, self._directory, self._catalog, txn, anchor)
            whole = True
            if anchor is None or anchor.held != upto:
                files = self._files_from(start)
                for logged, _ in read(self._storage, self._directory, start, files=files):
                    if stop(logged):
                        whole = logged.seq > state.held
                        break
                    state.apply(logged)
            whole = whole and self._anchor(txn, state.held, manifest) == anchor
        return DatedView(View(Seq(0) if anchor is None else anchor.held, state), manifest, manifest == indexed, whole)

    def first_from(self, seq: Seq) -> View | None:
        """The group at the first record that ends at or after `seq`; None when there is none yet."""
        if seq > self._state.held:
            return None
        view = self.before(lambda logged: logged.kind.consumes_seq and logged.first_seq > seq, seq).view
        return view if view.state.held >= seq else None

    def stamped(self, step: Callable[[Stamps], _T]) -> _T:
        """What the step makes of the seqs and times of records; it is called anew if the history is rewritten under it.

        For many records this costs much less than a view of each.
        """
        return self._settled(lambda manifest: step(self._stamps(manifest)))

    def scanned(self, after: Seq, step: Callable[[GroupState, Iterator[Scanned]], _T]) -> _T:
        """What the step makes of the state at the last checkpoint at or before `after`, and of the entries behind it
        up to the head; it is called anew if the history is rewritten under it."""
        return self._settled(partial(self._scanned, after, step))

    def _scanned(self, after: Seq, step: Callable[[GroupState, Iterator[Scanned]], _T], manifest: int) -> _T:
        with self._index.read() as txn:
            anchor = self._anchor(txn, after, manifest)
            state, start = start_of(self._storage, self._directory, self._catalog, txn, anchor)
        return step(state, self._known_entries_from(start))

    def _stamps(self, manifest: int) -> Stamps:
        def anchor_at(seq: Seq) -> Checkpoint | None:
            with self._index.read() as txn:
                return self._anchor(txn, seq, manifest)

        def entries_after(anchor: Checkpoint | None) -> Iterator[Scanned]:
            return self._entries_from(None if anchor is None else anchor.position)

        return Stamps(anchor_at, entries_after, self._state.held)

    def _drop_views(self) -> None:
        for seq, dated in list(self._views.items()):
            if not self._is_held(dated):
                del self._views[seq]

    # -- moments that stay -------------------------------------------------------------------------------------------

    def hold(self, seq: Seq) -> None:
        """Keeps the moment, and every view of it that is made from now on, until `release`; as often as it is held.

        As `require`. May wait while the writer changes history; StoreBusy.
        """
        if self._pins is None:
            self.refresh()
            self.require(seq)
        elif not self._pins.pin_again(self._name, seq):
            with self._pins.inside():
                self.refresh()
                if self._manifest != self._indexed:
                    self._views.clear()  # what they were made from will be rewritten when a writer opens the store
                self.require(seq)
                self._pins.pin(self._name, seq)
                self._held[seq] = self._manifest

    def hold_again(self, seq: Seq) -> bool:
        """As `hold`, of a moment that is held; False when it is not. Never waits. Any thread."""
        return self._pins is not None and self._pins.pin_again(self._name, seq)

    def require(self, seq: Seq) -> None:
        """MomentGone unless the history, as of the last refresh, still tells the moment from others."""
        if self.at(seq).view.state.held != seq:
            raise self._gone(seq)

    def release(self, seq: Seq) -> None:
        """Ends one `hold`. Never waits."""
        if self._pins is not None and self._pins.unpin(self._name, seq):
            del self._held[seq]

    def check(self, txn: Txn, dated: DatedView) -> None:
        """MomentGone unless the pointer maps, as the transaction sees them, are still those of the view. Any thread."""
        if dated.number < self._catalog.journal_number(txn) and not self._is_held(dated):
            raise self._gone(dated.view.state.held)

    def _is_held(self, dated: DatedView) -> bool:
        """Whether the moment was held before the view was made, from the anchor that the writer takes it for."""
        if self._pins is not None and self._pins.everything:
            return True
        since = self._held.get(dated.view.state.held)
        return since is not None and since <= dated.number and dated.indexed

    def _gone(self, seq: Seq) -> MomentGone:
        return MomentGone(f"group {self._name}: seq={seq} has been thinned out meanwhile; look the moment up again")
