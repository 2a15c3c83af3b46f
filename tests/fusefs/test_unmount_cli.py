"""`rewindfs unmount` where the mount's process keeps it waiting; the system tests unmount what there is."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from dedup.errors import RewindError
from fusefs import unmount_cli
from fusefs.agent_control import Body, serve_control
from replication.transport import listen_unix


@pytest.fixture
def mount_process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


async def test_what_is_not_durable_in_time_stays_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def drain(body: Body) -> Body:
        asked.append(body)
        return {"pid": 1}

    async def durable(body: Body) -> Body:
        asked.append(body)
        await trio.sleep_forever()
        raise AssertionError

    def leave(path: Path) -> None:
        raise AssertionError(f"{path} was left")

    monkeypatch.setattr(unmount_cli, "control_socket", lambda path: path / "control")
    monkeypatch.setattr(unmount_cli, "leave_when_free", leave)
    listener = listen_unix(tmp_path / "control")
    unmount = partial(unmount_cli.unmount.callback, tmp_path, 0.1)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_control, listener, {"unmount": drain, "durable": durable})
        with pytest.raises(RewindError, match="not durable at the store within 0.1 s and still mounted"):
            await trio.to_thread.run_sync(unmount)
        nursery.cancel_scope.cancel()
    await listener.aclose()
    assert asked == [{"drain_timeout": 0.1}, {}]


def test_the_end_of_the_process_is_waited_for(mount_process: subprocess.Popen[bytes]) -> None:
    with pytest.raises(RewindError, match=f"unmounted, but process {mount_process.pid} is still draining"):
        unmount_cli._wait_for_end(mount_process.pid, 0.01)
    mount_process.kill()
    unmount_cli._wait_for_end(mount_process.pid, 60.0)  # it is a zombie until it is waited for
    mount_process.wait()
    unmount_cli._wait_for_end(mount_process.pid, 0.01)
