#!/bin/bash
# What only a real kernel can prove. Runs in the guest of boot.sh; each check is counted.
#
#   guest-test.sh [SUSPENDED [PRESSED]]: for so many seconds one of four nodes is suspended (10), and memory is short (20).
#
# Two arrays: `wide`, striped over three servers (two pools on ext4 over RAM disks, one on tmpfs), 512-byte blocks;
# `long`, linear over two sparse volumes, 4096-byte blocks. `sick` and `tight` have a disk that fails and one that is full.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/vm/lib.sh
. "$here/lib.sh"
export LC_ALL=C
suspended=${1:-10} pressed=${2:-20}

prepare_guest ublk_drv brd dm-mod ext4 xfs
export DST_SOCKET=$T/dstd.sock
# No udev here: dmsetup makes its nodes itself.
export DM_DISABLE_UDEV=1
cd "$T" || exit 1
K=1024 M=1048576

# --- daemons ---------------------------------------------------------------------------------------------------------

start_server() {
    start_daemon "server$1" dstd server --listen "127.0.0.1:2007$1" --pool "$T/disk$1/pool"
    until_true 30 connects "2007$1"
}
start_array_daemon() {
    start_daemon array dstd array --state-dir "$T/state" --run-dir "$T/run" --socket "$DST_SOCKET"
    until_true 30 dst list
}
# start_array ARRAY [OPTION...] leaves its device in $T/dev.ARRAY.
start_array() {
    dst start "$@" | tee "$T/started"
    grep -o '/dev/ublkb[0-9]*' "$T/started" | head -n 1 >"$T/dev.$1"
    [ -b "$(device "$1")" ]
}
device() { cat "$T/dev.$1"; }
queue() { cat "/sys/block/$(basename "$(device "$1")")/queue/$2"; }
mount_disk() { mkdir -p "$T/disk$1" && mount "${@:2}" "$T/disk$1" && mkdir -p "$T/disk$1/pool"; }

# --- checks ----------------------------------------------------------------------------------------------------------

create_arrays() {
    dst volume create 127.0.0.1:20071/a --size 160M
    dst volume create 127.0.0.1:20072/b --size 160M
    dst volume create 127.0.0.1:20073/c --size 160M
    dst create wide --alg striped --chunk 64K 127.0.0.1:20071/a 127.0.0.1:20072/b 127.0.0.1:20073/c
    dst volume create 127.0.0.1:20071/d --size 200M --sparse
    dst volume create 127.0.0.1:20072/e --size 120M --sparse
    dst create long --alg linear --block 4096 127.0.0.1:20071/d 127.0.0.1:20072/e
}

