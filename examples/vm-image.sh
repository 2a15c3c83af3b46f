#!/bin/bash
# The disk of a virtual machine as a plain raw image, with its whole history: no qcow2, no chain of overlays. A guest
# updates itself until something is broken; the update that broke it is found, and the disk goes back to just before it.
# The guest is played by a loop mount. Needs root (asks sudo otherwise), qemu-img, and `rewindfs` in PATH: `make examples`
# sees to it.
# shellcheck source=examples/common.sh
source "$(dirname "$(readlink -f "$0")")/common.sh"
need qemu-img mkfs.ext4 sfdisk
UPDATES=12
PARTITION=$((1 << 20))  # where the first partition begins, in bytes
BOOTS=root=/dev/vda1  # what its configuration must say

mkdir source mnt snap guest look
boot() { mount -o "loop,offset=$PARTITION" mnt/vm.img guest; }
shut_down() { umount guest; }

# What the guest does. Update 7 ends with a mistake, and nobody notices for a while.
update() {
    head -c 300000 /dev/urandom >"guest/usr/library-$1"
    echo "release $1" >guest/etc/release
    sync -f guest
    if [ "$1" -eq 7 ]; then
        sed -i 's/^root=.*/root=/' guest/etc/boot.conf
        sync -f guest
    fi
}

# Whether a disk would boot.
works() {  # IMAGE MOUNT-OPTIONS
    mount -o "loop,offset=$PARTITION,$2" "$1" look
    if grep -qx "$BOOTS" look/etc/boot.conf; then echo boots; else echo 'does not boot'; fi
    umount look
}

say 'A disk of 128 MiB with a partition table, and a guest installed on it'
run qemu-img create -q -f raw source/vm.img 128M
echo "start=$((PARTITION / 512)), type=L" | sfdisk -q source/vm.img
mkfs.ext4 -q -E "offset=$PARTITION" source/vm.img 126M
run rewindfs mount source mnt --store store --wait-base --log-file "$WORK/mount.log"
boot
mkdir guest/etc guest/usr
echo "$BOOTS" >guest/etc/boot.conf
update 0
shut_down

say 'Keep this moment in the store. For once a copy is kept, too, to compare with'
run rewindfs bookmark mnt installed
run qemu-img convert -f raw -O raw mnt/vm.img installed.img

say "The guest runs, and makes $UPDATES updates, one after another"
boot
for number in $(seq "$UPDATES"); do update "$number"; done
shut_down
run rewindfs bookmark mnt updated
run qemu-img convert -f raw -O raw mnt/vm.img updated.img

say 'Each snapshot is a raw image; to qemu-img it is what the copy is'
run rewindfs browse store snap --log-file "$WORK/browse.log"
run qemu-img info snap/volumes/vm.img/installed
for name in installed updated; do
    expect "$name: snapshot and copy" 'Images are identical.' \
        "$(qemu-img compare -f raw -F raw "snap/volumes/vm.img/$name" "$name.img")"
done
expect 'installed and updated' 'Content mismatch' \
    "$(qemu-img compare -f raw -F raw snap/volumes/vm.img/{installed,updated} | grep -o 'Content mismatch')"

say 'What all the updates wrote, without reading a block'
run rewindfs diff store vm.img installed updated | tail -n 5

say 'It does not boot any more. Since when?'
expect 'installed' boots "$(works snap/volumes/vm.img/installed ro)"
expect 'updated' 'does not boot' "$(works snap/volumes/vm.img/updated ro)"
run rewindfs bisect store vm.img --good installed --bad updated --mount --mount-options "offset=$PARTITION" \
    -- grep -qx "$BOOTS" {}/etc/boot.conf 2>&1 | tee bisect.log
BAD=$(sed -n 's/^first bad recovery point: seq=\([0-9]*\) .*/\1/p' bisect.log)
GOOD=$(sed -n 's/^first bad .*last good one: seq=\([0-9]*\) .*/\1/p' bisect.log)

say 'What that one write changed'
run rewindfs diff store vm.img "seq=$GOOD" "seq=$BAD"

say 'The last good moment as a file of its own; its file system replays what it had begun when it is mounted'
run rewindfs restore store vm.img --at "seq=$GOOD" --to good.img
expect 'good.img' boots "$(works good.img rw)"
run du -h --apparent-size good.img
run du -h good.img

say 'And the disk of the guest itself goes back there, in place: only what differs is written'
run rewindfs restore store vm.img --at "seq=$GOOD" --in-place mnt
expect 'the image now, and that moment' 'Images are identical.' \
    "$(qemu-img compare -f raw -F raw mnt/vm.img "snap/volumes/vm.img/@seq=$GOOD")"
boot
expect 'boot.conf' "$BOOTS" "$(cat guest/etc/boot.conf)"
expect 'and the updates before it are there' 'release 7' "$(cat guest/etc/release)"
shut_down

say 'What was rolled back is not lost: it is a moment like any other'
expect 'updated: snapshot and copy' 'Images are identical.' \
    "$(qemu-img compare -f raw -F raw snap/volumes/vm.img/updated updated.img)"

say 'Leave'
run fusermount3 -u snap
run rewindfs unmount mnt
say 'The guest boots again. Everything that this example made is removed.'
