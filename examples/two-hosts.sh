#!/bin/bash
# Two sites, for real: an office and a backup site, each with a network of its own and one cable between them. The cable
# is pulled while an application writes; afterwards a moment of that outage is restored at the backup site.
# Needs root (asks sudo otherwise), iproute2, sqlite3 and `rewindfs` in PATH: `make two-hosts` sees to it.
set -euo pipefail

if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo 'two-hosts: network namespaces need root, and there is no sudo' >&2; exit 1; }
    exec sudo env "PATH=$PATH" "$0" "$@"
fi
PATH=$PATH:/usr/sbin:/sbin
for tool in rewindfs ip nsenter sqlite3 fusermount3 cmp; do
    command -v "$tool" >/dev/null || { echo "two-hosts: $tool is not installed; use \`make two-hosts\`" >&2; exit 1; }
done

WORK=$(mktemp -d "${TMPDIR:-/tmp}/rewindfs-two-hosts.XXXXXX")
cd "$WORK"
mkdir -p office/source office/mnt backup/snap
OFFICE=rewindfs-office-$$ BACKUP=rewindfs-backup-$$
DONE=

if [ -t 1 ]; then BOLD=$'\033[1m' PLAIN=$'\033[0m'; else BOLD='' PLAIN=''; fi
say() { printf '\n%s%s%s\n' "$BOLD" "$*" "$PLAIN"; }
fail() { printf '\ntwo-hosts: FAILED: %s\n' "$*" >&2; exit 1; }

# Run something on one of the hosts. Only its network is another: `ip netns exec` would hide the mounts from each other.
office() { printf 'office$ %s\n' "$*"; on_office "$@"; }
backup() { printf 'backup$ %s\n' "$*"; on_backup "$@"; }
on_office() { REWINDFS_IDENTITY=$WORK/office/identity nsenter --net="/run/netns/$OFFICE" "$@"; }
on_backup() { REWINDFS_IDENTITY=$WORK/backup/identity nsenter --net="/run/netns/$BACKUP" "$@"; }

# Asks the processes of a host to leave, and waits until they have.
stop_host() {
    local pids
    pids=$(ip netns pids "$1" 2>/dev/null) || return 0
    if [ -n "$pids" ]; then
        # shellcheck disable=SC2086
        kill -TERM $pids 2>/dev/null || true
        for _ in $(seq 300); do
            [ -n "$(ip netns pids "$1")" ] || return 0
            sleep 0.1
        done
        # shellcheck disable=SC2086
        kill -KILL $pids 2>/dev/null || true
    fi
}

