"""Files of a version that is not known here: a repair refuses the store, and changes nothing of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from dedup import layout, sealed_layout
from dedup.errors import UnknownFormat
from dedup.manifest import Manifest, write_manifest
from dedup.repair import repair
from dedup.retention import Policy, save_policy
from dedup.salvage import found_in, salvage
from dedup.storage import Storage
from dedup.types import BASE_JOURNAL, ContainerId
from replication.verify_cli import verify as verify_command
from tests.dedup.test_repair import Built, build, failed, header, remove_index, sealed


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("newer") / "store")


@pytest.fixture
def built(template: Built, tmp_path: Path) -> Built:
    shutil.copytree(template.path, tmp_path / "store")
    return Built(tmp_path / "store", template.model)


def of_version_2(path: Path, length: int | None = None) -> None:
    """As a newer version would have it: with the checksum of what its head, or all of it, says now."""
    data = path.read_bytes()
    head = data[:8] + b"\2" + data[9:length]
    path.write_bytes(layout.checked(head) + data[len(head) :])


def newer_container(built: Built) -> Path:
    of_version_2(built.container(2), layout.CONTAINER_HEADER.size)
    return built.container(2)


def newer_unnamed_container(built: Built) -> Path:
    shutil.copyfile(built.container(2), built.container(9))
    of_version_2(built.container(9), layout.CONTAINER_HEADER.size)
    return built.container(9)


def newer_form(built: Built) -> Path:
    path, size = built.container(2), layout.CONTAINER_HEADER.size
    data = path.read_bytes()
    path.write_bytes(layout.checked(data[:10] + b"\7" + data[11:size]) + data[size:])
    return path


def larger_groups(built: Built) -> Path:
    sealed(built)
    data, start = built.container(2).read_bytes(), sealed_layout.SEALED_HEADER_OFFSET
    header = sealed_layout.pack_sealed_header(sealed_layout.SealedHeader.of(10, 5, 64))
    built.container(2).write_bytes(data[:start] + header + data[start + len(header) :])
    return built.container(2)


def newer_segment(built: Built) -> Path:
    of_version_2(built.segment, layout.SEGMENT_HEADER.size)
    return built.segment


def newer_manifest(built: Built) -> Path:
    write_manifest(Storage(), built.journal, Manifest())
    of_version_2(built.journal / "MANIFEST")
    return built.journal / "MANIFEST"


def newer_marker(built: Built) -> Path:
    of_version_2(built.path / "STORE", layout.STORE_MARKER.size)
    return built.path / "STORE"


NEWER: list[Callable[[Built], Path]] = [
    newer_container,
    newer_unnamed_container,
    newer_form,
    larger_groups,
    newer_segment,
    newer_manifest,
    newer_marker,
]


def contents(path: Path) -> dict[Path, bytes]:
    """Of every file of the store, but the lock's, which a repair makes, and LMDB's own of readers."""
    files = (file for file in path.rglob("*") if file.is_file() and file.name not in ("lock", "lock.mdb"))
    return {file: file.read_bytes() for file in files}


@pytest.mark.parametrize("make_newer", NEWER, ids=lambda make_newer: make_newer.__name__)
def test_what_a_newer_version_wrote_is_no_damage(built: Built, make_newer: Callable[[Built], Path]) -> None:
    """Nor is anything else repaired, which the newer version may have a reason for: there is no index here."""
    remove_index(built)
    file = make_newer(built)
    before = contents(built.path)
    with pytest.raises(UnknownFormat, match=f"^{file}: .* not known here.*; use a newer version of rewindfs; it is no"):
        repair(built.path, read_data=True, accept_loss=True)
    assert contents(built.path) == before
    assert not (built.path / "quarantine").exists()


def test_the_command_refuses_what_a_newer_version_wrote(built: Built) -> None:
    newer_container(built)
    result = CliRunner().invoke(verify_command, [str(built.path), "--repair"])
    assert result.exit_code == 1 and isinstance(result.exception, UnknownFormat)


def test_a_salvage_refuses_what_a_newer_version_wrote(built: Built) -> None:
    """Whoever asks for it."""
    path, number = newer_container(built), ContainerId(2)
    before = contents(built.path)
    with pytest.raises(UnknownFormat):
        salvage(Storage(), path.parent, number, BASE_JOURNAL, {}, lambda mark: None, lambda old: None)
    with pytest.raises(UnknownFormat):
        found_in(Storage(), path.parent, number, {bytes(16)})
    assert contents(built.path) == before


def test_a_newer_policy_stays_and_is_named(built: Built) -> None:
    save_policy(Storage(), built.path, Policy())
    line = (built.path / "policy").read_bytes().partition(b"\n")[0].replace(b'"version":1', b'"version":2') + b"\n"
    newer = line + f"{layout.checksum(line):016x}\n".encode()
    (built.path / "policy").write_bytes(newer)
    header(built)
    report = repair(built.path)
    assert failed(report) == {"policy"} and report.repaired == 1
    assert "use a newer one" in report.checks[-1].damage[0].what
    assert (built.path / "policy").read_bytes() == newer
