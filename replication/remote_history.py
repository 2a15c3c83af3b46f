"""The history of a group whose store is elsewhere: asked of its second appliance, with blocks cached here.

Invariants:
- what is said is what the store's own reader says there (`dedup.reader`), in one session or in several;
- a moment that is held stays held over sessions (`held_moments`); while there was none it may have been thinned out,
  and then it is MomentGone;
- bounded: GROUPS_VOLUMES_MAX volume states, the images' bounds, the cache's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Final

from dedup.errors import BadTime, MomentGone, StoreBusy
from dedup.history import ByteRange, GroupMoment
from dedup.types import Moment, Seq, Snapshot, TimeNs, VolumeId, VolumeState
from replication import history_queries as said
from replication.block_cache import BlockCache
from replication.checks import check_state
from replication.control_checks import Malformed
from replication.history_link import SESSIONS_MAX, HistoryLink, SessionChanged
from replication.history_queries import GROUPS_PER_QUERY_MAX
from replication.remote_image import RemoteBlocks, RemoteImage

GROUPS_VOLUMES_MAX: Final = 20_000
"""Volume states kept of moments that were listed, some 200 bytes each."""


class RemoteHistory:
    """As `history.History`, over a link that is open; every method may wait for it, but for those that say not."""

    def __init__(self, link: HistoryLink, cache: BlockCache) -> None:
        """The caller closes both after `close`, the link first."""
        self._link = link
        self._blocks = RemoteBlocks(link, cache)
        self._paths: tuple[int, int, frozenset[str]] = (0, 0, frozenset())
        """Session, version, and the paths."""
        self._groups: OrderedDict[Seq, GroupMoment] = OrderedDict()
        self._groups_volumes = 0
        self._listed: list[Seq] = []
        """The moments of the last listing: who lists asks for them one after the other."""
        self._state = said.Refreshed("", 0, (0, 0))
        self._session = 0
        self.refresh()

    def close(self) -> None:
        """To be called after the link's close."""
        self._blocks.close()

    @property
    def name(self) -> str:
        return self._state.group

    @property
    def store_uuid(self) -> str:
        return self._link.store_uuid

    @property
    def covered_until(self) -> TimeNs:
        return TimeNs(self._state.covered_until)

    @property
    def rewritten(self) -> Hashable:
        """Another session counts as history that was rewritten: it may be that of a store put back to an older copy."""
        return self._session, self._state.rewritten

    def refresh(self) -> None:
        before = self.rewritten
        session = self._link.generation
        self._state = self._link.ask(said.Refresh(), said.Refreshed)
        # The number was looked at before: a session that came meanwhile is told at the next refresh.
        self._session = session
        if self.rewritten != before:
            self._groups.clear()
            self._groups_volumes = 0

    # -- names and moments -------------------------------------------------------------------------------------------

    def snapshots(self) -> list[Snapshot]:
        for _ in range(SESSIONS_MAX):
            try:
                found = self._snapshots(self._link.generation)
            except SessionChanged:
                continue
            self._listed = [snapshot.seq for snapshot in found]
            return found
        raise self._link.unsettled()

    def _snapshots(self, session: int) -> list[Snapshot]:
        found: list[Snapshot] = []
        start: int | None = 0
        while start is not None:
            page = self._link.ask(said.Names(start), said.NamesPage, session)
            found += page.snapshots
            start = self._following(start, page.next)
        return found

    def snapshot(self, name: str) -> Snapshot | None:
        if not said.can_be_said(name):
            return None
        found = self._link.ask(said.Name(name), said.NamesPage).snapshots
        return found[0] if found else None

    def paths(self) -> frozenset[str]:
        for _ in range(SESSIONS_MAX):
            try:
                return self._all_paths(self._link.generation)
            except SessionChanged:
                continue
        raise self._link.unsettled()

    def _all_paths(self, session: int) -> frozenset[str]:
        of_session, version, paths = self._paths
        known = version if of_session == session else 0
        page = self._link.ask(said.Paths(known, 0), said.PathsPage, session)
        if page.version == known:
            return paths
        found, version = set(page.paths), page.version
        start = self._following(0, page.next)
        while start is not None:
            page = self._link.ask(said.Paths(0, start), said.PathsPage, session)
            found.update(page.paths)
            start = self._following(start, page.next)
        if found != paths:
            paths = frozenset(found)
        self._paths = session, version, paths
        return paths

    def resolve(self, text: str, *, now: TimeNs | None = None) -> Moment:
        if not said.can_be_said(text):
            raise BadTime(f"{text[:40]!r} is no TIME: it is too long, or no text")
        moment = self._link.ask(said.Resolve(text, now), said.Resolved).moment
        self.refresh()
        return moment

    def require(self, seq: Seq) -> None:
        self._link.ask(said.Require(seq), said.Done)

    def group_at(self, seq: Seq) -> GroupMoment:
        known = self._groups.get(seq)
        if known is not None:
            self._groups.move_to_end(seq)
            return known
        for _ in range(SESSIONS_MAX):
            try:
                return self._ask_for_group(seq, self._link.generation)
            except SessionChanged:
                continue
        raise self._link.unsettled()

    def _ask_for_group(self, seq: Seq, session: int) -> GroupMoment:
        seqs = [seq, *(other for other in self._listed_after(seq) if other not in self._groups)]
        page = self._link.ask(said.Groups(tuple(seqs[:GROUPS_PER_QUERY_MAX])), said.GroupsPage, session)
        if not 1 <= len(page.groups) <= len(seqs):
            raise self._link.broken(f"{len(page.groups)} moments for {len(seqs)}")
        first = self._moment_of(page.groups[0].moment, list(page.groups[0].volumes))
        if page.next is not None:
            first = self._rest_of_group(seq, page, session)
        self._remember(seq, first)
        for other, group in zip(seqs[1:], page.groups[1:], strict=False):
            self._remember(other, self._moment_of(group.moment, list(group.volumes)))
        return first

    def _listed_after(self, seq: Seq) -> list[Seq]:
        try:
            at = self._listed.index(seq)
        except ValueError:
            return []
        return self._listed[at + 1 : at + GROUPS_PER_QUERY_MAX]

    def _rest_of_group(self, seq: Seq, page: said.GroupsPage, session: int) -> GroupMoment:
        """All pages of a group with many volumes."""
        moment, volumes = page.groups[0].moment, list(page.groups[0].volumes)
        start = self._following(0, page.next)
        while start is not None:
            page = self._link.ask(said.Groups((seq,), start), said.GroupsPage, session)
            if len(page.groups) != 1:
                raise self._link.broken(f"{len(page.groups)} moments for one")
            start = self._following(start, page.next)
            if page.groups[0].moment != moment:
                raise StoreBusy(f"group {self.name}: history was thinned out while seq={seq} was read; try again")
            volumes += page.groups[0].volumes
        return self._moment_of(moment, volumes)

    def _moment_of(self, moment: Moment, volumes: list[VolumeState]) -> GroupMoment:
        """ProtocolError for a volume that cannot be: a path that leads out of the source would lead out of where it is
        restored to, too."""
        for state in volumes:
            try:
                check_state(state)
            except Malformed as error:
                raise self._link.broken(f"volume {state.volume}: {error}") from error
        return GroupMoment(moment, {volume.path: volume for volume in volumes})

    def _remember(self, seq: Seq, group: GroupMoment) -> None:
        if group.moment.seq != seq or seq in self._groups:
            return  # of a seq past the last record, or thinned out: not the same for ever
        self._groups[seq] = group
        self._groups_volumes += 1 + len(group.volumes)
        while self._groups_volumes > GROUPS_VOLUMES_MAX and len(self._groups) > 1:
            _, oldest = self._groups.popitem(last=False)
            self._groups_volumes -= 1 + len(oldest.volumes)

    # -- images ------------------------------------------------------------------------------------------------------

    def image(self, volume: VolumeId, seq: Seq) -> RemoteImage:
        for _ in range(SESSIONS_MAX):
            session = self._link.generation
            try:
                found = self._link.ask(said.ImageAt(volume, seq), said.ImageFound, session)
            except SessionChanged:
                continue
            image = RemoteImage(self._blocks, volume, found, session)
            held = self._link.held.time_of(seq)
            if held is not None and image.time != held:
                raise MomentGone(f"{image.label} is another moment now than the one that is held; look it up again")
            return image
        raise self._link.unsettled()

    def differing(
        self, old: tuple[VolumeId, Seq] | None, new: tuple[VolumeId, Seq] | None, start: int = 0
    ) -> Iterator[ByteRange]:
        images = [None if side is None else self.image(*side) for side in (old, new)]
        first = self._ranges(images, start)
        return self._all_ranges(first, lambda following: self._ranges(images, following))

    def _ranges(self, images: list[RemoteImage | None], start: int) -> said.Ranges:
        """A page, of the very images that the comparison began with."""
        old, new = (None if image is None else image.side for image in images)
        for _ in range(SESSIONS_MAX):
            session = self._link.generation
            try:
                for image in images:
                    if image is not None:
                        image.look_up_again(session)
                page = self._link.ask(said.Differing(old, new, start), said.Ranges, session)
            except SessionChanged:
                continue
            self._following(start, page.next)
            return page
        raise self._link.unsettled()

    def _all_ranges(self, page: said.Ranges, page_from: Callable[[int], said.Ranges]) -> Iterator[ByteRange]:
        at, length = 0, 0
        while True:
            for offset, more in page.ranges:
                if length and at + length == offset:  # joined over the pages' edge
                    length += more
                    continue
                if length:
                    yield ByteRange(at, length)
                at, length = offset, more
            if page.next is None:
                break
            page = page_from(page.next)
        if length:
            yield ByteRange(at, length)

    def _following(self, start: int, following: int | None) -> int | None:
        """Where the page behind the one from `start` on begins. ProtocolError unless that is farther on."""
        if following is not None and following <= start:
            raise self._link.broken(f"a page from {start} on is followed by one from {following} on")
        return following

    # -- moments that stay -------------------------------------------------------------------------------------------

    def hold(self, seq: Seq) -> None:
        held = self._link.held
        for _ in range(SESSIONS_MAX):
            if held.again(seq):
                return
            session = self._link.generation
            try:
                time = TimeNs(self._link.ask(said.Hold(seq), said.Held, session).time)
            except SessionChanged:
                continue
            first = held.began(seq, time, session)
            if first is False:
                self._link.tell(said.Release(seq))
            if first is not None:
                return
        raise self._link.unsettled()

    def hold_again(self, seq: Seq) -> bool:
        return self._link.held.again(seq)

    def release(self, seq: Seq) -> None:
        """Never waits."""
        if self._link.held.release(seq):
            self._link.tell(said.Release(seq))

    def close_idle(self) -> None:
        """Nothing: no file of the store is open here."""

    def enter(self) -> None:
        """Nothing: a reader elsewhere must not keep the writer out. `hold` waits there for so long as it must."""

    def leave(self) -> None:
        """Nothing."""
