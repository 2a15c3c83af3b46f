"""`python -m fusefs` equals `rewindfs`."""

from fusefs.cli import main

main()
