"""Makes `v1-sealed`: one group of format version 1 whose sealed containers say how large their groups are.

Run at commit f144aa7; see README.md of this directory.
"""

from __future__ import annotations

from dedup import layout
from dedup.gc import collect
from dedup.sealed import seal
from dedup.store import Store
from dedup.types import BLOCK_BYTES, ContainerId
from tests.golden.history import History, block, noise
from tests.golden.workshop import bench, keep

GROUP = "main"


def seal_all(store: Store) -> int:
    """Every container that there is; how many."""
    directory = store.path / layout.CONTAINERS_NAME
    found = [layout.container_named(name) for name in store.storage.listdir(directory)]
    containers: list[ContainerId] = sorted(one for one in found if one is not None)
    for container in containers:
        seal(store.storage, directory, container, None)
    return len(containers)


def main() -> None:
    history = History()
    with bench() as path:
        Store.create(path)
        store = Store.open(path)
        group = store.group(GROUP)
        history.agent_starts()
        history.create("vm.img", 70 * BLOCK_BYTES + 100)
        # Groups that compress, one that does not, and a last one of a few blocks.
        history.reconcile("vm.img", 0, b"".join(block(n) for n in range(16)) + noise(1, 18) + block(50) + block(51))
        history.reconcile_ends()
        group.ingest(history.take())
        for turn in range(20):
            history.write("vm.img", (turn * 3) * BLOCK_BYTES + 17, block(100 + turn) + noise(turn % 3 + 2))
            history.flush("vm.img")
        history.bookmark("sealed")
        group.ingest(history.take())
        store.close()
        store = Store.open(path)
        assert seal_all(store) >= 2
        collect(store)
        group = store.group(GROUP)
        history.agent_starts(clean=True)
        for turn in range(5):
            history.write("vm.img", turn * 11 * BLOCK_BYTES, block(turn * 7) + block(200 + turn))
        history.ask("latest", history.flush("vm.img"))
        group.ingest(history.take())
        store.close()
        keep(path, "v1-sealed", {GROUP: history})


if __name__ == "__main__":
    main()