limits_wide() {
    equal 'logical block' 512 "$(queue wide logical_block_size)"
    equal 'chunk_sectors: the engine splits' 0 "$(queue wide chunk_sectors)"
    equal 'minimum_io_size, the chunk' $((64 * K)) "$(queue wide minimum_io_size)"
    local optimal
    optimal=$(queue wide optimal_io_size)
    echo "optimal_io_size is $optimal"
    [ "$optimal" -gt 0 ]
    [ $((optimal % (64 * K))) = 0 ]
    equal 'write cache' 'write back' "$(queue wide write_cache)"
    equal fua 1 "$(queue wide fua)"
    equal rotational 0 "$(queue wide rotational)"
    [ "$(queue wide discard_max_bytes)" -gt 0 ]
    [ "$(queue wide write_zeroes_max_bytes)" -gt 0 ]
    equal 'bytes' $((480 * M)) "$(blockdev --getsize64 "$(device wide)")"
}
limits_long() {
    equal 'logical block' 4096 "$(queue long logical_block_size)"
    equal 'discard granularity is whole blocks' 0 $(($(queue long discard_granularity) % 4096))
    equal 'bytes' $((320 * M)) "$(blockdev --getsize64 "$(device long)")"
    refused 'invalid argument' dd if=/dev/zero of="$(device long)" bs=512 count=1 oflag=direct conv=notrunc
}
two_queues() {
    local hw=(/sys/block/"$(basename "$(device wide)")"/mq/*)
    equal 'hardware queues' 2 "${#hw[@]}"
}
stable_link() { equal /dev/dst/wide "$(device wide)" "$(readlink -f /dev/dst/wide)"; }

fio_verify() {
    local target=$1
    shift
    fio --name=verify --filename="$target" --ioengine=io_uring --direct=1 --rw=randwrite --bsrange=4k-256k --iodepth=16 \
        --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=7 --group_reporting --output-format=terse --terse-version=3 \
        --verify_state_save=0 --size=40m "$@"
}
fio_raw() { fio_verify "$(device wide)" --numjobs=2 --offset_increment=48m --bsrange=512-1m; }

# Zeros where they were asked for, and not one byte further.
zeroes() {
    local dev
    dev=$(device "$1")
    shift
    head -c 12M /dev/urandom >"$T/noise"
    dd if="$T/noise" of="$dev" bs=1M oflag=direct conv=notrunc status=none
    "$@" -o $((1 * M + 4096)) -l $((9 * M)) "$dev"
    dd if=/dev/zero of="$T/noise" bs=4096 seek=257 count=$((9 * 256)) conv=notrunc status=none
    dd if="$dev" of="$T/got" bs=1M count=12 iflag=direct status=none
    cmp "$T/noise" "$T/got"
}

partitions() {
    local dev
    dev=$(device wide)
    wipefs -qa "$dev"
    printf 'label: gpt\nsize=100M\nsize=64M\n' | sfdisk -q "$dev"
    until_true 10 test -b "${dev}p1"
    until_true 10 test -b "${dev}p2"
    equal 'bytes of p2' $((64 * M)) "$(blockdev --getsize64 "${dev}p2")"
    head -c 64K /dev/urandom >"$T/p2"
    dd if="$T/p2" of="${dev}p2" bs=64K oflag=direct status=none
    cmp -n $((64 * K)) "$T/p2" "${dev}p2"
    sfdisk -q --delete "$dev"
    wipefs -qa "$dev"
    [ ! -b "${dev}p1" ]
}

ext4_make() {
    mkfs.ext4 -q -F "$(device wide)"
    mkdir -p "$T/mnt"
    mount "$(device wide)" "$T/mnt"
}
ext4_files() {
    cp -r "$DST_ROOT/tests" "$T/mnt/"
    dd if=/dev/urandom of="$T/mnt/random" bs=1M count=16 conv=fsync status=none
    (cd "$T/mnt" && find . -type f -exec sha256sum {} + >"$T/sums")
}
ext4_fio() { fio_verify "$T/mnt/fio" && rm "$T/mnt/fio"; }
stop_mounted_refused() {
    refused 'mounted|in use|busy' dst stop wide
    touch "$T/mnt/still-writable"
    sync -f "$T/mnt/still-writable"
}
ext4_fsck() {
    umount "$T/mnt"
    e2fsck -fn "$(device wide)"
}
ext4_again() {
    mount -o ro "$(device wide)" "$T/mnt"
    (cd "$T/mnt" && sha256sum --check --quiet "$T/sums")
    umount "$T/mnt"
}

xfs_make() {
    mkfs.xfs -q -f "$(device long)"
    mkdir -p "$T/mnt"
    mount "$(device long)" "$T/mnt"
}
space_used() { du -sk "$T/disk1/pool" "$T/disk2/pool" | awk '{ n += $1 } END { print n }'; }
# Space that a filesystem trims comes back to the servers of a sparse array.
xfs_fstrim() {
    dd if=/dev/urandom of="$T/mnt/big" bs=1M count=64 conv=fsync status=none
    local full trimmed
    full=$(space_used)
    rm "$T/mnt/big"
    sync
    fstrim -v "$T/mnt"
    trimmed=$(space_used)
    echo "the servers held $full KiB, after fstrim $trimmed KiB"
    [ $((full - trimmed)) -gt $((48 * K)) ]
}
xfs_fio() { fio_verify "$T/mnt/fio" && rm "$T/mnt/fio"; }
xfs_check() {
    umount "$T/mnt"
    xfs_repair -n "$(device long)"
}

# A server is killed under load and comes back: the caller notices nothing.
server_restart() {
    local before
    before=$(writes_of wide)
    fio_verify "$(device wide)" >"$T/fio.out" 2>&1 &
    local fio=$!
    until_true 30 more_writes wide $((before + 100))
    kill -KILL "$pid_server2"
    until_true 10 gone "$pid_server2"
    kill -0 "$fio"
    setsid dstd server --listen 127.0.0.1:20072 --pool "$T/disk2/pool" >>"$T/server2.log" 2>&1 </dev/null &
    echo $! >"$T/pid.server2"
    wait "$fio" || { cat "$T/fio.out"; return 1; }
}

# A filesystem goes on while one of its two copies is away, and the copy has everything afterwards.
make_mirror() {
    dst volume create 127.0.0.1:20071/m --size 24M
    dst volume create 127.0.0.1:20072/m --size 24M
    dst create mirror --alg linear --replicas 2 127.0.0.1:20071/m,127.0.0.1:20072/m
    start_array mirror
    until_true 40 mirrored 2
    mkfs.ext4 -q -F "$(device mirror)"
    mkdir -p "$T/mirror"
    mount "$(device mirror)" "$T/mirror"
}
deaf() { ! connects "$1"; }
mirrored() { [ "$(dst replica list mirror | grep -c ' in sync ')" = "$1" ]; }
mirror_loses_one() {
    kill -KILL "$pid_server2"
    # Not `gone`: what an earlier check has started is nobody's child, and its remains stay.
    until_true 10 deaf 20072
    dd if=/dev/urandom of="$T/mirror/file" bs=64K count=96 conv=fsync status=none
    mirrored 1
    sha256sum "$T/mirror/file" >"$T/mirror.sum"
    setsid dstd server --listen 127.0.0.1:20072 --pool "$T/disk2/pool" >>"$T/server2.log" 2>&1 </dev/null &
    echo $! >"$T/pid.server2"
    until_true 40 mirrored 2
}
mirror_is_whole() {
    sha256sum -c --quiet "$T/mirror.sum"
    umount "$T/mirror"
    e2fsck -fn "$(device mirror)"
    dst stop mirror
    cmp "$T/disk1/pool/m" "$T/disk2/pool/m"
    dst remove mirror
}
# A node of a busy filesystem moves to another server; then another one is suspended, and fsync elsewhere goes on.
roam_io_errors() { dmesg | grep -c "I/O error, dev $(basename "$(device roam)")" || true; }
make_roam() {
    local n
    for n in 1 2; do
        dst volume create "127.0.0.1:2007$n/r$n" --size 16M
        dst volume create "127.0.0.1:2007$n/s$n" --size 16M
    done
    dst create roam --alg linear 127.0.0.1:20071/r1 127.0.0.1:20072/r2 127.0.0.1:20071/s1 127.0.0.1:20072/s2
    start_array roam
    mkfs.ext4 -q -F "$(device roam)"
    mkdir -p "$T/roam"
    mount "$(device roam)" "$T/roam"
    # In the first node, as everything that is made first.
    dd if=/dev/urandom of="$T/roam/low" bs=64k count=32 conv=fsync status=none
    roam_io_errors >"$T/roam.errors"
}
roam_writer() {
    local n=0
    until [ -e "$T/roam.enough" ]; do
        dd if=/dev/urandom of="$T/roam/busy.$((n % 8))" bs=64k count=8 conv=fsync status=none || return 1
        n=$((n + 1))
    done
    echo "$n files were written meanwhile"
    [ "$n" -gt 0 ]
}
migrate_busy() {
    local writer failed=
    rm -f "$T/roam.enough"
    roam_writer >"$T/roam.out" 2>&1 &
    writer=$!
    dst migrate roam n-0 --to 127.0.0.1:20073/ | tee "$T/moved" || failed=yes
    touch "$T/roam.enough"
    wait "$writer" && [ -z "$failed" ] || { cat "$T/roam.out"; return 1; }
    cat "$T/roam.out"
    grep -q 'requests waited for' "$T/moved"
    dst status roam | grep -q '^ *n-0 .*127.0.0.1:20073/'
}
suspend_one_of_four() {
    local n=0 reader until=$((SECONDS + suspended))
    dst suspend roam n-98304 --ttl none
    dst status roam | grep -q frozen
    dd if="$(device roam)" of=/dev/null bs=4k count=1 skip=$((60 * 256)) iflag=direct status=none &
    reader=$!
    while [ "$SECONDS" -lt "$until" ]; do
        n=$((n + 1))
        timeout 20 dd if=/dev/urandom of="$T/roam/low" bs=64k count=32 conv=notrunc,fsync status=none || {
            echo "fsync $n on another node did not end"
            dst why roam
            return 1
        }
        sleep 1
    done
    echo "$n times fsync on another node"
    kill -0 "$reader" || { echo "a read of the suspended node ended"; return 1; }
    dst resume roam n-98304
    wait "$reader"
}
roam_is_whole() {
    find "$T/roam" -type f -exec sha256sum {} + >"$T/roam.sums"
    umount "$T/roam"
    e2fsck -fn "$(device roam)"
    mount -o ro "$(device roam)" "$T/roam"
    sha256sum -c --quiet "$T/roam.sums"
    umount "$T/roam"
    equal 'I/O errors in dmesg' "$(cat "$T/roam.errors")" "$(roam_io_errors)"
    dst stop roam
    dst remove roam
}
# Programs that have little memory, and the pages that wait to be written are most of it: to get any, what is written must be written.
make_tense() {
    dst volume create 127.0.0.1:20071/t1 --size 128M --sparse
    dst volume create 127.0.0.1:20072/t2 --size 128M --sparse
    dst create tense --alg striped 127.0.0.1:20071/t1 127.0.0.1:20072/t2
    start_array tense
    mkfs.ext4 -q -F "$(device tense)"
    mkdir -p "$T/tense" "$T/cgroup"
    mount "$(device tense)" "$T/tense"
    mount -t cgroup2 none "$T/cgroup"
    echo +memory >"$T/cgroup/cgroup.subtree_control"
    mkdir "$T/cgroup/tense"
    # Who is above this has to make room before it gets more; nobody is killed for it.
    echo $((40 * M)) >"$T/cgroup/tense/memory.high"
}
press_memory() {
    # The shell that goes in is the one that becomes stress-ng.
    timeout $((pressed + 120)) bash -c 'echo $$ >"$1" && shift && exec "$@"' - "$T/cgroup/tense/cgroup.procs" \
        stress-ng --temp-path "$T/tense" --timeout "$pressed" --verify --metrics-brief \
        --hdd 2 --hdd-bytes 64M --hdd-opts wr-seq --vm 1 --vm-bytes 16M --vm-keep
    awk '$1 == "high" { print "so often memory was at its limit:", $2; exit $2 == 0 }' "$T/cgroup/tense/memory.events"
    ! dmesg | grep -E 'blocked for more than|hung_task'
}
tense_is_whole() {
    umount "$T/tense" "$T/cgroup"
    e2fsck -fn "$(device tense)"
    dst stop tense
    dst remove tense
}
writes_of() { awk '{ print $5 }' "/sys/block/$(basename "$(device "$1")")/stat"; }
more_writes() { [ "$(writes_of "$1")" -gt "$2" ]; }

make_sick() {
    dst volume create 127.0.0.1:20074/sick --size 32M
    dst create sick --alg linear 127.0.0.1:20074/sick
    start_array sick
    dd if=/dev/urandom of="$(device sick)" bs=64k count=16 oflag=direct conv=fsync status=none
}
# swap_table TABLE puts another table under the running disk.
swap_table() {
    dmsetup suspend --noflush --nolockfs sickdisk
    dmsetup load sickdisk --table "$1"
    dmsetup resume sickdisk
}
eio_reaches_write() {
    swap_table "0 $sick_sectors error"
    refused 'Input/output error' dd if=/dev/zero of="$(device sick)" bs=64k count=1 oflag=direct conv=notrunc status=none
}
eio_reaches_read() { refused 'Input/output error' dd if="$(device sick)" of=/dev/null bs=64k count=1 iflag=direct status=none; }
eio_reaches_fsync() {
    # Buffered, so that only the fsync can fail.
    refused 'Input/output error' dd if=/dev/zero of="$(device sick)" bs=64k count=1 conv=notrunc,fsync status=none
}
# The other arrays do not care.
others_unharmed() { dd if=/dev/urandom of="$(device wide)" bs=64k count=4 oflag=direct conv=fsync status=none; }

make_tight() {
    dst volume create 127.0.0.1:20075/tight --size 128M --sparse
    dst create tight --alg linear 127.0.0.1:20075/tight
    start_array tight
    head -c 24M /dev/zero >"$T/disk5/ballast"
}
enospc_reaches_write() {
    refused 'No space left on device' dd if=/dev/urandom of="$(device tight)" bs=256k count=400 oflag=direct conv=notrunc status=none
}
enospc_passes() {
    rm "$T/disk5/ballast"
    dd if=/dev/urandom of="$(device tight)" bs=256k count=40 oflag=direct conv=notrunc,fsync status=none
}
preallocated_refused() {
    refused 'no space|space|full' dst volume create 127.0.0.1:20075/huge --size 4G
    ! dst volume list 127.0.0.1:20075 | grep -q huge
}

stop_and_remove() {
    local array dev
    for array in wide long tight; do
        dev=$(device "$array")
        dst stop "$array"
        [ ! -b "$dev" ]
        [ ! -e "/dev/dst/$array" ]
        dst remove "$array"
    done
}
daemon_leaves_cleanly() {
    kill -TERM "$pid_array"
    until_true 30 gone "$pid_array"
    ! compgen -G '/dev/ublkc*'
}

# --- the run ---------------------------------------------------------------------------------------------------------

# /dev/ram0 and 1 are the disks of two servers, ram2 that of `sick`.
modprobe -r brd
modprobe brd rd_nr=3 rd_size=$((640 * K))
for n in 0 1 2; do mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=1 /dev/ram$n; done
mount_disk 1 /dev/ram0
mount_disk 2 /dev/ram1
mount_disk 3 -t tmpfs -o size=256M tmpfs
sick_sectors=$(blockdev --getsz /dev/ram2)
dmsetup create sickdisk --table "0 $sick_sectors linear /dev/ram2 0"
mount_disk 4 /dev/mapper/sickdisk
mount_disk 5 -t tmpfs -o size=48M tmpfs

step "servers, volumes, arrays"
for n in 1 2 3 4 5; do start_server $n; done
start_array_daemon
check "volumes and arrays are created" create_arrays
check "a striped array starts with 2 queues" start_array wide --queues 2
check "a linear array of 4096-byte blocks starts" start_array long
check "two hardware queues" two_queues
check "/dev/dst/wide leads to the device" stable_link
check "queue limits, striped, 512" limits_wide
check "queue limits, linear, 4096" limits_long

step "the raw device"
check "fio verify, 512 bytes to 1 MiB, 2 jobs" fio_raw
check "blkdiscard -z zeroes just that, preallocated" zeroes wide blkdiscard -z
check "blkdiscard -z zeroes just that, sparse" zeroes long blkdiscard -z
check "blkdiscard reads back as zeros, preallocated" zeroes wide blkdiscard
check "blkdiscard reads back as zeros, sparse" zeroes long blkdiscard
check "a partition table, its partitions appear and go" partitions

step "ext4 on the striped array"
check "mkfs.ext4 and mount" ext4_make
check "files" ext4_files
check "fio verify on ext4" ext4_fio
check "fstrim on ext4" fstrim -v "$T/mnt"
check "stop while mounted is refused" stop_mounted_refused
check "e2fsck finds nothing" ext4_fsck
check "every file is as it was" ext4_again

step "xfs on the linear array"
check "mkfs.xfs and mount" xfs_make
check "fstrim gives the space back to the servers" xfs_fstrim
check "fio verify on xfs" xfs_fio
check "xfs_repair finds nothing" xfs_check

step "processes that die"
check "a server is killed under load and restarted" server_restart
pid_server2=$(cat "$T/pid.server2")
check "ext4 on an array with two replicas" make_mirror
check "a replica's server is killed: the writes go on, and it is synced again" mirror_loses_one
pid_server2=$(cat "$T/pid.server2")
check "both copies are the same, and e2fsck finds nothing" mirror_is_whole
check "ext4 on a linear array of four nodes" make_roam
check "a node moves to another server while files are written" migrate_busy
CHECK_SECONDS=$((60 + suspended)) check "one of four nodes is suspended: fsync elsewhere goes on" suspend_one_of_four
check "e2fsck finds nothing, and no I/O error was logged" roam_is_whole

step "memory is short"
check "ext4 on a striped array, and a limit of memory" make_tense
CHECK_SECONDS=$((180 + pressed)) check "files are written while memory is short, nothing hangs" press_memory
check "e2fsck finds nothing" tense_is_whole

step "disks that fail"
check "an array on a disk that will fail" make_sick
check "EIO reaches write" eio_reaches_write
check "EIO reaches read" eio_reaches_read
check "EIO reaches fsync" eio_reaches_fsync
check "the other array is unharmed" others_unharmed
check "an array on a disk that is nearly full" make_tight
check "ENOSPC reaches write" enospc_reaches_write
check "writes go on when there is space again" enospc_passes
check "a volume larger than the pool is refused" preallocated_refused

step "the end"
check "stop and remove" stop_and_remove
check "SIGTERM leaves no device behind" daemon_leaves_cleanly

keep_logs
finish_checks
