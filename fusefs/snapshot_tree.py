"""What the snapshot mount shows: which paths exist, and what each of them stands for. Knows no pyfuse3 and no trio.

    volumes/VOLUME/NAME   each snapshot in which a volume had the path VOLUME
    volumes/VOLUME/@TIME  the same for any recovery point; found by name, not listed
    points/NAME/VOLUME    the whole group at a snapshot; points/@TIME too
    files/VOLUME/NAME/…   with `files`: as below volumes/, but each version is a directory of the files in the image

What is inside an image is not known here: see `inside_files`.

Invariants:
- `node-never-changes`: what a `SnapshotFile` or `MomentDirectory` stands for is fixed when it is made. When a name
  comes to mean another moment it leads to another node; the node that it led to before goes on as it was;
- a path that was a volume once and a directory at another time is both: a subdirectory's name wins over a snapshot's;
- a moment that has been thinned out since it was looked up is MomentGone, never shown as the one that is there now;
- what is kept is bounded: `CACHED_STATES_MAX` volume states, `CACHED_VERSIONS_MAX` versions of paths,
  `bound_names.BINDINGS_MAX` names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from dedup.errors import MomentGone, UnknownName
from dedup.history import GroupMoment, History
from dedup.moment import AtSeq, AtTime, Latest, Named, parse_time
from dedup.types import Moment, Seq, Snapshot, TimeNs, VolumeState
from fusefs.bound_names import BoundNames
from fusefs.inside.filesystem import Node as InnerNode
from fusefs.inside.filesystem import Status

VOLUMES_NAME: Final = "volumes"
POINTS_NAME: Final = "points"
FILES_NAME: Final = "files"
TIME_MARK: Final = "@"
"""What a name that is a TIME starts with."""

ALWAYS_SECONDS: Final = 3600.0
"""For how long a name may be remembered that never comes to mean anything else."""
MOMENT_SECONDS: Final = 10.0
"""The same for an absolute TIME: it may turn out to lie in a gap, and retention may drop it."""
NAME_SECONDS: Final = 0.02
"""The same for a snapshot's name. Less than it takes to delete one and give it anew, two commands of 40 ms or more: so
nobody sees the old file by the new name. More than a program takes for its calls on one name, as `ls -l` does."""
CACHED_STATES_MAX: Final = 100_000
"""Volume states kept of moments that were looked at, some 200 bytes each."""
CACHED_VERSIONS_MAX: Final = 50_000
"""What paths were at snapshots that were listed, some 300 bytes each: listings of many snapshots of many volumes."""


@dataclass(frozen=True, slots=True)
class Root:
    """The mountpoint."""

    @property
    def key(self) -> Hashable:
        return self


@dataclass(frozen=True, slots=True)
class VersionsDirectory:
    """volumes/PATH: the versions of what had this path, and the subdirectories; PATH is empty for volumes/ itself.

    With `files` it is files/PATH.
    """

    path: str
    files: bool = False

    @property
    def key(self) -> Hashable:
        return self


@dataclass(frozen=True, slots=True)
class PointsDirectory:
    """points/"""

    @property
    def key(self) -> Hashable:
        return self


@dataclass(frozen=True, slots=True)
class MomentDirectory:
    """points/NAME/PATH: a directory of the source as it was. `name` belongs to it: a directory has one parent."""

    name: str
    moment: Moment
    path: str

    @property
    def key(self) -> Hashable:
        return (self.name, self.moment.seq, self.moment.time, self.path)


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """A volume as it was."""

    state: VolumeState
    moment: Moment

    @property
    def key(self) -> Hashable:
        # The time, for a store far away may be put back to an older copy, and go on from there.
        return (self.state.volume, self.moment.seq, self.moment.time)


@dataclass(frozen=True, slots=True)
class ImageDirectory:
    """What is inside a volume as it was: the root of its file system, or its partitions."""

    state: VolumeState
    moment: Moment

    @property
    def key(self) -> tuple[Hashable, ...]:
        return ("image", self.state.volume, self.moment.seq, self.moment.time)


@dataclass(frozen=True, slots=True)
class InsideNode:
    """A file, directory or symbolic link inside an image; `path` is one of those that lead to it."""

    image: ImageDirectory
    inner: InnerNode
    status: Status
    path: str

    @property
    def key(self) -> Hashable:
        return ("inside", *self.image.key, self.inner)

    @property
    def moment(self) -> Moment:
        return self.image.moment


Directory = Root | VersionsDirectory | PointsDirectory | MomentDirectory
Inside = ImageDirectory | InsideNode
Node = Directory | SnapshotFile | Inside


@dataclass(frozen=True, slots=True)
class Found:
    """What a name leads to, and for how many seconds that may be remembered."""

    node: Node
    seconds: float


class SnapshotTree:
    """The tree over one group. Not for two threads at once, since its reader is not."""

    def __init__(self, reader: History, *, clock: Callable[[], float], files: bool = False) -> None:
        """`clock` counts seconds, for names that stay bound for a while. `files`: there is a files/ as well."""
        self._reader = reader
        self._top: dict[str, Directory] = {VOLUMES_NAME: VersionsDirectory(""), POINTS_NAME: PointsDirectory()}
        if files:
            self._top[FILES_NAME] = VersionsDirectory("", files=True)
        self._clock = clock
        self._bound = BoundNames()
        self._bound_walks = BoundNames(walks=True)
        self._groups: OrderedDict[Seq, GroupMoment] = OrderedDict()
        self._rewritten = reader.rewritten
        self._cached_states = 0
        self._versions: OrderedDict[tuple[str, Seq], tuple[Moment, VolumeState | None]] = OrderedDict()
        self._paths: frozenset[str] = frozenset()
        self._children: dict[str, set[str]] = {"": set()}

    @property
    def time(self) -> TimeNs:
        """Until when the group is known."""
        return self._reader.covered_until

    def lookup(self, directory: Directory, name: str, *, who: int = 0) -> Found:
        """What `name` in a directory is now. FileNotFoundError where there is no such name.

        A TIME is resolved: MomentRefused, BadTime, UnknownName say why it is none of this group or volume. MomentGone:
        the directory's own moment is no longer there. `who` is the process that asks: for it a name relative to now
        stays what it is for a while.
        """
        match directory:
            case Root():
                if name not in self._top:
                    raise FileNotFoundError(name)
                return Found(self._top[name], ALWAYS_SECONDS)
            case VersionsDirectory():
                return self._lookup_version(directory, name, who)
            case PointsDirectory():
                return self._lookup_point(name, who)
            case MomentDirectory():
                return Found(self._in_moment(directory, name), ALWAYS_SECONDS)

    def listing(self, directory: Directory) -> Iterator[tuple[str, Found] | None]:
        """What a directory shows now, step by step: None is a step that found nothing to show.

        A step may replay the records of a whole checkpoint, so between two of them others may use the tree. Names that
        are a TIME are not listed, there is no end of them.
        """
        match directory:
            case Root():
                yield from ((name, Found(node, ALWAYS_SECONDS)) for name, node in self._top.items())
            case VersionsDirectory():
                yield from self._list_versions(directory)
            case PointsDirectory():
                self._refresh()
                for snapshot in self._reader.snapshots():
                    yield None if snapshot.volume is not None else (snapshot.name, self._point(snapshot))
            case MomentDirectory():
                volumes = self._group_of(directory.moment).volumes
                for name in sorted(_children(volumes).get(directory.path, ())):
                    yield name, Found(self._in_moment(directory, name), ALWAYS_SECONDS)

    def names_of(self, seq: Seq) -> list[str]:
        """Of the snapshots and bookmarks that a moment has."""
        return [snapshot.name for snapshot in self._reader.snapshots() if snapshot.seq == seq]

    # Below volumes/

    def _lookup_version(self, directory: VersionsDirectory, name: str, who: int) -> Found:
        path, files = directory.path, directory.files
        self._refresh()
        self._refresh_paths()
        if name in self._children.get(path, ()):
            return Found(VersionsDirectory(_join(path, name), files), ALWAYS_SECONDS)
        if not path:
            raise FileNotFoundError(name)
        if name.startswith(TIME_MARK):
            moment, seconds = self._resolve(name[len(TIME_MARK) :], who, files=files)
            state = self._group_at(moment.seq).volumes.get(path)
            if state is None:
                raise UnknownName(f"{name}: no volume had the path {path} at seq={moment.seq}")
            return Found((ImageDirectory if files else SnapshotFile)(state, moment), seconds)
        snapshot = self._reader.snapshot(name)
        file = None if snapshot is None else self._version(directory, snapshot)
        if file is None:
            raise FileNotFoundError(name)
        return Found(file, NAME_SECONDS)

    def _list_versions(self, directory: VersionsDirectory) -> Iterator[tuple[str, Found] | None]:
        path = directory.path
        self._refresh()
        self._refresh_paths()
        children = self._children.get(path, set())
        for name in sorted(children):
            yield name, Found(VersionsDirectory(_join(path, name), directory.files), ALWAYS_SECONDS)
        if path not in self._paths:
            return
        for snapshot in self._reader.snapshots():
            file = None if snapshot.name in children else self._version(directory, snapshot)
            yield None if file is None else (snapshot.name, Found(file, NAME_SECONDS))

    def _version(self, directory: VersionsDirectory, snapshot: Snapshot) -> SnapshotFile | ImageDirectory | None:
        """The volume that had the path at a snapshot, unless the snapshot is of another one only."""
        moment, state = self._version_at(directory.path, snapshot.seq)
        if state is None or snapshot.volume not in (None, state.volume):
            return None
        return (ImageDirectory if directory.files else SnapshotFile)(state, moment)

    def _version_at(self, path: str, seq: Seq) -> tuple[Moment, VolumeState | None]:
        """The moment, and the volume that had `path` there."""
        known = self._versions.get((path, seq))
        if known is None:
            group = self._group_at(seq)
            known = self._versions[path, seq] = group.moment, group.volumes.get(path)
            if len(self._versions) > CACHED_VERSIONS_MAX:
                self._versions.popitem(last=False)
        return known

    def _refresh_paths(self) -> None:
        paths = self._reader.paths()
        if paths is not self._paths:
            self._paths = paths
            self._children = _children(paths)

    # Below points/

    def _lookup_point(self, name: str, who: int) -> Found:
        self._refresh()
        if name.startswith(TIME_MARK):
            moment, seconds = self._resolve(name[len(TIME_MARK) :], who)
            return Found(MomentDirectory(name, moment, ""), seconds)
        snapshot = self._reader.snapshot(name)
        if snapshot is None or snapshot.volume is not None:
            raise FileNotFoundError(name)
        return self._point(snapshot)

    def _point(self, snapshot: Snapshot) -> Found:
        return Found(MomentDirectory(snapshot.name, self._version_at("", snapshot.seq)[0], ""), NAME_SECONDS)

    def _in_moment(self, directory: MomentDirectory, name: str) -> Node:
        group = self._group_of(directory.moment)
        path = _join(directory.path, name)
        state = group.volumes.get(path)
        if state is not None:
            return SnapshotFile(state, group.moment)
        if any(other.startswith(path + "/") for other in group.volumes):
            return MomentDirectory(directory.name, directory.moment, path)
        raise FileNotFoundError(name)

    # Moments

    def _resolve(self, text: str, who: int, *, files: bool = False) -> tuple[Moment, float]:
        """The recovery point that a TIME names, and for how many seconds that may be remembered."""
        bound = self._bound_walks if files else self._bound
        match parse_time(text).where:
            case Latest() | AtTime(relative=True):
                now = self._clock()
                moment = bound.find(text, who, now)
                if moment is None or not self._is_there(moment):
                    moment = self._reader.resolve(text)
                    bound.bind(text, who, moment, now)
                # Every use must come here, or a process could not be told from the others.
                return moment, 0.0
            case Named():
                return self._reader.resolve(text), NAME_SECONDS
            case AtSeq() | AtTime():
                return self._reader.resolve(text), MOMENT_SECONDS

    def _refresh(self) -> None:
        """Sees what was journalled, and forgets what may have been thinned out."""
        self._reader.refresh()
        if self._reader.rewritten != self._rewritten:
            self._rewritten = self._reader.rewritten
            self._groups.clear()
            self._versions.clear()
            self._cached_states = 0

    def _is_there(self, moment: Moment) -> bool:
        found = self._group_at(moment.seq).moment
        return (found.seq, found.time) == (moment.seq, moment.time)

    def _group_of(self, moment: Moment) -> GroupMoment:
        """The group at exactly that moment. MomentGone."""
        if not self._is_there(moment):
            raise MomentGone(f"group {moment.group}: seq={moment.seq} has been thinned out; look the moment up again")
        return self._group_at(moment.seq)

    def _group_at(self, seq: Seq) -> GroupMoment:
        """The group at the last record at or before `seq`."""
        group = self._groups.get(seq)
        if group is None:
            group = self._reader.group_at(seq)
            self._remember(seq, group)
        self._groups.move_to_end(seq)
        return group

    def _remember(self, seq: Seq, group: GroupMoment) -> None:
        self._groups[seq] = group
        self._cached_states += 1 + len(group.volumes)
        while self._cached_states > CACHED_STATES_MAX and len(self._groups) > 1:
            _, oldest = self._groups.popitem(last=False)
            self._cached_states -= 1 + len(oldest.volumes)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _children(paths: Iterable[str]) -> dict[str, set[str]]:
    """Directory → the names in it, of the directory tree that holds `paths`; always has the top, the empty path."""
    children: dict[str, set[str]] = {"": set()}
    for path in paths:
        while path:
            parent, _, name = path.rpartition("/")
            names = children.setdefault(parent, set())
            if name in names:
                break
            names.add(name)
            path = parent
    return children
