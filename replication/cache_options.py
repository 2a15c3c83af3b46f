"""Where a command that reads a store elsewhere keeps what it has read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from replication.block_cache import CACHE_BYTES, default_cache_directory
from replication.retention_cli import Limit

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class CachePlace:
    """`directory` None is `default_cache_directory()`; at most `bytes_max` on its disk. For addresses only."""

    directory: Path | None = None
    bytes_max: int = CACHE_BYTES

    @property
    def path(self) -> Path:
        return default_cache_directory() if self.directory is None else self.directory


def cache_options(command: F) -> Callable[..., Any]:
    """Adds `--cache DIR` and `--cache-limit SIZE` to a click command, which gets them as `cache`."""

    @click.option(
        "--cache",
        "cache_directory",
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        metavar="DIR",
        help="For an address: where blocks that were read are kept. Default: TMPDIR, else /var/tmp.",
    )
    @click.option(
        "--cache-limit", type=Limit(), default="1G", show_default=True, metavar="SIZE", help="How much of them, to 8G."
    )
    @wraps(command)
    def wrapped(*args: Any, cache_directory: Path | None, cache_limit: int, **kwargs: Any) -> Any:
        directory = None if cache_directory is None else cache_directory.absolute()
        return command(*args, cache=CachePlace(directory, cache_limit), **kwargs)

    return wrapped
