# What the examples share; they source it, nobody runs it. Each works below a temporary directory of its own, WORK, and
# whatever happens, everything below it is unmounted and removed, and what the example started is stopped.
# shellcheck shell=bash
set -euo pipefail

EXAMPLE=$(basename "$0" .sh)
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "$EXAMPLE: loop mounts need root, and there is no sudo here" >&2; exit 1; }
    exec sudo env "PATH=$PATH" "$0" "$@"
fi
PATH=$PATH:/usr/sbin:/sbin

if [ -t 1 ]; then BOLD=$'\033[1m' PLAIN=$'\033[0m'; else BOLD='' PLAIN=''; fi
say() { printf '\n%s%s%s\n' "$BOLD" "$*" "$PLAIN"; }
run() { printf '$ %s\n' "$*"; "$@"; }
fail() { printf '\n%s: FAILED: %s\n' "$EXAMPLE" "$*" >&2; exit 1; }
now() { date -u +%Y-%m-%dT%H:%M:%S.%NZ; }

need() {  # TOOL…
    local tool
    for tool in rewindfs mount umount losetup python3 "$@"; do
        command -v "$tool" >/dev/null || { echo "$EXAMPLE: $tool is not installed; use \`make examples\`" >&2; exit 1; }
    done
}

expect() {  # WHAT WANTED FOUND
    [ "$2" = "$3" ] || fail "$1: wanted $2, found $3"
    printf '  %-44s %s\n' "$1" "$3"
}

mounts_in_work() { awk -v work="$WORK/" 'index($5, work) == 1 {print $5}' /proc/self/mountinfo | tac; }

# An example that starts programs says here how they are stopped.
stop_programs() { :; }

clean_up() {
    local status=$? place
    trap - EXIT INT TERM
    set +e
    cd /
    stop_programs
    for place in $(mounts_in_work); do
        # A mount of rewindfs that is asked goes when it has written everything; the innermost comes first.
        rewindfs unmount "$place" 2>/dev/null || umount "$place" 2>/dev/null || umount -l "$place"
    done
    if [ "$status" -ne 0 ]; then
        for log in "$WORK"/*.log; do
            if [ -s "$log" ]; then printf '\n--- %s\n' "${log##*/}" >&2; tail -n 20 "$log" >&2; fi
        done
    fi
    rm -rf --one-file-system "$WORK"
    exit "$status"
}

WORK=$(mktemp -d "${TMPDIR:-/tmp}/rewindfs-$EXAMPLE.XXXXXX")
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
cd "$WORK"
