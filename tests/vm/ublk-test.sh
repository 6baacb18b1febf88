#!/bin/bash
# The ublk frontend alone, without an array: `ublk-target` (tests/vm/ublk_target.rs) serves from nothing or from a file in memory.
# Runs in the guest: tests/vm/boot.sh tests/vm/ublk-test.sh [debug|release [brief]]; brief: without measuring.
set -uo pipefail
source "$DST_ROOT/tests/vm/lib.sh"
prepare_guest ublk_drv
target=$DST_ROOT/target/${1:-release}/examples/ublk-target

# start_target NAME ARGUMENT...: a target whose standard input is $T/NAME.in.
start_target() {
    local name=$1
    shift
    rm -f "$T/$name.in" "$T/$name.log"
    mkfifo "$T/$name.in"
    exec {keep}<>"$T/$name.in"
    start_daemon "$name" sh -c 'exec "$@" <"$0"' "$T/$name.in" "$target" "$@"
    until_true 20 grep -qE '^ready|^ublk-target:' "$T/$name.log" || cat "$T/$name.log"
    dev=$(sed -n 's/^ready //p' "$T/$name.log")
}
tell() { echo "$2" >"$T/$1.in"; }
said() { until_true "${3:-20}" grep -qE -- "$2" "$T/$1.log" || { cat "$T/$1.log"; return 1; }; }
# busy [COUNT]: fio has begun, and that many writes are at the target.
busy() { until_true 20 grep -qE " ${1:-[1-9][0-9]*}\$" "/sys/block/${dev#/dev/}/inflight"; }
limit() { cat "/sys/block/${dev#/dev/}/queue/$1"; }
# What the last stop must leave: no device, no process.
nothing_left() {
    until_true 20 gone "$1"
    until_true 20 test ! -e "/sys/class/ublk-char/ublkc${dev#/dev/ublkb}"
    [ ! -e "$dev" ]
}
verify() { fio --name=v --filename="$1" --direct=1 --ioengine=libaio --verify=crc32c --verify_state_save=0 --verify_fatal=1 --group_reporting "${@:2}"; }


step "null device"
check "preflight" "$target" check
start_target null null --size 8G --queues 1 --depth 64
check "a null device starts" test -b "$dev"
floor() {
    local rw
    for rw in randread randwrite; do
        fio --name=floor --filename="$dev" --direct=1 --ioengine=libaio --rw="$rw" --bs=4k --iodepth=32 --runtime=2 --time_based \
            --output-format=json --output="$T/fio.json"
        echo "floor: ublk null, $rw 4K, QD32: $(python3 -c 'import json,sys; j=json.load(open(sys.argv[1]))["jobs"][0]; print(int(j["read"]["iops"]+j["write"]["iops"]))' "$T/fio.json") IOPS" | tee -a "$T/floor"
    done
}
if [ "${2-}" != brief ]; then
    check "floor of measurements" floor
    cat "$T/floor"
fi
tell null info
check "status reads the device" said null '"sectors":16777216'
tell null stop
check "it stops" said null '^stopped'
check "nothing is left" nothing_left "$pid_null"

