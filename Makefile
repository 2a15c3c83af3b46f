# `make demo` and `make test` install what is missing first: Debian packages (with sudo when not root), then a virtual
# environment in .venv. Nothing is downloaded again while setup.cfg and pyproject.toml stay as they are.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed

# pyfuse3 is compiled against libfuse3; the other packages are the tools of the tests and of the demo.
PACKAGES := fuse3 libfuse3-dev pkg-config gcc libc6-dev python3-dev python3-venv \
            fio e2fsprogs xfsprogs btrfs-progs ntfs-3g dosfstools mtools fdisk sqlite3 strace attr mount util-linux \
            iproute2 openssl rsync qemu-utils postgresql

# What `make bench` measures beside rewindfs.
PEERS := qemu-utils qemu-system-common borgbackup python3-llfuse restic btrfs-progs

.PHONY: help demo two-hosts examples chaos test test-slow lint bench bench-quick fuzz clean packages

help:
	@echo 'make demo         protect an ext4 image, make a mistake in it, get the table back: for real, under a minute'
	@echo 'make two-hosts    two sites with a cable between them, the cable pulled: a moment of the outage comes back'
	@echo 'make examples     PostgreSQL, a disk of a virtual machine, a group of databases: each breaks, and goes back'
	@echo 'make test         lint, types and the tests'
	@echo 'make test-slow    the tests that take long: kill -9, full disks, large volumes'
	@echo 'make lint         ruff and mypy only'
	@echo 'make bench        measure; make bench-quick measures less'
	@echo 'make fuzz         the property tests with many more examples; of some files only: make fuzz FUZZ=tests/dedup/…'
	@echo 'make chaos        faults at random under load, e.g. make chaos CHAOS="--site first --mode sync --seconds 600"'
	@echo 'make clean        remove what these targets made'

demo: packages $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh

two-hosts: packages $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" examples/two-hosts.sh

examples: packages $(STAMP)
	@set -e; for example in postgresql vm-image sqlite-group; do \
		printf '\n=== %s\n' "$$example"; PATH="$(CURDIR)/$(BIN):$$PATH" "examples/$$example.sh"; \
	done

chaos: packages $(STAMP)
	$(BIN)/python -m tests.system.chaos $(CHAOS)

test: lint
	$(BIN)/python -m pytest

test-slow: packages $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: packages $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench bench-quick: PACKAGES += $(PEERS)

bench: packages $(STAMP)
	$(BIN)/python -m tests.benchmarks.run $(BENCH)

bench-quick: packages $(STAMP)
	$(BIN)/python -m tests.benchmarks.run --quick $(BENCH)

fuzz: packages $(STAMP)
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile=fuzz --hypothesis-show-statistics $(FUZZ)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis bench-results
	find dedup replication fusefs tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian's PostgreSQL would make and start a server of its own: the drop-in file is there while it is installed, only.
NO_SERVER := /etc/postgresql-common/createcluster.d/rewindfs.conf

packages:
	@set -eu; \
	if ! command -v dpkg-query >/dev/null; then \
		echo 'make: this is no Debian-like system, so packages are not installed for you. Needed, under the names they'; \
		echo 'make: have here: $(PACKAGES)'; \
		exit 0; \
	fi; \
	missing=; \
	for package in $(PACKAGES); do \
		case "$$(dpkg-query -W -f '$${Status}' "$$package" 2>/dev/null || true)" in \
			*' installed') ;; \
			*) missing="$$missing $$package" ;; \
		esac; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
		echo "make: error: there is no apt-get here; install these packages by hand:$$missing" >&2; exit 1; \
	fi; \
	root=; \
	if [ "$$(id -u)" -ne 0 ]; then \
		if ! command -v sudo >/dev/null; then \
			echo "make: error: neither root nor sudo; as root, run: apt-get install$$missing" >&2; exit 1; \
		fi; \
		root=sudo; \
	fi; \
	echo "make: installing$$missing"; \
	case "$$missing " in *' postgresql '*) \
		trap "$$root rm -f $(NO_SERVER)" EXIT; \
		$$root mkdir -p $(dir $(NO_SERVER)); \
		echo 'create_main_cluster = false' | $$root tee $(NO_SERVER) >/dev/null ;; \
	esac; \
	$$root env DEBIAN_FRONTEND=noninteractive apt-get update -q </dev/null; \
	$$root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing </dev/null

$(STAMP): setup.cfg pyproject.toml | packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'make: error: rewindfs needs Python 3.11 or later; say which one: make PYTHON=python3.11 …' >&2; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,files]'
	@touch $@
