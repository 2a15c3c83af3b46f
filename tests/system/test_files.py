"""The files inside images: `browse --files`, over real file systems and real stores."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from dedup.layout import RAW_SLOTS_OFFSET
from fusefs.mountpoint import mounts
from tests.system.harness import World, digest, missing_tools
from tests.system.inside_images import KINDS, Kind, check_shown, make_image, mounted

pytestmark = pytest.mark.skipif(
    bool(missing_tools(["mkfs.xfs", "mkfs.btrfs", "mkfs.ntfs", "mkfs.vfat", "mcopy", "sfdisk"])),
    reason="the tools that make file systems are not installed (make test installs them)",
)
EXT4 = next(kind for kind in KINDS if kind.name == "ext4")
FAT16 = next(kind for kind in KINDS if kind.name == "fat16")


def show(world: World, *options: str) -> Path:
    """Mounts the store with the files inside; returns files/."""
    world.rewindfs("browse", "--files", world.store, world.snap, "--log-file", world.directory / "browse.log", *options)
    return world.snap / "files"


def keep(world: World) -> None:
    """Takes the source into the store, as it is."""
    world.mount()
    world.unmount()


def browse_log(world: World) -> str:
    return (world.directory / "browse.log").read_text()


def mount_options(world: World) -> set[str]:
    mount = next(line for line in Path("/proc/mounts").read_text().splitlines() if str(world.snap) in line)
    return set(mount.split()[3].split(","))


def check_kinds(world: World, kinds: list[Kind], names: int) -> None:
    """Images of some file systems, shown as the kernel or who made them shows them."""
    trees = {}
    for kind in kinds:
        image = world.source / "deep" / f"{kind.name}.img"
        trees[kind.name] = make_image(world, kind, image, names=names)
    keep(world)
    files = show(world)
    assert sorted(os.listdir(files / "deep")) == sorted(f"{kind.name}.img" for kind in kinds)
    for kind in kinds:
        shown = files / "deep" / f"{kind.name}.img" / "@latest"
        if kind.mount is None:
            assert check_shown(shown, trees[kind.name], unix=False) > names
        else:
            with mounted(world, kind, world.source / "deep" / f"{kind.name}.img", "-r") as place:
                assert check_shown(shown, place, unix=kind.unix) > 0.9 * names
        assert "user.rewindfs.dirty" not in os.listxattr(shown), kind.name


def test_file_systems_are_shown_as_they_are(world: World) -> None:
    check_kinds(world, [kind for kind in KINDS if kind.usual], 80)
    files = world.snap / "files/deep"
    one = files / "ext4.img/@latest"
    assert os.stat(one / "one").st_ino == os.stat(one / "deep/same as one").st_ino
    assert os.stat(one / "one").st_ino != os.stat(files / "ext3.img/@latest/one").st_ino
    options = mount_options(world)
    assert {"ro", "nosuid", "nodev"} <= options and "default_permissions" not in options


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_long_directories(world: World, kind: Kind) -> None:
    roomy = replace(kind, mebibytes=max(160, kind.mebibytes)) if kind.name != "fat12" else kind
    check_kinds(world, [roomy], 10_000 if kind.usual and kind.unix else 1000)


def listed(place: Path) -> list[str]:
    """The names before the end of a listing, or before its error."""
    found = []
    with suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            found.append(entry.name)
    return found


def test_partitions_are_directories(world: World) -> None:
    parts = {}
    for kind in (EXT4, FAT16):
        parts[kind.name] = world.directory / f"{kind.name}.part"
        make_image(world, kind, parts[kind.name], names=20)
    tables = {
        "gpt.img": ("label: gpt\nsize=24M\nsize=1M\nsize=24M\nsize=1M\n", {"p1": EXT4, "p3": FAT16}),
        "mbr.img": (
            "label: dos\n1: size=24M, type=83\n2: size=60M, type=5\n5: size=24M, type=6\n6: size=1M, type=83\n",
            {"p1": EXT4, "p5": FAT16},
        ),
    }
    for name, (table, places) in tables.items():
        image = world.source / name
        with open(image, "xb") as file:
            file.truncate(100 << 20)
        world.run("sfdisk", "-q", image, stdin=table)
        table = json.loads(world.run("sfdisk", "--json", image).stdout)["partitiontable"]["partitions"]
        starts = {f"p{entry['node'].removeprefix(str(image)).lstrip('p')}": entry["start"] * 512 for entry in table}
        with open(image, "r+b") as file:
            for place, kind in places.items():
                file.seek(starts[place])
                file.write(parts[kind.name].read_bytes())
        if "p4" in starts:
            with open(image, "r+b") as file:  # something is there, and it is damaged
                file.seek(starts["p4"])
                file.write(b"XFSB")
    keep(world)
    files = show(world)
    with pytest.raises(OSError, match="Input/output"):
        os.listdir(files / "gpt.img/@latest")
    with pytest.raises(OSError, match="Input/output"):
        os.listdir(files / "gpt.img/@latest/p4")
    assert "gpt.img at seq=" in browse_log(world) and "they cannot be read: p4\n" in browse_log(world)
    for name, (_, places) in tables.items():
        shown = files / name / "@latest"
        assert sorted(listed(shown)) == sorted(places)
        assert b"no file system that is known" in os.getxattr(shown, "user.rewindfs.refused")
        for place, kind in places.items():
            tree = world.directory / f"tree-{kind.name}"
            for path in ("large", "deep/er/still/file", "Grüße – ünï.txt"):
                assert (shown / place / path).read_bytes() == (tree / path).read_bytes()


def test_a_deleted_file_comes_back_while_the_writer_goes_on(world: World, source: Path) -> None:
    world.mount("async")
    disk = world.loop_mount(world.mnt / "disk.img")
    wanted = random.Random(7).randbytes(1_234_567)
    (disk / "papers").mkdir()
    (disk / "papers" / "thesis").write_bytes(wanted)
    os.chown(disk / "papers" / "thesis", 1000, 1000)
    world.run("sync", "-f", disk)
    world.rewindfs("bookmark", world.mnt, "before")
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            (disk / f"other-{number % 20}").write_bytes(os.urandom(50_000))
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        (disk / "papers" / "thesis").unlink()
        world.run("sync", "-f", disk)
        world.rewindfs("bookmark", world.mnt, "after")
        files = show(world)
        assert os.listdir(files / "disk.img/@after/papers") == []
        world.run("cp", "-p", files / "disk.img/@before/papers/thesis", disk / "papers")
    finally:
        stop.set()
        writer.join()
    assert (disk / "papers" / "thesis").read_bytes() == wanted
    assert (disk / "papers" / "thesis").stat().st_uid == 1000
    # The file system was mounted all the time: its journal is read, and nothing is missing.
    assert "user.rewindfs.dirty" not in os.listxattr(files / "disk.img/@before")
    world.loop_unmount(disk)


def test_what_only_the_journal_holds_is_there(world: World) -> None:
    """Moments of ext file systems in use, beside what the kernel makes of a copy."""
    options = {"64bit.img": (), "old.img": ("-O", "^metadata_csum,^64bit"), "ext3.img": ("-t", "ext3", "-b", "1024")}
    for name, given in options.items():
        with open(world.source / name, "xb") as file:
            file.truncate(24 << 20)
        world.run("mkfs.ext4", "-q", "-F", "-J", "size=4", *given, world.source / name)
    world.mount("async")
    chance = random.Random(3)
    for name in options:
        disk = world.loop_mount(world.mnt / name)
        for turn in range(6):
            place = disk / f"turn-{turn}"
            place.mkdir()
            for number in range(15):
                # Blocks that look like the journal's own are escaped in it.
                start = b"\xc0\x3b\x39\x98" if number % 3 else b""
                (place / f"file-{number}").write_bytes(start + chance.randbytes(chance.randrange(9000)))
            if turn % 3 == 2:
                # What was a directory and is something else now is revoked.
                world.run("rm", "-r", disk / f"turn-{turn - 1}")
            with open(place / "file-0", "rb") as file:
                os.fsync(file.fileno())
        world.ask("durable")
        world.rewindfs("bookmark", world.mnt, name)
    files = show(world)
    for name in options:
        copy = world.directory / f"copy-{name}"
        world.run("cp", "--sparse=always", world.snap / "volumes" / name / f"@{name}", copy)
        said = world.run("dumpe2fs", "-h", copy).stdout
        assert "needs_recovery" in said
        with mounted(world, Kind(name, ()), copy) as place:
            assert check_shown(files / name / f"@{name}", place, unix=True) > 50
    for disk in list(world._loop_mounts):
        world.loop_unmount(disk)


def test_what_is_not_read_is_said(world: World) -> None:
    (world.source / "junk.bin").write_bytes(os.urandom(100_000))
    (world.source / "empty.bin").touch()
    for name, options in (("meta_bg.img", ("-O", "meta_bg,^resize_inode")), ("fast.img", ("-O", "fast_commit"))):
        with open(world.source / name, "xb") as file:
            file.truncate(16 << 20)
        world.run("mkfs.ext4", "-q", "-F", *options, world.source / name)
    xfs = next(kind for kind in KINDS if kind.name == "xfs")
    make_image(world, xfs, world.source / "xfs.img", names=10)
    with mounted(world, xfs, world.source / "xfs.img") as place:
        (place / "new").write_bytes(b"new")
        world.run("sync", "-f", place)
        world.run("cp", "--sparse=always", world.source / "xfs.img", world.source / "unclean.img")
        world.run("fsfreeze", "-f", place)
        world.run("cp", "--sparse=always", world.source / "xfs.img", world.source / "frozen.img")
        world.run("fsfreeze", "-u", place)
    ext2 = next(kind for kind in KINDS if kind.name == "ext2")
    make_image(world, ext2, world.source / "clean.ext2", names=10)
    with mounted(world, ext2, world.source / "clean.ext2") as place:
        (place / "new").write_bytes(b"new")
        world.run("sync", "-f", place)
        world.run("cp", "--sparse=always", world.source / "clean.ext2", world.source / "unclean.ext2")
    keep(world)
    world.rewindfs("browse", world.store, world.snap)
    assert sorted(os.listdir(world.snap)) == ["points", "volumes"]
    world.run("fusermount3", "-u", world.snap)

    files = show(world)
    for name in ("junk.bin", "empty.bin"):
        shown = files / name / "@latest"
        assert os.listdir(shown) == []
        assert not (shown / "etc").exists()
        assert "no file system" in os.getxattr(shown, "user.rewindfs.refused").decode()
        assert browse_log(world).count(f"{name} at seq=") == 1
    # What is there and is not read is no empty directory: who copies it must be told.
    for name, why in (("meta_bg.img", "meta_bg"), ("unclean.img", "rewindfs clone")):
        shown = files / name / "@latest"
        assert why in os.getxattr(shown, "user.rewindfs.refused").decode()
        for look in (os.listdir, lambda place: os.stat(place / "etc")):
            with pytest.raises(OSError, match="Input/output"):
                look(shown)
        assert f"{name} at seq=" in browse_log(world) and why in browse_log(world)
    assert os.listdir(files / "fast.img/@latest") == ["lost+found"]
    unclean = files / "unclean.ext2/@latest"
    assert "not cleanly unmounted" in os.getxattr(unclean, "user.rewindfs.dirty").decode()
    assert (unclean / "new").read_bytes() == b"new"
    assert "clone it" in browse_log(world)
    assert (files / "frozen.img/@latest/new").read_bytes() == b"new"
    for name in ("xfs.img", "frozen.img"):
        with pytest.raises(OSError, match="No data"):
            os.getxattr(files / name / "@latest", "user.rewindfs.dirty")
    world.run("fusermount3", "-u", world.snap)
    for option in ("suid", "dev"):
        refusal = world.refused("browse", "--files", "-o", f"noatime,{option}", world.store, world.snap)
        assert refusal.startswith(f"-o {option}: not with --files")


def test_others_are_held_to_the_modes_inside(world: World) -> None:
    make_image(world, EXT4, world.source / "disk.img", names=3)
    with mounted(world, EXT4, world.source / "disk.img") as place:
        (place / "one").chmod(0o600)
        (place / "deep").chmod(0o700)
    world.run("cp", "--sparse=always", world.source / "disk.img", world.source / "private.img")
    (world.source / "private.img").chmod(0o640)
    keep(world)
    shown = show(world, "--allow-other") / "disk.img/@latest"
    assert {"default_permissions", "allow_other"} <= mount_options(world)
    for parent in (world.snap, *world.snap.parents):
        if parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(parent.stat().st_mode | 0o005)
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    world.run(*nobody, "cmp", shown / "page", shown / "page")
    private = world.snap / "files/private.img/@latest/page"
    for file in (shown / "one", shown / "deep/er/still/file", private):
        assert file.read_bytes()
        assert "Permission denied" in world.run(*nobody, "cat", file, check=False).stderr


def test_damage_is_an_error_of_that_file_only(world: World) -> None:
    tree = make_image(world, EXT4, world.source / "disk.img", names=10)
    world.run("debugfs", "-w", "-R", "clri empty", world.source / "disk.img")
    keep(world)
    block = (tree / "large").read_bytes()[400 * 4096 : 401 * 4096]
    (container,) = [path for path in world.store.rglob("*") if path.is_file() and block in path.read_bytes()]
    data = bytearray(container.read_bytes())
    at = data.index(block)
    assert at >= RAW_SLOTS_OFFSET
    data[at] ^= 1
    container.write_bytes(data)
    shown = show(world) / "disk.img/@latest"
    with pytest.raises(OSError, match="Input/output"):
        (shown / "large").read_bytes()
    for name in ("page", "one", "pieces"):
        assert (shown / name).read_bytes() == (tree / name).read_bytes()
    assert "disk.img at seq=" in browse_log(world)
    # An inode that is none: the names beside it are listed, and then that one is missing.
    with pytest.raises(OSError, match="Input/output"):
        os.listdir(shown)
    names = set(listed(shown))
    assert {"one", "page", "pieces", "many", "link"} <= names and "empty" not in names
    with pytest.raises(OSError, match="Input/output"):
        os.stat(shown / "empty")
    assert "disk.img at seq=" in browse_log(world) and "they cannot be read: empty\n" in browse_log(world)
    assert re.search(r"/empty: inode \d+ is not in use", browse_log(world))


def walk_all(top: Path) -> tuple[int, int]:
    """Reads everything below; how much there was, and how often it was an error."""
    good = bad = 0
    waiting = [top]
    while waiting:
        place = waiting.pop()
        try:
            names = os.listdir(place)
        except OSError as error:
            assert error.errno == 5, error
            bad += 1
            continue
        for name in names:
            try:
                if (place / name).is_symlink():
                    os.readlink(place / name)
                elif (place / name).is_dir():
                    waiting.append(place / name)
                else:
                    with open(place / name, "rb") as file:
                        for _ in range(6):  # a size is a number like others: it may be any
                            if not file.read(1 << 20):
                                break
                good += 1
            except OSError as error:
                assert error.errno == 5, error
                bad += 1
        assert good < 100_000
    return good, bad


def damaged_images(world: World, seeds: range) -> list[str]:
    """Images with bytes changed where their structures are, each with a seed of its own."""
    names = []
    made: dict[str, bytes] = {}
    for seed in seeds:
        chance = random.Random(seed)
        kind = chance.choice([kind for kind in KINDS if kind.mebibytes <= 40])
        if kind.name not in made:
            make_image(world, kind, world.directory / f"{kind.name}.img", names=30)
            made[kind.name] = (world.directory / f"{kind.name}.img").read_bytes()
        data = bytearray(made[kind.name])
        used = [at for at in range(0, len(data), 4096) if any(data[at : at + 4096])]
        for _ in range(chance.choice([5, 50, 500])):
            data[chance.choice(used[: len(used) // 2 + 1]) + chance.randrange(4096)] ^= 1 << chance.randrange(8)
        names.append(f"{seed}-{kind.name}.img")
        (world.source / names[-1]).write_bytes(data)
    return names


def check_damaged(world: World, seeds: range) -> None:
    names = damaged_images(world, seeds)
    (world.source / "sound.bin").write_bytes(os.urandom(300_000))
    keep(world)
    files = show(world)
    found = []
    for name in names:
        found.append(walk_all(files / name / "@latest"))
        assert digest(world.snap / "volumes/sound.bin/@latest") == digest(world.source / "sound.bin")
    assert sum(good for good, _ in found) > 0
    assert "unexpectedly" not in browse_log(world)
    assert any(mount.path == world.snap for mount in mounts())


def test_damaged_images_are_errors_and_no_more(world: World) -> None:
    check_damaged(world, range(3))


@pytest.mark.slow
def test_many_damaged_images(world: World) -> None:
    check_damaged(world, range(100, 160))


def test_without_the_extra_it_says_what_to_install(world: World) -> None:
    program = (
        "import sys; from fusefs.cli import main; sys.modules['dissect'] = None; "
        f"sys.argv[1:] = ['browse', '--files', {str(world.store)!r}, {str(world.snap)!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], env=world.environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("rewindfs: error: --files: ") and "rewindfs[files]" in done.stderr
    assert not any(mount.path == world.snap for mount in mounts())