step "a device with data: 2 queues, 64K chunks, 512-byte blocks"
start_target file file "$T/data" --size 512M --queues 2 --depth 64 --chunk 64K
limits() {
    equal logical 512 "$(limit logical_block_size)"
    equal physical 4096 "$(limit physical_block_size)"
    equal chunk 0 "$(limit chunk_sectors)"
    equal io_min 65536 "$(limit minimum_io_size)"
    equal io_opt 131072 "$(limit optimal_io_size)"
    equal max_sectors 128 "$(limit max_hw_sectors_kb)"
    equal cache "write back" "$(limit write_cache)"
    equal fua 1 "$(limit fua)"
    equal discard 1073741824 "$(limit discard_max_hw_bytes)"
    equal granularity 4096 "$(limit discard_granularity)"
    equal write_zeroes 1073741824 "$(limit write_zeroes_max_bytes)"
    equal timeout 5000 "$(limit io_timeout)"
    equal size 1048576 "$(cat "/sys/block/${dev#/dev/}/size")"
    equal queues 2 "$(ls "/sys/block/${dev#/dev/}/mq" | wc -l)"
}
check "limits in sysfs" limits
check "fio verify, random 512 B to 1 MiB, 2 jobs" verify "$dev" --rw=randwrite --bsrange=512-1M --bs_unaligned=0 --size=32M --offset_increment=128M --numjobs=2 --iodepth=32
check "fio verify with fsync" verify "$dev" --rw=randwrite --bs=4k --size=8M --iodepth=8 --fsync=16
check "fio verify with O_SYNC (FUA)" verify "$dev" --rw=randwrite --bs=4k --size=4M --iodepth=8 --sync=1
discard() {
    dd if=/dev/urandom of="$dev" bs=1M count=8 oflag=direct status=none
    blkdiscard -o 1M -l 4M "$dev"
    cmp -n 4194304 -i 1048576:0 "$dev" /dev/zero
    blkdiscard -z -o 0 -l 1M "$dev"
    cmp -n 1048576 "$dev" /dev/zero
    # What lies beyond is untouched.
    dd if="$dev" of="$T/beyond" bs=1M skip=5 count=3 iflag=direct status=none
    refused differ cmp -n 3145728 "$T/beyond" /dev/zero
}
check "discard and write-zeroes" discard
partitions() {
    echo ',64M' | sfdisk -q "$dev"
    until_true 5 test -b "${dev}p1"
    dd if=/dev/zero of="${dev}p1" bs=64k count=16 oflag=direct status=none
}
check "partition table" partitions
partition_in_use() {
    mkfs.ext4 -qF "${dev}p1"
    mkdir -p "$T/p1"
    mount "${dev}p1" "$T/p1"
    tell file stop
    said file "refused $dev is mounted on $T/p1"
    umount "$T/p1"
    wipefs -qa "$dev"
}
check "stop is refused while a partition is mounted" partition_in_use
filesystem() {
    mkfs.ext4 -qF "$dev"
    mkdir -p "$T/mnt"
    mount "$dev" "$T/mnt"
    head -c 64M /dev/urandom >"$T/random"
    cp "$T/random" "$T/mnt/copy"
    sync
    fstrim "$T/mnt"
    cmp "$T/random" "$T/mnt/copy"
}
check "mkfs.ext4, mount, copy, fstrim" filesystem
tell file stop
check "stop is refused while mounted" said file "refused $dev is mounted on $T/mnt; unmount it first"
check "and it works on" cmp "$T/random" "$T/mnt/copy"
check "umount" umount "$T/mnt"
check "e2fsck" e2fsck -fn "$dev"
held_open() {
    sleep 30 <"$dev" &
    local holder=$!
    # It is sleep only when the shell that it was has opened the device.
    until_true 10 grep -qx sleep "/proc/$holder/comm"
    tell file stop
    said file "refused $dev is open in sleep \(pid $holder\)"
    kill "$holder"
}
check "stop is refused while open" held_open
check "a live device is no leftover" test -z "$("$target" leftovers --delete)"
tell file stop
check "it stops" said file '^stopped'
check "nothing is left" nothing_left "$pid_file"

step "4096-byte blocks"
start_target big file "$T/data" --size 256M --block 4096 --buffer 1M
check "logical block" equal logical 4096 "$(limit logical_block_size)"
check "largest request" equal max 1024 "$(limit max_hw_sectors_kb)"
check "fio verify" verify "$dev" --rw=randwrite --bsrange=4k-1M --size=64M --iodepth=16
check "512 bytes are refused" refused 'invalid argument' dd if=/dev/zero of="$dev" bs=512 count=1 oflag=direct
forced() {
    fio --name=load --filename="$dev" --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=64 --runtime=60 --time_based >"$T/load.out" 2>&1 &
    local load=$!
    busy
    tell big force
    said big '^stopped'
    until_true 20 gone "$load"
    grep -qi 'error' "$T/load.out"
}
check "forced stop under load" forced
check "nothing is left" nothing_left "$pid_big"

step "the worker fails"
start_target failing file "$T/data" --size 256M --queues 2
failing() {
    tell failing fail
    refused 'input/output error' dd if="$dev" of=/dev/null bs=64k count=2000 iflag=direct
    said failing '^ended the worker of queue . failed: told to fail'
}
check "its device ends with EIO" failing
check "the device is gone" until_true 20 test ! -e "$dev"
tell failing stop
check "a device that is gone is stopped" said failing '^stopped'

step "a start that fails"
start_target broken broken --queues 2
check "workers that fail at once end the device" said broken '^ended the worker of queue . failed: broken from the start'
tell broken drop
check "and nothing is left" nothing_left "$pid_broken"
# One descriptor too few for the rings of two queues.
no_descriptor() {
    refused 'queue .: making the ring: .*24' timeout 20 prlimit --nofile=9 "$target" file "$T/data" --queues 2
    equal devices "" "$(ls /sys/class/ublk-char)"
}
check "a queue that cannot be made" no_descriptor
check "more blocks than the driver takes" refused 'logical block of 1024' "$target" null --block 1024

step "the daemon dies"
start_target killed file "$T/data" --size 256M --depth 16
killed() {
    fio --name=load --filename="$dev" --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=64 --runtime=60 --time_based >"$T/load.out" 2>&1 &
    local load=$!
    busy
    kill -KILL "$pid_killed"
    until_true 40 sh -c "$target leftovers | grep -q 'owner 0x74657374 live true'"
    sleep 1
    ! gone "$load"
    "$target" leftovers --delete
    until_true 40 gone "$load"
    grep -qi 'error' "$T/load.out"
    until_true 40 test ! -e "$dev"
}
check "its device waits; deleted, it ends with EIO" killed
check "and gone" equal leftovers "" "$("$target" leftovers)"
# No tag is left at the kernel, so nothing but its request timer can notice. Kernels before 6.16 need it.
saturated() {
    tell full hang
    fio --name=load --filename="$dev" --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=64 --runtime=60 --time_based >"$T/load.out" 2>&1 &
    local load=$!
    busy 16
    # From 6.16 on the kernel gives back what a dead daemon has in hand when the last of its threads has gone, and the one that waits inside STOP_DEV for
    # those very requests never does: docs/RELIABILITY.md.
    if ! from_linux 6.16; then
        tell full impatient
        said full 'refused ublk: STOP_DEV .* has not ended after 3 s'
    fi
    kill -KILL "$pid_full"
    until_true 20 sh -c "$target leftovers | grep -q live"
    "$target" leftovers --delete
    until_true 20 gone "$load"
    until_true 20 test ! -e "$dev"
}
start_target full file "$T/data" --size 256M --depth 16
check "with every request in its hands" saturated
mounted_when_killed() {
    mkfs.ext4 -qF "$dev"
    mount "$dev" "$T/mnt"
    kill -KILL "$pid_mounted"
    until_true 40 sh -c "$target leftovers | grep -q live"
    "$target" leftovers --delete
    umount "$T/mnt"
    until_true 20 test ! -e "/sys/class/ublk-char/ublkc${dev#/dev/ublkb}"
}
start_target mounted file "$T/data" --size 256M
check "a leftover that is mounted is deleted too" mounted_when_killed

# Linux 6.16 has taught ublk both; with an older one each must be refused clearly, and the device be as it was.
sectors() { cat "/sys/block/${dev#/dev/}/size"; }
completed() { awk '{ print $1 + $5 }' "/sys/block/${dev#/dev/}/stat"; }
# What is written is compared when it is told to end.
load() {
    setsid fio --name=load --filename="$dev" --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=32 --size=32M --loops=1000000 \
        --verify=crc32c --verify_fatal=1 --verify_state_save=0 --serialize_overlap=1 >"$T/load.out" 2>&1 </dev/null &
    echo $! >"$T/load.pid"
    disown
}
load_goes_on() {
    local before
    before=$(completed)
    until_true 40 more_completed "$before"
    ! gone "$(<"$T/load.pid")"
}
more_completed() { [ "$(completed)" -gt $(($1 + 100)) ]; }
load_ends() {
    kill -INT "$(<"$T/load.pid")"
    until_true 40 gone "$(<"$T/load.pid")"
    cat "$T/load.out"
    ! grep -Eiq 'verify:|verify failed|Input/output error|err= *[1-9]' "$T/load.out"
}
# recover NAME ARGUMENT...: serves on what the last one has left.
recover() {
    start_target "$1" file "$T/sized" --recover "${@:2}"
    [ -b "$dev" ] || { cat "$T/$1.log"; dev=$device; }
}

step "resize, while it is in use"
start_target sized file "$T/sized" --size 256M --queues 2 --depth 16
device=$dev
load
check "it is written" load_goes_on
grows() {
    tell sized 'resize 320M'
    said sized '^resized'
    equal sysfs 655360 "$(sectors)"
    equal blockdev 335544320 "$(blockdev --getsize64 "$dev")"
    dd if=/dev/urandom of="$T/tail" bs=1M count=32 status=none
    dd if="$T/tail" of="$dev" bs=1M seek=288 oflag=direct status=none
    cmp -n 33554432 -i 0:301989888 "$T/tail" "$dev"
}
is_refused() {
    tell sized 'resize 320M'
    said sized "refused $dev cannot change its size while it is in use.* 6.16 .*after a stop and a start"
    equal sysfs 524288 "$(sectors)"
}
if from_linux 6.16; then
    check "a device grows under its writer" grows
    tell sized 'resize 256M'
    check "it does not shrink" said sized 'refused .* 655360 sectors: it cannot be cut to 524288'
    check "the size stays" equal sysfs 655360 "$(sectors)"
    kill -KILL "$pid_sized"
    recover other --size 256M
    check "grown, it is no other device's" said other 'ublk-target: the device .* sectors: 655360, not 524288'
    recover grown --size 320M
    check "the next daemon serves it on" equal sysfs 655360 "$(sectors)"
    check "its writer noticed nothing" load_goes_on
    kill -KILL "$pid_grown"
    recover behind --size 384M
    check "one that died on the way is caught up with" until_true 10 sh -c "[ \$(cat /sys/block/${dev#/dev/}/size) = 786432 ]"
    check "its writer noticed nothing" load_goes_on
    serving=behind
else
    check "a resize is refused" is_refused
    serving=sized
fi

step "quiesce"
# Nothing comes through any more, nothing fails.
is_quiet() {
    local before
    before=$(completed)
    sleep 1
    equal completed "$before" "$(completed)"
    ! gone "$(<"$T/load.pid")"
}
# One queue's tags are all with the target.
all_in_hand() { awk '{ exit $1 + $2 < 16 }' "/sys/block/${dev#/dev/}/inflight"; }
tell "$serving" quiesce
if from_linux 6.16; then
    check "what is in flight ends" said "$serving" '^quiesced'
    check "and no more comes: its writer waits" is_quiet
    tell "$serving" force
    check "there is no way back" said "$serving" 'refused ublk: a device that waits for the next daemon'
    kill -KILL "$(eval "echo \$pid_$serving")"
    recover quiet --size 384M
    check "the next daemon serves it on" load_goes_on
    tell quiet hang
    until_true 20 all_in_hand
    tell quiet quiesce
    check "what hangs is not waited for" said quiet 'refused ublk: ([0-9]+ request.s. have not ended within 1000 ms|QUIESCE_DEV)' 5
    kill -KILL "$pid_quiet"
    recover after --size 384M
    check "the next daemon makes it again" load_goes_on
    serving=after
else
    check "it is refused" said "$serving" "refused $dev cannot be quiesced: .* 6.16 "
fi
check "its writer goes on" load_goes_on
check "and finds what it has written" load_ends
tell "$serving" stop
check "it stops" said "$serving" '^stopped'

step "drop"
start_target dropped null
check "a new device starts" test -b "$dev"
tell dropped drop
check "dropping it stops it" said dropped '^dropped'
check "nothing is left" nothing_left "$pid_dropped"

finish_checks