# Undoes whatever of this run is still there; touches nothing that it did not make.
clean_up() {
    status=$?
    trap - EXIT INT TERM
    set +e
    cd /
    for place in backup/snap office/mnt; do
        if grep -q " $WORK/$place " /proc/self/mountinfo; then
            fusermount3 -u "$WORK/$place" || fusermount3 -u -z "$WORK/$place"
        fi
    done
    for host in "$OFFICE" "$BACKUP"; do
        stop_host "$host"
        if [ -e "/run/netns/$host" ]; then ip netns del "$host"; fi
    done
    if [ "$status" -ne 0 ]; then
        for log in "$WORK"/*/*.log; do
            if [ -s "$log" ]; then printf '\n--- %s\n' "${log#"$WORK"/}" >&2; tail -n 20 "$log" >&2; fi
        done
    fi
    rm -rf --one-file-system "$WORK"
    if [ "$status" -eq 0 ] && [ -z "$DONE" ]; then status=1; fi
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

now() { date -u +%Y-%m-%dT%H:%M:%S.%NZ; }
sql() { sqlite3 office/mnt/shop.db "$1"; }
orders_in() { sqlite3 "$1" 'SELECT count(*) FROM orders'; }

# The application: so many orders, a transaction each.
work() {
    for _ in $(seq "$1"); do echo 'INSERT INTO orders (item) VALUES (hex(randomblob(500)));'; done |
        sqlite3 office/mnt/shop.db
    printf '  the application has written; orders: %s\n' "$(orders_in office/mnt/shop.db)"
}

# Whether everything that was written is at the backup site.
arrived() {
    on_office rewindfs status office/mnt --json | python3 -c '
import json, sys
status = json.load(sys.stdin)
waiting = status["lag"]["records"] + status["second"]["queued_records"]
sys.exit(waiting > 10 or status["second"]["link"] != "connected")'
}

expect() {  # WHAT WANTED FOUND
    [ "$2" = "$3" ] || fail "$1: wanted $2, found $3"
    printf '  %-42s %s\n' "$1" "$3"
}

say 'Two hosts, and one cable between them'
ip netns add "$OFFICE" || fail 'no network namespaces can be made here'
ip netns add "$BACKUP"
ip -n "$OFFICE" link add cable type veth peer name cable netns "$BACKUP"
for host in "$OFFICE 192.0.2.1" "$BACKUP 192.0.2.2"; do
    read -r name address <<<"$host"
    ip -n "$name" link set lo up
    ip -n "$name" address add "$address/24" dev cable
    ip -n "$name" link set cable up
done
echo '  office 192.0.2.1, backup 192.0.2.2'

say 'Each makes a key, and trusts the one of the other: nothing else, no authority and no name'
office rewindfs identity create
backup rewindfs identity create
on_office rewindfs identity show >office.pem
on_backup rewindfs identity show >backup.pem
backup rewindfs identity trust office.pem --role agent
office rewindfs identity trust backup.pem

say 'The backup site: a second appliance, the only writer of its store'
backup rewindfs appliance second --store "$WORK/backup/store" --listen tls://192.0.2.2:7070 \
    --log-file "$WORK/backup/second.log"

say 'The office: a first appliance that keeps on disk what it cannot send, and the mount'
office rewindfs appliance first --listen "unix:$WORK/office/first.sock" --forward tls://192.0.2.2:7070 --mode async \
    --spool "$WORK/office/spool" --spool-limit 1G --log-file "$WORK/office/first.log"
office rewindfs mount office/source office/mnt --appliance "unix:$WORK/office/first.sock" --mode async \
    --outage-after 1s --wait-base --log-file "$WORK/office/mount.log"

say 'Work in it'
sql 'CREATE TABLE orders (id INTEGER PRIMARY KEY, item TEXT)'
work 50

say 'The cable is out'
ip -n "$OFFICE" link set cable down
work 50
work 25
MOMENT=$(now)
cp office/mnt/shop.db as-it-was.db
echo "  a moment of the outage: $MOMENT"
say 'The mistake, while nobody at the backup site can see it'
sql 'DELETE FROM orders WHERE id > 30'
work 10
office rewindfs status office/mnt

say 'The cable is back'
ip -n "$OFFICE" link set cable up
for _ in $(seq 300); do
    if arrived; then break; fi
    sleep 0.1
done
office rewindfs status office/mnt
office rewindfs unmount office/mnt
expect 'gaps in the history' 0 "$(rewindfs points backup/store --json |
    python3 -c 'import json, sys; print(len(json.load(sys.stdin)["gaps"]))')"

say 'At the backup site: that moment is a file'
backup rewindfs browse backup/store backup/snap --log-file "$WORK/backup/browse.log"
backup cp "backup/snap/volumes/shop.db/@$MOMENT" restored.db
backup cp backup/snap/volumes/shop.db/@latest latest.db
backup fusermount3 -u backup/snap
cmp restored.db as-it-was.db || fail 'the restored file is not what it was'
cmp latest.db office/source/shop.db || fail 'the latest moment is not what the office has'
expect 'orders at that moment, during the outage' 125 "$(orders_in restored.db)"
expect 'orders now' 40 "$(orders_in latest.db)"

say 'Leave'
stop_host "$OFFICE"
stop_host "$BACKUP"
backup rewindfs verify backup/store --read-data

DONE=yes
say 'Done: ordered history crossed the outage, and every moment of it can be had back'
