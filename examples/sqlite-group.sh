#!/bin/bash
# Twenty SQLite databases in one directory, and a rule that holds across all of them: what one account loses, another one
# gains. Any moment restores all of them together, as they were at that moment: a consistency group.
# Needs root (asks sudo otherwise), python3, sqlite3, and `rewindfs` in PATH: `make examples` sees to it.
# shellcheck source=examples/common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
need sqlite3 getfattr
ACCOUNTS=20
TOTAL=$((ACCOUNTS * 1000))

mkdir source mnt snap

# Moves money between two databases, a commit in each, again and again until there is a file `stop`. After each transfer
# it writes down what time it is: then nothing is on its way, and the rule holds.
cat >transfers.py <<'END'
import os, random, sqlite3, sys, time

accounts = int(sys.argv[1])
banks = [sqlite3.connect(f"mnt/account-{number:02}.db", isolation_level=None) for number in range(accounts)]
while not os.path.exists("stop"):
    payer, payee = random.sample(banks, 2)
    amount = random.randrange(1, 50)
    payer.execute("UPDATE money SET amount = amount - ?", (amount,))
    payee.execute("UPDATE money SET amount = amount + ?", (amount,))
    now = time.time_ns()
    print(time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)) + f".{now % 10**9:09}Z", flush=True)
END

# The total of all databases of a directory; each is checked.
total_in() {
    python3 - "$1" <<'END'
import pathlib, sqlite3, sys

total = 0
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.db")):
    bank = sqlite3.connect(file)
    ((verdict,),) = bank.execute("PRAGMA integrity_check")
    if verdict != "ok":
        sys.exit(f"{file}: {verdict}")
    total += bank.execute("SELECT amount FROM money").fetchone()[0]
    bank.close()
print(total)
END
}

work() { python3 transfers.py $ACCOUNTS >>transfers.log & WORKER=$!; }
finish_work() { touch stop; wait "$WORKER"; rm stop; WORKER=; }
stop_programs() { if [ -n "${WORKER:-}" ]; then kill "$WORKER"; fi; }
wait_for_transfers() {  # COUNT
    until [ "$(wc -l <transfers.log)" -ge "$1" ]; do
        kill -0 "$WORKER" || fail 'the transfers have ended'
        sleep 0.1
    done
}

say "$ACCOUNTS databases with 1000 in each, and a mount that protects them as one group"
for number in $(seq -w 0 $((ACCOUNTS - 1))); do
    sqlite3 "source/account-$number.db" 'CREATE TABLE money (amount INTEGER); INSERT INTO money VALUES (1000)'
done
run rewindfs mount source mnt --store store --wait-base --log-file "$WORK/mount.log"
run rewindfs browse store snap --log-file "$WORK/browse.log"

say 'Transfers between them'
work
wait_for_transfers 40

say 'The mistake: a program pays out interest, and nobody pays for it'
MOMENT=$(tail -n 1 transfers.log)
for number in 03 07 11; do sqlite3 -cmd '.timeout 5000' "mnt/account-$number.db" 'UPDATE money SET amount = amount * 2'; done
wait_for_transfers 45
finish_work
run rewindfs bookmark mnt after-the-mistake
printf '  total now: %s\n' "$(total_in mnt)"
[ "$(total_in mnt)" -ne $TOTAL ] || fail 'there was no mistake'

say "The whole directory as it was at the last moment before it, by cp: $MOMENT"
run cp -r "snap/points/@$MOMENT" before
expect 'databases' $ACCOUNTS "$(find before -name '*.db' | wc -l)"
expect 'total' $TOTAL "$(total_in before)"

say 'It need not be that one. After each transfer the rule holds, and between any two writes each database is sound'
CHECKED=0
for moment in $(head -n 40 transfers.log | shuf -n 10); do
    cp -r "snap/points/@$moment" one
    [ "$(total_in one)" -eq $TOTAL ] || fail "$moment: the rule does not hold"
    rm -r one
    CHECKED=$((CHECKED + 1))
done
printf '  moments after a transfer, all of them with a total of %s: %s\n' $TOTAL "$CHECKED"
SEQ=$(getfattr -n user.rewindfs.seq --only-values "snap/points/@$MOMENT")
for back in 4 8 12 16 20; do
    cp -r "snap/points/@seq=$((SEQ - back))" one
    printf '  seq=%s, in the middle of something: total %s\n' "$((SEQ - back))" "$(total_in one)"
    rm -r one
done

say 'In place: the whole group goes back, by writing only what differs'
run rewindfs restore store . --at "$MOMENT" --in-place mnt | tee restore.log
expect 'total' $TOTAL "$(total_in mnt)"
for file in before/*.db; do cmp "$file" "mnt/${file##*/}" || fail "$file differs from what cp restored"; done

say 'The transfers go on'
work
wait_for_transfers 55
finish_work
expect 'total' $TOTAL "$(total_in mnt)"

say 'Leave'
run fusermount3 -u snap
run rewindfs unmount mnt
say 'All databases are of one moment. Everything that this example made is removed.'
