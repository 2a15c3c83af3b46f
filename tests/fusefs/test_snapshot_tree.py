"""The snapshot mount's paths: what exists, what is listed, what a name leads to, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dedup.errors import BadTime, MomentRefused, UnknownName
from dedup.reader import GroupReader
from dedup.types import Moment, PointKind, Seq, TimeNs
from fusefs.bound_names import BINDINGS_MAX, BoundNames
from fusefs.snapshot_inodes import ROOT_NUMBER, SnapshotInodes
from fusefs.snapshot_tree import (
    Directory,
    ImageDirectory,
    MomentDirectory,
    Node,
    Root,
    SnapshotFile,
    SnapshotTree,
    VersionsDirectory,
)
from tests.fusefs.snapshot_history import History


class World:
    def __init__(self, path: Path) -> None:
        self.history = History(path)
        # The writer's own: LMDB opens an index once per process.
        self.reader: GroupReader = self.history.group.reader()
        self.now = 0.0
        self.tree = SnapshotTree(self.reader, clock=lambda: self.now)

    def close(self) -> None:
        self.history.close()

    def walk(self, path: str, who: int = 0) -> Node:
        node: Node = Root()
        for name in path.split("/"):
            assert not isinstance(node, SnapshotFile)
            node = self.tree.lookup(node, name, who=who).node
        return node

    def file(self, path: str, who: int = 0) -> SnapshotFile:
        node = self.walk(path, who)
        assert isinstance(node, SnapshotFile)
        return node

    def directory(self, path: str) -> Directory:
        node = self.walk(path)
        assert not isinstance(node, SnapshotFile)
        return node

    def names(self, path: str) -> list[str]:
        return [entry[0] for entry in self.tree.listing(self.directory(path)) if entry is not None]

    def everything(self) -> dict[str, SnapshotFile]:
        """Every file that is listed, by path."""
        found: dict[str, SnapshotFile] = {}
        pending: list[tuple[str, Directory]] = [("", Root())]
        while pending:
            path, directory = pending.pop()
            for name, entry in filter(None, self.tree.listing(directory)):
                assert self.tree.lookup(directory, name).node.key == entry.node.key
                if isinstance(entry.node, SnapshotFile):
                    found[path + name] = entry.node
                else:
                    pending.append((f"{path}{name}/", entry.node))
        return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "store")
    yield world
    world.close()


def test_what_is_listed_is_every_snapshot_of_every_volume_and_nothing_else(world: World) -> None:
    moments = {"base": 2, **world.history.moments}
    whole = {name: seq for name, seq in moments.items() if name != "only-disk"}
    expected = {f"points/{name}/{path}" for name, seq in whole.items() for path in world.history.paths(seq)}
    expected |= {f"volumes/{path}/{name}" for name, seq in whole.items() for path in world.history.paths(seq)}
    expected.add("volumes/disk.img/only-disk")
    # A subdirectory has the name of this one: it is under points/ only.
    expected.remove("volumes/both/x.img")
    found = world.everything()
    assert found.keys() == expected
    for path, file in found.items():
        name, volume = (path.split("/")[-1], path[8:].rpartition("/")[0]) if path[0] == "v" else path.split("/", 2)[1:]
        assert file.moment.seq == moments[name]
        content = world.history.content(moments[name], volume)
        assert content is not None
        assert file.state.size == len(content)
        image = world.reader.image(file.state.volume, file.moment.seq)
        assert image.read(0, image.size) == content


def test_a_path_is_whichever_volume_had_it(world: World) -> None:
    history = world.history
    assert world.file("volumes/vm/a.img/early").state.volume == history.first
    assert world.file("volumes/vm/a.img/late").state.volume == history.second
    assert world.file("volumes/vm/b.img/late").state.volume == history.first
    assert world.file("points/late/vm/b.img") == world.file("volumes/vm/b.img/late")
    with pytest.raises(FileNotFoundError):
        world.walk("volumes/vm/b.img/early")
    with pytest.raises(UnknownName, match="no volume had the path vm/b.img at seq="):
        world.walk("volumes/vm/b.img/@early")
    with pytest.raises(FileNotFoundError):
        world.walk("points/late/deep")


def test_attributes_are_those_of_the_moment(world: World) -> None:
    early = world.file("volumes/vm/a.img/early")
    assert (early.state.mode, early.state.uid, early.state.gid) == (0o640, 1234, 5678)
    assert early.moment.kind is PointKind.CRASH
    assert world.file("points/marked/disk.img").moment.kind is PointKind.BOOKMARK
    assert world.file("volumes/disk.img/@seq=5").moment.time == world.reader.resolve("seq=5").time


def test_every_moment_is_found_by_name(world: World) -> None:
    history = world.history
    for seq in range(3, history.model.seq + 1):
        for path in history.paths(seq):
            for file in (world.file(f"volumes/{path}/@seq={seq}"), world.file(f"points/@seq={seq}/{path}")):
                content = history.content(seq, path)
                assert content is not None
                assert (file.moment.seq, file.state.size) == (seq, len(content))


def test_refusals_say_why(world: World) -> None:
    refused = world.history.refused_write()
    with pytest.raises(MomentRefused, match="in a gap"):
        world.walk(f"volumes/disk.img/@seq={refused}")
    with pytest.raises(MomentRefused, match="after the last"):
        world.walk("points/@seq=9999")
    with pytest.raises(UnknownName):
        world.walk("points/@no-such-name")
    with pytest.raises(BadTime):
        world.walk("volumes/disk.img/@")
    for path in ("nonsense", "volumes/nonsense", "volumes/disk.img/nonsense", "points/nonsense", "volumes/@latest"):
        with pytest.raises(FileNotFoundError):
            world.walk(path)
    # The bookmark cannot be reached with the name of a limited snapshot, nor that under points/.
    with pytest.raises(FileNotFoundError):
        world.walk("points/only-disk")
    with pytest.raises(FileNotFoundError):
        world.walk("volumes/vm/a.img/only-disk")


def test_new_snapshots_and_paths_appear_and_deleted_ones_go(world: World) -> None:
    history = world.history
    assert "fresh" not in world.names("points")
    history.group.ingest([history.model.create("new/disk", 7)])
    history.snapshot("fresh")
    assert "fresh" in world.names("points")
    assert world.names("volumes/new/disk") == ["fresh"]
    assert world.file("volumes/new/disk/fresh").state.size == 7
    history.group.delete_snapshot("fresh")
    with pytest.raises(FileNotFoundError):
        world.walk("points/fresh")
    history.store.checkpoint()
    assert world.names("volumes/new/disk") == []


def test_relative_names_stay_bound_and_then_follow(world: World) -> None:
    history, latest = world.history, "volumes/disk.img/@latest"
    old = history.model.seq
    assert world.file(latest, who=1).moment.seq == old
    history.write(history.disk, 0, 100)
    new = history.model.seq
    world.now = 1.5
    assert world.file(latest, who=1).moment.seq == old
    assert world.file("points/@latest/disk.img", who=2).moment.seq == old
    world.now = 2.5
    assert world.file(latest, who=2).moment.seq == old  # keeps what it saw at 1.5 until 3.5
    assert world.file(latest, who=1).moment.seq == new
    world.now = 3.6
    assert world.file(latest, who=2).moment.seq == new
    found = world.tree.lookup(world.directory("volumes/disk.img"), "@latest")
    assert found.seconds == 0


def test_files_has_the_names_of_volumes(world: World) -> None:
    assert [entry[0] for entry in world.tree.listing(Root()) if entry] == ["volumes", "points"]
    with pytest.raises(FileNotFoundError):
        world.walk("files")
    world.tree = SnapshotTree(world.reader, clock=lambda: world.now, files=True)
    assert [entry[0] for entry in world.tree.listing(Root()) if entry] == ["volumes", "points", "files"]
    for path in ("", "/vm", "/vm/a.img", "/disk.img", "/both", "/deep"):
        assert world.names(f"files{path}") == world.names(f"volumes{path}") != []
    for path in ("vm/a.img/early", "disk.img/@late", "disk.img/@latest", "both/x.img/late"):
        image, file = world.walk(f"files/{path}"), world.file(f"volumes/{path}")
        assert isinstance(image, ImageDirectory)
        assert (image.state, image.moment) == (file.state, file.moment) and image.key != file.key
    with pytest.raises(UnknownName):
        world.walk("files/both/x.img/@early")


def test_points_under_a_moving_name_are_directories_of_their_own(world: World) -> None:
    first = world.walk("points/@latest")
    world.history.write(world.history.disk, 0, 100)
    world.now = 10.0
    second = world.walk("points/@latest")
    assert isinstance(first, MomentDirectory) and isinstance(second, MomentDirectory)
    assert first.key != second.key
    assert world.tree.lookup(first, "disk.img").node.key != world.tree.lookup(second, "disk.img").node.key
    assert world.walk("points/late").key != world.walk(f"points/@seq={world.history.moments['late']}").key


def test_who_walks_keeps_one_moment() -> None:
    bound, moment, later = (
        BoundNames(walks=True),
        Moment("g", Seq(1), TimeNs(1), PointKind.CRASH),
        Moment("g", Seq(9), TimeNs(9), PointKind.CRASH),
    )
    bound.bind("latest", 1, moment, 0.0)
    for now in (1.0, 50.0, 100.0, 159.0):
        assert bound.find("latest", 1, now) == moment
    assert bound.find("latest", 2, 3.0) is None  # another process, after everyone's two seconds
    bound.bind("latest", 2, later, 3.0)
    assert bound.find("latest", 1, 160.0) == moment and bound.find("latest", 2, 62.0) == later
    assert bound.find("latest", 1, 221.0) is None


def test_bindings_are_bounded() -> None:
    bound = BoundNames()
    moment = Moment("g", Seq(1), TimeNs(1), PointKind.CRASH)
    for who in range(2 * BINDINGS_MAX):
        bound.bind("latest", who, moment, 0.0)
    assert bound.find("latest", 0, 1.0) == moment  # from everyone's
    assert len(bound._bindings) == BINDINGS_MAX
    assert bound.find("latest", 2 * BINDINGS_MAX - 1, 2.0) is None


def test_inodes_live_as_long_as_the_kernel_refers_to_them() -> None:
    inodes = SnapshotInodes()
    number = inodes.number(VersionsDirectory("a"))
    inodes.refer(number)
    inodes.refer(number)
    assert inodes.number(VersionsDirectory("a")) == number
    inodes.forget(number, 1)
    assert inodes.node(number) == VersionsDirectory("a")
    inodes.forget(number, 1)
    with pytest.raises(OSError, match="[Ss]tale"):
        inodes.node(number)
    assert inodes.number(VersionsDirectory("a")) > number
    inodes.forget(ROOT_NUMBER, 5)
    assert inodes.node(ROOT_NUMBER) == Root()
