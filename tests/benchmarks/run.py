"""All benchmarks, one after the other, each a table: `make bench`, `make bench-quick`."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SUBJECTS = ("write_rates", "read_rates", "footprint", "scale", "going_back")


def main() -> None:
    print(
        f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}"
    )
    for subject in SUBJECTS:
        subprocess.run([sys.executable, "-m", f"tests.benchmarks.{subject}", *sys.argv[1:]], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
