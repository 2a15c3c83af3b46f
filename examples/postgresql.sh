#!/bin/bash
# A PostgreSQL that is being worked on loses a table. It comes back twice: out of a clone of the moment before, while
# the work goes on; and by rolling the whole disk back in place. And then that rollback is taken back, too.
# Needs root (asks sudo otherwise), PostgreSQL with pgbench, and `rewindfs` in PATH: `make examples` sees to it.
# shellcheck source=examples/common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"

PATH=$(printf '%s\n' /usr/lib/postgresql/*/bin | sort -V | tail -n 1):$PATH
need mkfs.ext4 setpriv initdb pg_ctl pgbench psql pg_dump
id postgres >/dev/null 2>&1 || { echo 'postgresql: there is no user postgres here' >&2; exit 1; }
CLIENTS=4

chmod 755 .  # the user postgres passes through here
mkdir source mnt disk clone clone-disk
install -d -o postgres log run clone-run

# A server is known by the directory of its socket. It has no port on the network, and it must not run as root.
AS_POSTGRES=(setpriv --reuid=postgres --regid=postgres --init-groups env LC_ALL=C)
as_postgres() { "${AS_POSTGRES[@]}" "$@"; }
start_server() {  # DATA RUN
    as_postgres pg_ctl -D "$1" -l "$WORK/log/$2.log" -w -s -o "-k $WORK/$2" start
}
stop_server() {  # DATA; until it has left the disk: pg_ctl does not wait for that
    local server
    server=$(head -n 1 "$1/postmaster.pid")
    as_postgres pg_ctl -D "$1" -w -s -m fast stop
    while kill -0 "$server" 2>/dev/null; do sleep 0.05; done
}
sql() { as_postgres psql -h "$WORK/$1" -qAtX -v ON_ERROR_STOP=1 -d shop -c "$2"; }

# The rule of pgbench's tables: what its clients moved adds up to the same sum in each of them.
balances() {
    sql "$1" 'SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(bbalance) FROM pgbench_branches)
                 AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(tbalance) FROM pgbench_tellers)
                 AND (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(delta) FROM pgbench_history)'
}
transactions() { sql "$1" 'SELECT count(*) FROM pgbench_history'; }

start_work() {
    "${AS_POSTGRES[@]}" pgbench -h "$WORK/run" -n -c $CLIENTS -T 600 shop >>log/pgbench.log 2>&1 &
    BENCH=$!
}
stop_work() {  # and wait for what it has still going on in the server
    kill "$BENCH"
    wait "$BENCH" 2>/dev/null || true
    BENCH=
    local left=some
    while [ "$left" != 0 ]; do
        sleep 0.1
        left=$(sql run "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgbench'")
    done
}
work_on() {  # as many transactions
    local at end
    at=$(transactions run)
    end=$((at + $1))
    while [ "$at" -lt "$end" ]; do
        kill -0 "$BENCH" || fail 'pgbench has ended'
        sleep 0.1
        at=$(transactions run)
    done
}
stop_programs() {
    if [ -n "${BENCH:-}" ]; then kill "$BENCH"; fi
    for data in disk clone-disk; do
        if [ -s "$WORK/$data/data/postmaster.pid" ]; then stop_server "$WORK/$data/data"; fi
    done
}

say 'A database on a disk image, as it may have been for years: the tables of pgbench, and 1000 invoices'
truncate -s 512M source/disk.img
mkfs.ext4 -q source/disk.img
mount -o loop source/disk.img disk
install -d -o postgres -m 700 disk/data
as_postgres initdb -D "$WORK/disk/data" -A trust -N >log/initdb.log
cat >>disk/data/postgresql.conf <<END
listen_addresses = ''
log_statement = ddl
log_line_prefix = '%m '
log_timezone = UTC
track_commit_timestamp = on
recovery_init_sync_method = syncfs
END
start_server "$WORK/disk/data" run
as_postgres createdb -h "$WORK/run" shop
as_postgres pgbench -h "$WORK/run" -i -q shop 2>>log/pgbench.log
sql run "CREATE TABLE invoices AS SELECT i AS number, 'customer ' || i AS customer FROM generate_series(1, 1000) i"
stop_server "$WORK/disk/data"
umount disk

say 'Protect it: each write reaches the store before the disk image'
run rewindfs mount source mnt --store store --mode sync --wait-base --log-file "$WORK/mount.log"
run mount -o loop mnt/disk.img disk
start_server "$WORK/disk/data" run

say "It is worked on, by $CLIENTS clients of pgbench"
start_work
work_on 100

say 'The mistake'
printf '$ psql -c "DROP TABLE invoices"\n'
sql run 'DROP TABLE invoices'
work_on 50
printf '  transactions by now: %s\n' "$(transactions run)"

say 'When was that? The log of the server says it'
run grep 'DROP TABLE' log/run.log
MOMENT=$(sed -n 's/^\([0-9-]*\) \([0-9:.]*\) UTC LOG: .*DROP TABLE.*/\1T\2Z/p' log/run.log)
COMMITTED=$(sql run "SELECT count(*) FROM pgbench_history WHERE pg_xact_commit_timestamp(xmin) <= '$MOMENT'")

say 'First way: a second server on a clone of that moment. The first one goes on working'
run rewindfs clone store disk.img clone --at "$MOMENT" --overlay "$WORK" --log-file "$WORK/clone.log"
run mount -o loop clone/disk.img clone-disk
rm clone-disk/data/postmaster.pid  # it names the server of that moment
start_server "$WORK/clone-disk/data" clone-run
THEN=$(transactions clone-run)
printf '  transactions in the clone: %s, and the server knows of %s until then\n' "$THEN" "$COMMITTED"
# Each client may have been within a transaction that had its time, and not yet its place on the disk.
[ "$THEN" -le "$COMMITTED" ] && [ "$THEN" -ge $((COMMITTED - CLIENTS)) ] || fail 'the clone is not of that moment'
expect 'balances agree in the clone' t "$(balances clone-run)"
printf '$ pg_dump -t invoices … | psql …\n'
as_postgres pg_dump -h "$WORK/clone-run" -t invoices shop | as_postgres psql -h "$WORK/run" -qX -d shop >log/load.log
expect 'invoices, beside the work of today' 1000 "$(sql run 'SELECT count(*) FROM invoices')"
work_on 20
expect 'balances agree' t "$(balances run)"
stop_server "$WORK/clone-disk/data"
run umount clone-disk
run rewindfs unmount clone

say 'Second way: the disk itself goes back. Its users leave first'
stop_work
TODAY=$(transactions run)
stop_server "$WORK/disk/data"
run umount disk
run rewindfs restore store disk.img --at "$MOMENT" --in-place mnt --dry-run | tail -n 1
run rewindfs restore store disk.img --at "$MOMENT" --in-place mnt | tee restore.log
run mount -o loop mnt/disk.img disk
rm disk/data/postmaster.pid
start_server "$WORK/disk/data" run
expect 'invoices' 1000 "$(sql run 'SELECT count(*) FROM invoices')"
expect 'transactions, as in the clone' "$THEN" "$(transactions run)"
expect 'balances agree' t "$(balances run)"

say 'It can be worked with'
start_work
work_on 20
stop_work
expect 'balances agree' t "$(balances run)"

say 'On second thought: the rollback is taken back by the command that it printed'
stop_server "$WORK/disk/data"
run umount disk
UNDO=$(sed -n 's/^undo it with: //p' restore.log)
printf '$ %s\n' "$UNDO"
eval "$UNDO"
run mount -o loop mnt/disk.img disk
start_server "$WORK/disk/data" run
expect 'transactions, as before the rollback' "$TODAY" "$(transactions run)"
expect 'invoices' 1000 "$(sql run 'SELECT count(*) FROM invoices')"
expect 'balances agree' t "$(balances run)"

say 'Leave'
stop_server "$WORK/disk/data"
run umount disk
run rewindfs unmount mnt
run rewindfs verify store --read-data
say 'The table is back, and nothing else was lost. Everything that this example made is removed.'
