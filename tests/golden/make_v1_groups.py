"""Makes `v1-groups`: a store of format version 1 with four groups, closed cleanly.

Two that share blocks, the second of which ends in an open gap; one whose base is still being made; one without any
record.
Run at commit 48cb251; see README.md of this directory.
"""

from __future__ import annotations

from dedup.store import Store
from dedup.types import BLOCK_BYTES
from tests.golden.history import History, block, noise
from tests.golden.workshop import bench, keep


def main() -> None:
    alpha, beta, unready = History(), History(), History()
    with bench() as path:
        Store.create(path)
        store = Store.open(path)
        for history, name in ((alpha, "alpha"), (beta, "beta-2.x_y")):
            history.agent_starts()
            history.create("vm.img", 20 * BLOCK_BYTES)
            history.reconcile("vm.img", 0, b"".join(block(n) for n in range(10)))
            history.reconcile_ends()
            store.group(name).ingest(history.take())
        store.checkpoint()
        for turn in range(6):
            for history, name in ((alpha, "alpha"), (beta, "beta-2.x_y")):
                history.write("vm.img", (turn + 3) * BLOCK_BYTES, block(turn * 2) + noise(turn % 3))
                history.write("vm.img", turn * 5000, b"%s %d" % (name.encode(), turn))
                history.ask(name, history.bookmark(name)) if turn == 3 else history.flush("vm.img")
                store.group(name).ingest(history.take())
            if turn % 2:
                store.checkpoint()
        alpha.ask("latest", alpha.seq)
        alpha.refuse("beta-2.x_y", "has no bookmark or snapshot")
        last = beta.seq
        beta.agent_starts()
        beta.write("vm.img", 0, b"never reconciled")
        beta.refuse("latest", "in a gap")
        beta.refuse(f"seq={last + 1}", "in a gap")
        beta.ask(f"seq={last}", last)
        store.group("beta-2.x_y").ingest(beta.take())
        unready.agent_starts()
        unready.reconcile_begins("initial")
        unready.create("half.img", 3 * BLOCK_BYTES)
        unready.reconcile("half.img", 0, block(5))
        unready.refuse("latest", "its base snapshot is being made")
        unready.refuse("seq=1", "its base snapshot is being made")
        store.group("unready").ingest(unready.take())
        store.group("without-a-record")
        store.close()
        groups = {"alpha": alpha, "beta-2.x_y": beta, "unready": unready, "without-a-record": History(time=0)}
        keep(path, "v1-groups", groups, verify_wrongs="without-a-record")


if __name__ == "__main__":
    main()
