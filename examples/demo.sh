#!/bin/bash
# Protects an ext4 image, makes a mistake in it, and gets the table back: for real, in a temporary directory.
# Needs root for the loop mounts (asks sudo otherwise), e2fsprogs, sqlite3 and `rewindfs` in PATH: `make demo` sees to it.
set -euo pipefail

if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo 'demo: loop mounts need root, and there is no sudo here' >&2; exit 1; }
    exec sudo env "PATH=$PATH" "$0" "$@"
fi
PATH=$PATH:/usr/sbin:/sbin
for tool in rewindfs mkfs.ext4 e2fsck sqlite3 losetup mount python3; do
    command -v "$tool" >/dev/null || { echo "demo: $tool is not installed; use \`make demo\`" >&2; exit 1; }
done

WORK=$(mktemp -d "${TMPDIR:-/tmp}/rewindfs-demo.XXXXXX")
cd "$WORK"
mkdir source mnt snap disk restored
DONE=

if [ -t 1 ]; then BOLD=$'\033[1m' PLAIN=$'\033[0m'; else BOLD='' PLAIN=''; fi
say() { printf '\n%s%s%s\n' "$BOLD" "$*" "$PLAIN"; }
run() { printf '$ %s\n' "$*"; "$@"; }
fail() { printf '\ndemo: FAILED: %s\n' "$*" >&2; exit 1; }

# Undoes whatever of this run is still there, the innermost first; touches nothing that it did not make.
clean_up() {
    status=$?
    trap - EXIT INT TERM
    set +e
    cd /
    for place in restored disk; do
        if mountpoint -q "$WORK/$place"; then umount "$WORK/$place" || umount -l "$WORK/$place"; fi
    done
    for place in snap mnt; do
        if grep -q " $WORK/$place " /proc/self/mountinfo; then
            fusermount3 -u "$WORK/$place" || fusermount3 -u -z "$WORK/$place"
        fi
    done
    if [ "$status" -ne 0 ]; then
        for log in "$WORK"/*.log; do
            if [ -s "$log" ]; then printf '\n--- %s\n' "${log##*/}" >&2; tail -n 20 "$log" >&2; fi
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
from_points() { rewindfs points store --json | python3 -c "import json, sys; points = json.load(sys.stdin); print($1)"; }
sql() { sqlite3 disk/shop.db "$1"; }

# Mounts a restored image, which replays its ext4 journal, and says how many orders its table holds.
orders_in() {
    mount -o loop "$1" restored
    sqlite3 restored/shop.db 'PRAGMA integrity_check' | grep -qx ok || fail "$1: its database is damaged"
    sqlite3 restored/shop.db 'SELECT count(*) FROM orders' 2>&1 || true
    umount restored
    e2fsck -fn "$1" >fsck.log 2>&1 || fail "$1: its file system is damaged"
}

expect() {  # WHAT WANTED FOUND
    [ "$2" = "$3" ] || fail "$1: wanted $2, found $3"
    printf '  %-34s %s\n' "$1" "$3"
}

say 'A directory with a disk image, as it may have been for years'
run truncate -s 64M source/disk.img
run mkfs.ext4 -q source/disk.img

say 'Mount it through rewindfs, in sync mode: each write reaches the store before the source'
run rewindfs mount source mnt --store store --mode sync --wait-base --log-file "$WORK/mount.log"
run mount -o loop mnt/disk.img disk

say 'Work in it: a table with 1000 orders, and a letter'
sql 'CREATE TABLE orders (id INTEGER PRIMARY KEY, item TEXT)'
for hundred in 0 1 2 3 4 5 6 7 8 9; do
    sql "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100)
         INSERT INTO orders SELECT $hundred * 100 + i, 'item ' || i FROM n"
done
echo 'Dear customers' >disk/letter.txt
run sync -f disk
printf '  orders: %s\n' "$(sql 'SELECT count(*) FROM orders')"

say 'Name this moment'
run rewindfs bookmark mnt before-the-mistake
MOMENT=$(now)

say 'The mistake'
run sqlite3 disk/shop.db 'DROP TABLE orders; VACUUM'
run rm disk/letter.txt
run sync -f disk

say 'Name the moment after it, in the store'
run rewindfs snapshot create store --name after
run rewindfs snapshot list store

say 'Mount the snapshots: each is a file'
run rewindfs browse store snap --log-file "$WORK/browse.log"
run ls -l snap/volumes/disk.img/

SEQ=$(from_points 'next(mark["seq"] for mark in points["bookmarks"] if mark["name"] == "before-the-mistake")')

say 'Any moment is a file, also one that nobody named'
run cp snap/volumes/disk.img/@before-the-mistake by-name.img
run cp "snap/volumes/disk.img/@seq=$SEQ" by-seq.img
run cp "snap/volumes/disk.img/@$MOMENT" by-time.img
run cp snap/volumes/disk.img/@latest latest.img
run cp snap/volumes/disk.img/after after.img

say 'Mount what was restored, and count the orders'
expect '@before-the-mistake' 1000 "$(orders_in by-name.img)"
expect "@seq=$SEQ" 1000 "$(orders_in by-seq.img)"
expect "@$MOMENT" 1000 "$(orders_in by-time.img)"
for image in latest after; do
    case $(orders_in "$image.img") in
        *'no such table'*) printf '  %-34s no such table, as it must be\n' "$image" ;;
        *) fail "$image: the dropped table is still there" ;;
    esac
done
mount -o loop by-name.img restored
[ "$(cat restored/letter.txt)" = 'Dear customers' ] || fail 'the letter is not back'
umount restored

say 'How it is doing, and what can be restored'
run rewindfs status mnt
run rewindfs points store

say 'Leave'
run umount disk
run rewindfs unmount mnt
LAST=$(from_points 'points["newest"]["seq"]')  # @latest may still be what it was for the cp: it stays bound for 2 s
run cmp source/disk.img "snap/volumes/disk.img/@seq=$LAST"
run fusermount3 -u snap
DONE=yes
say 'The table is back. Everything this demo made is removed.'
