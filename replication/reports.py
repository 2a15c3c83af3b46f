"""What a store says about itself, alike from its own files and from afar: its points, its snapshots, a volume's map.

A report is a document: a head, and the rows of its lists, which may be long. From afar it comes in pages, each made
anew beside the second appliance from its store's files (command `report`, report_process.py).

Invariants: a page is less than PAGE_BYTES, whatever the store holds; what a report is about does not change from one
page to the next (`map` is of one seq), but `points` and `snapshots` may grow while they are fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec

from dedup.errors import UnknownName
from dedup.moment import rfc3339
from dedup.points_report import points_json, points_of_volume
from dedup.reader import StoreReader
from dedup.snapshot_list import listed_snapshots
from dedup.snapshot_map import snapshot_map
from dedup.store_report import store_document
from dedup.timeline import span_of, timeline_json, timeline_of
from replication.address import store_path
from replication.control_messages import Role
from replication.errors import ProtocolError
from replication.route import Route
from replication.store_command import ask

PAGE_BYTES: Final = 256 << 10
"""About how much a page carries: a quarter of what a Reply may."""
PAGE_ROWS: Final = 4096

Row = tuple[str, object]
"""The name of the list, and what is added to it."""


@dataclass(frozen=True, slots=True)
class Report:
    """`rows` can be gone through once."""

    head: dict[str, Any]
    rows: Iterable[Row]

    def document(self) -> dict[str, Any]:
        """All of it at once; a list without rows is empty where the head has it."""
        whole = dict(self.head)
        for name, row in self.rows:
            whole.setdefault(name, []).append(row)
        return whole


@dataclass(frozen=True, slots=True)
class Subject:
    """What a report is about. `group` None: the only one, or all where that makes sense."""

    kind: str
    group: str | None = None
    volume: str | None = None
    at: str = "latest"
    since: str | None = None
    until: str | None = None
    buckets: int = 0


def make_report(store: StoreReader, subject: Subject) -> Report:
    """The report on an open store. Its rows read the store while they are gone through. UnknownName, MomentRefused."""
    make = _KINDS.get(subject.kind)
    if make is None:
        raise UnknownName(f"there is no report {subject.kind!r}; there are {', '.join(sorted(_KINDS))}")
    return make(store, subject)


def make_page(path: Path, subject: Subject, start: int) -> dict[str, object]:
    """The page from row `start` on: {"head", "rows": [[list, row], …], "next": where the next one starts, or null}.

    Reads the store; not for the process that writes it.
    """
    store = StoreReader.open(path)
    try:
        report = make_report(store, subject)
        rows: list[list[object]] = []
        nbytes = 0
        more = islice(report.rows, start, None)
        for name, row in more:
            rows.append([name, row])
            nbytes += len(msgspec.msgpack.encode(row))
            if nbytes >= PAGE_BYTES or len(rows) >= PAGE_ROWS:
                break
        ended = next(iter(more), None) is None
        return {"head": report.head, "rows": rows, "next": None if ended else start + len(rows)}
    finally:
        store.close()


@contextmanager
def open_report(address: str, subject: Subject, route: Route = Route()) -> Iterator[Report]:  # noqa: B008
    """The report on the store at a path, or on that of the appliance at an address."""
    path = store_path(address)
    if path is None:
        yield paged(partial(_page_from, address, subject, route))
        return
    store = StoreReader.open(path)
    try:
        yield make_report(store, subject)
    finally:
        store.close()


def _page_from(address: str, subject: Subject, route: Route, start: int) -> dict[str, Any]:
    return ask(address, subject.group, "report", {**asdict(subject), "start": start}, route, role=Role.READER)


def paged(page: Callable[[int], dict[str, Any]]) -> Report:
    """The report whose pages `page` gives, by the row that each begins with. Raises ProtocolError for what is none."""
    first = page(0)
    head = first.get("head")
    if not isinstance(head, dict):
        raise ProtocolError("the appliance's reply to report has no head")
    return Report(head, _rows_of(page, first))


def _rows_of(page: Callable[[int], dict[str, Any]], one: dict[str, Any]) -> Iterator[Row]:
    at = 0
    while True:
        rows, following = one.get("rows"), one.get("next")
        if not isinstance(rows, list):
            raise ProtocolError("the appliance's reply to report has no rows")
        for row in rows:
            if not isinstance(row, list) or len(row) != 2 or not isinstance(row[0], str):
                raise ProtocolError("the appliance's reply to report has a row that is none")
            yield row[0], row[1]
        if following is None:
            return
        if not isinstance(following, int) or following <= at:
            raise ProtocolError(f"the appliance's reply to report goes on at {following} after {at}")
        at = following
        one = page(at)


# --- the reports ---


def _points(store: StoreReader, subject: Subject) -> Report:
    group = store.group(subject.group)
    found = group.points()
    if subject.volume is not None:
        found = points_of_volume(store, group, found, subject.volume)
    document = points_json(found, subject.volume)
    return _split(document, ("ranges", "gaps", "bookmarks"))


def _timeline(store: StoreReader, subject: Subject) -> Report:
    """The buckets are of one pass, so they are in the head: there are at most BUCKETS_MAX."""
    group = store.group(subject.group)
    group.refresh()
    span = span_of(group, subject.since, subject.until)
    if span is None:
        return Report({"timeline": None, "snapshots": []}, ())
    since, until = span
    found = timeline_of(group, since, until, subject.buckets, subject.volume)
    named = (
        {"name": one.name, "seq": one.seq, "time": rfc3339(one.time), "kind": one.kind}
        for one in group.snapshots()
        if since <= one.time <= until
    )
    return Report({"timeline": timeline_json(found), "snapshots": []}, (("snapshots", one) for one in named))


def _snapshots(store: StoreReader, subject: Subject) -> Report:
    """Rows `snapshots`, each followed by the `volumes` of it: a group may have more volumes than fit into a page."""
    names = store.groups() if subject.group is None else [subject.group]

    def rows() -> Iterator[Row]:
        for name in names:
            for snapshot in listed_snapshots(store.group(name)):
                volumes = snapshot.pop("volumes")
                yield "snapshots", snapshot
                assert isinstance(volumes, list)
                for volume in volumes:
                    yield "volumes", volume

    return Report({"groups": names}, rows())


def whole_snapshots(report: Report) -> Iterator[dict[str, Any]]:
    """The snapshots of a report on them, each with its volumes again, as they come."""
    snapshot: dict[str, Any] | None = None
    for name, row in report.rows:
        assert isinstance(row, dict)
        if name == "volumes" and snapshot is not None:
            snapshot["volumes"].append(row)
            continue
        if snapshot is not None:
            yield snapshot
        keep_until = row.pop("keep_until", None)
        snapshot = {**row, "volumes": [], "keep_until": keep_until}
    if snapshot is not None:
        yield snapshot


def _map(store: StoreReader, subject: Subject) -> Report:
    group = store.group(subject.group)
    moment = group.resolve(subject.at)
    volume = group.group_at(moment.seq).volume(subject.volume or "")
    head = {"volume": volume.path, "seq": moment.seq, "time": rfc3339(moment.time), "size": volume.size}
    return Report(head, (("ranges", asdict(one)) for one in snapshot_map(store, group, volume, moment.seq)))


def _store(store: StoreReader, subject: Subject) -> Report:
    return _split(store_document(store, subject.group), ("groups",))


def _split(document: dict[str, object], lists: tuple[str, ...]) -> Report:
    """The document as a head, whose lists are empty, and their rows."""
    head = {key: [] if key in lists else value for key, value in document.items()}
    rows = [(name, row) for name in lists for row in _list(document[name])]
    return Report(head, rows)


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


_KINDS: Final[dict[str, Callable[[StoreReader, Subject], Report]]] = {
    "points": _points,
    "timeline": _timeline,
    "snapshots": _snapshots,
    "map": _map,
    "store": _store,
}
