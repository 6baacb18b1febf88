#!/bin/bash
# The device outlives its daemon: `kill -9` under load, and the next daemon serves the same device on. Runs in the guest of boot.sh;
# each check is counted. Arguments: rounds on the raw device, and on the mounted filesystem; without any of the latter it is short: no death
# during another one, and none during a migration.
#
# `wide` is striped over two servers, its device is used raw; `roam` is linear over four volumes of them, with ext4. A third server has nothing,
# for migrations.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/vm/lib.sh
. "$here/lib.sh"
export LC_ALL=C
RAW=${1:-5} FS=${2:-3}
# A recovery takes seconds under emulation, and a check waits for several things.
CHECK_SECONDS=150

prepare_guest ublk_drv ext4
export DST_SOCKET=$T/dstd.sock
cd "$T" || exit 1

start_server() {
    mkdir -p "$T/pool$1"
    start_daemon "server$1" dstd server --listen "127.0.0.1:2007$1" --pool "$T/pool$1"
    until_true 30 connects "2007$1"
}
# With the capabilities of its unit and no others.
capabilities=$(sed -n 's/^CapabilityBoundingSet=//p' "$DST_ROOT/dst-cli/dist/dstd-array.service" | sed 's/CAP_/+/g; s/ /,/g' | tr '[:upper:]' '[:lower:]')
# What starts a daemon runs where its process id is kept: not in a check.
start_array_daemon() {
    start_daemon array setpriv --no-new-privs --bounding-set "-all,$capabilities" \
        dstd array --state-dir "$T/state" --run-dir "$T/run" --socket "$DST_SOCKET"
}
# kill_and_start: at once, as a service manager does.
kill_and_start() {
    # shellcheck disable=SC2154 # start_daemon sets it
    kill -KILL "$pid_array"
    start_array_daemon
}
device() { cat "$T/dev.$1"; }
node() { sed -n "$(($2 + 1))p" "$T/nodes.$1"; }
started() { dst status "$1" --json | grep -q '"state": *"started"'; }
served() { until_true 60 started "$1" && equal "the device of $1" "$(device "$1")" "$(readlink -f "/dev/dst/$1")"; }

make_arrays() {
    local n
    for n in 1 2; do dst volume create "127.0.0.1:2007$n/w" --size 96M; done
    dst create wide --alg striped 127.0.0.1:20071/w 127.0.0.1:20072/w
    for n in 1 2 3 4; do dst volume create "127.0.0.1:2007$((n % 2 + 1))/r$n" --size 48M; done
    dst create roam --alg linear 127.0.0.1:20072/r1 127.0.0.1:20071/r2 127.0.0.1:20072/r3 127.0.0.1:20071/r4
    for n in roam wide; do
        dst start "$n" --io-timeout 20s | grep -o '/dev/ublkb[0-9]*' | head -n 1 >"$T/dev.$n"
        [ -b "$(device "$n")" ]
        [ -e "$T/locked" ] || locked >"$T/locked"
        dst status "$n" --json | grep -o '"n-[0-9]*"' | tr -d '"' | awk '!seen[$0]++' >"$T/nodes.$n"
    done
    mkfs.ext4 -q -F -E lazy_itable_init=1 "$(device roam)"
    mkdir -p "$T/mnt"
    mount "$(device roam)" "$T/mnt"
}

# Verified writes on the raw device until they are told to stop.
raw_load() {
    setsid fio --name=raw --filename="$(device wide)" --direct=1 --ioengine=libaio --rw=randwrite --bsrange=4k-64k --iodepth=16 --size=24m \
        --numjobs=2 --offset_increment=24m --verify=crc32c --verify_fatal=1 --verify_state_save=0 --loops=1000000 --time_based --runtime=3600 \
        --serialize_overlap=1 --fsync=64 >"$T/raw.out" 2>&1 </dev/null &
    echo $! >"$T/raw.pid"
    disown
}
raw_goes_on() {
    local before
    ! gone "$(<"$T/raw.pid")" || { tail -n 30 "$T/raw.out"; return 1; }
    before=$(awk '{ print $5 }' "/sys/block/$(basename "$(device wide)")/stat")
    until_true 60 more_writes "$before"
    ! gone "$(<"$T/raw.pid")"
}
more_writes() { [ "$(awk '{ print $5 }' "/sys/block/$(basename "$(device wide)")/stat")" -gt $(($1 + 50)) ]; }
raw_ends() {
    # It reads back and compares all it has written.
    kill -INT "$(<"$T/raw.pid")"
    until_true 60 gone "$(<"$T/raw.pid")"
    cat "$T/raw.out"
    ! grep -Eiq 'verify:|verify failed|Input/output error|err= *[1-9]' "$T/raw.out"
}

# Files with their sums, each synced, until there is a file `stop`.
fs_load() {
    setsid bash -c '
        cd "$1" || exit 1
        n=0
        while [ ! -e "$2/stop" ]; do
            n=$((n + 1))
            head -c $((RANDOM * 8 + 1)) /dev/urandom >"f$((n % 40))" && sync "f$((n % 40))" || exit 1
            sha256sum "f$((n % 40))" >"$2/sum.$((n % 40))" || exit 1
            echo "$n" >"$2/count"
        done' - "$T/mnt" "$T" >"$T/fs.out" 2>&1 </dev/null &
    echo $! >"$T/fs.pid"
    disown
}
fs_goes_on() {
    local before
    before=$(<"$T/count")
    until_true 60 more_files "$before"
    ! gone "$(<"$T/fs.pid")"
}
more_files() { [ "$(<"$T/count")" -gt $(($1 + 3)) ]; }
fs_ends() {
    touch "$T/stop"
    until_true 60 gone "$(<"$T/fs.pid")"
    cat "$T/fs.out"
    equal 'what the writer said' 0 "$(wc -c <"$T/fs.out")"
    echo 3 >/proc/sys/vm/drop_caches
    (cd "$T/mnt" && cat "$T"/sum.* | sha256sum --quiet -c)
}
fs_is_whole() {
    umount "$T/mnt"
    e2fsck -fn "$(device roam)"
    mount "$(device roam)" "$T/mnt"
}
no_io_error() { ! dmesg | grep -Ei 'I/O error|Buffer I/O|blk_update_request'; }

suspend_survives() {
    until_true 60 started roam
    dst status roam
    dst get "devices/roam/$(node roam 1)/suspend" | grep -q '^1'
    served wide
    raw_goes_on
    dst resume roam "$(node roam 1)"
    served roam
    fs_goes_on
}
migration_survives() {
    until_true 60 started roam
    served roam
    until_true 120 moved
    dst migration list roam
    fs_goes_on
}
late() { dst status roam | grep -q 'served without a node that is late: .*127.0.0.1:20073/'; }
one_is_late() {
    until_true 60 late
    dst status roam
    served roam
    served wide
}
in_time() { ! late; }
comes_late() {
    until_true 60 in_time
    served roam
}
# On a machine that is slow for a moment a migration may have been given up: then it is asked for again, as anybody would.
moved() {
    dst replica list roam | grep -q '127.0.0.1:20073/' && return
    dst migrate roam "$(node roam 2)" --to 127.0.0.1:20073/ --detach
    false
}

# The last node's volume gets 16 MiB more. From Linux 6.16 on the device has them at once, and the filesystem takes them; else at its next start.
sectors() { cat "/sys/block/$(basename "$(device roam)")/size"; }
grows() {
    local before
    before=$(sectors)
    dst volume resize 127.0.0.1:20071/r4 --size 64M
    if from_linux 6.16; then
        dst grow roam
        equal "sectors of the device" $((before + 32768)) "$(sectors)"
        resize2fs "$(device roam)"
    else
        refused 'cannot change its size while it is in use' sh -c 'dst grow roam 2>&1; false'
        equal "sectors of the device" "$before" "$(sectors)"
    fi
    fs_goes_on
}
keeps_its_size() {
    served roam
    equal "sectors of the device" "$1" "$(sectors)"
    fs_goes_on
}

# Not one of its threads waits for writeback, the kernel's workers for its rings included (PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE).
all_are_flushers() {
    local task flags seen=0
    for task in "/proc/$pid_array/task"/*; do
        flags=$(sed 's/.*) //' "$task/stat" | cut -d' ' -f7) || continue
        [ $((flags & 0x180000)) = $((0x180000)) ] || { echo "$(<"$task/comm") has $flags"; return 1; }
        seen=$((seen + 1))
    done
    [ "$seen" -gt 8 ]
}
# KiB that the array daemon has locked.
locked() { sed -n 's/^VmLck:[^0-9]*\([0-9]*\) kB/\1/p' "/proc/$pid_array/status"; }
# One array of four nodes, two queues, 128 deep, buffers of 128 KiB; then another one of two nodes.
locks_little() {
    local one both
    one=$(<"$T/locked")
    both=$(locked)
    echo "$one KiB are locked with one array, $both KiB with two"
    [ "$one" -gt 32768 ] && [ "$one" -le 65536 ] && [ "$both" -gt "$one" ] && [ "$both" -lt 131072 ]
}
has_no_mounts() {
    [ "$(readlink "/proc/$pid_array/ns/mnt")" != "$(readlink /proc/self/ns/mnt)" ]
    equal "what is mounted there" "" "$(<"/proc/$pid_array/mountinfo")"
}

# The same process goes on as another program, with both devices in use.
upgrades() {
    # Moved, not written over: as a package does it.
    cp "$(command -v dstd)" "$T/dstd.new"
    mv "$T/dstd.new" "$(command -v dstd)"
    readlink "/proc/$pid_array/exe" | grep -q deleted
    dst upgrade >"$T/upgraded"
    cat "$T/upgraded"
    ! readlink "/proc/$pid_array/exe" | grep -q deleted
    dst upgrade --json | grep -q '"upgrades": 2'
}
# Linux 6.16 can keep requests back while those in flight end; with an older one an upgrade is a death.
# prepared DEVICES: so many were left by QUIESCE, at least half of them in time.
prepared() {
    local quiet late
    quiet=$(grep -c 'quiesced: nothing is in flight' "$T/array.log") || true
    late=$(grep -c 'not quiesced: left as after a death' "$T/array.log") || true
    grep -E 'quiesced' "$T/array.log"
    equal "devices that were left" "$1" $((quiet + late))
    [ "$quiet" -ge $(($1 / 2)) ]
}
unprepared() { ! grep -q quiesced "$T/array.log"; }
upgrades_suspended() {
    setsid dd if="$(device roam)" of=/dev/null bs=4k count=1 skip=$((60 * 256)) iflag=direct &
    until_true 20 parked
    dst upgrade
    from_linux 6.16 || return 0
    grep 'left as it is: requests wait at suspended nodes' "$T/array.log"
}
parked() { dst get "devices/roam/$(node roam 1)/parked" | grep -q '^[1-9]'; }
went_unnoticed() {
    grep -Eq "^wide  $(device wide)  waited [0-9.]+ s$" "$T/upgraded"
    grep -Eq "^roam  $(device roam)  waited [0-9.]+ s$" "$T/upgraded"
    served wide
    raw_goes_on
    served roam
    fs_goes_on
    all_are_flushers
    has_no_mounts
}

list_waiting() {
    dst device list
    dst device list | grep -q "$(device roam) *roam *waiting"
    refused 'dst stop roam' dst device delete "$(device roam)"
}

step "servers and arrays"
for n in 1 2 3; do start_server $n; done
start_array_daemon
until_true 30 dst list
check "arrays are started, one with a busy ext4" make_arrays
raw_load
echo 0 >"$T/count"
fs_load
check "the raw device is written" raw_goes_on
check "the filesystem is written" fs_goes_on

check "each thread of the daemon is an I/O flusher" all_are_flushers
check "its memory is locked, and little of it" locks_little
check "it has nothing mounted" has_no_mounts

step "kill -9 and start again"
for ((round = 1; round <= RAW; round++)); do
    echo "round $round"
    sleep "0.$((RANDOM % 10))"
    from=${EPOCHREALTIME/./}
    kill_and_start
    check "the same raw device is served on" served wide
    [ "$round" -gt "$FS" ] || check "the same mounted device is served on" served roam
    echo "back after $(((${EPOCHREALTIME/./} - from) / 1000)) ms"
    check "its writer noticed nothing" raw_goes_on
    [ "$round" -gt "$FS" ] || check "nor did the filesystem" fs_goes_on
done

step "upgrade"
check "an upgrade under load" upgrades
sed 's/^/      | /' "$T/upgraded"
check "its users waited for it, and nobody noticed" went_unnoticed
if from_linux 6.16; then check "what was in flight ended first" prepared 4; else check "as in a death" unprepared; fi

step "worse moments"
if [ "$FS" -gt 0 ]; then
    kill_and_start
    sleep 0.3
    kill_and_start
    check "twice in a row" served wide
    check "its writer noticed nothing" raw_goes_on
    check "nor did the filesystem" fs_goes_on
fi
kill -STOP "$pid_server1" "$pid_server2"
sleep 3
kill_and_start
kill -CONT "$pid_server1" "$pid_server2"
from=${EPOCHREALTIME/./}
check "with every request in its hands" served wide
echo "back after $(((${EPOCHREALTIME/./} - from) / 1000)) ms"
check "its writer noticed nothing" raw_goes_on
check "nor did the filesystem" fs_goes_on
check "a node is suspended" dst suspend roam "$(node roam 1)"
check "an upgrade does not wait for what waits there" upgrades_suspended
kill_and_start
check "it still is after a death, and the rest goes on" suspend_survives
if [ "$FS" -gt 0 ]; then
    check "a node moves" dst migrate roam "$(node roam 2)" --to 127.0.0.1:20073/ --rate 8M --detach
    sleep 1
    kill_and_start
    check "it moves on after a death" migration_survives
# Within the I/O timeout its server is there again.
kill -KILL "$pid_server3"
kill_and_start
check "one dead server holds nobody else up" one_is_late
start_server 3
check "its node comes late" comes_late
check "the filesystem noticed nothing" fs_goes_on
fi
check "the mounted device grows, or says why not" grows
large=$(sectors)
kill_and_start
check "it keeps its size after a death" keeps_its_size "$large"
kill -TERM "$pid_array"
until_true 30 gone "$pid_array"
check "SIGTERM leaves a device in use waiting" test -b "$(device roam)"
if from_linux 6.16; then check "with nothing in flight" prepared 7; else check "as a death would" unprepared; fi
start_array_daemon
check "the next daemon serves it on" served roam
check "the filesystem noticed nothing" fs_goes_on

step "what was written is there"
check "the raw device" raw_ends
check "the files" fs_ends
check "e2fsck finds nothing" fs_is_whole
check "no I/O error was logged" no_io_error

step "no way back"
kill -KILL "$pid_array" "$pid_server1" "$pid_server2" "$pid_server3"
start_array_daemon
until_true 30 dst list
check "devices are listed" list_waiting
check "a device in use is not taken away" refused 'mounted' dst stop roam
check "unless that is said" dst stop roam --force
check "its filesystem gets errors" refused 'Input/output error|No such file|No such device' sh -c "cat $T/mnt/f1 >/dev/null; ls $T/mnt/nothing; sync -f $T/mnt"
check "umount" umount "$T/mnt"
check "the other one" dst stop wide
check "nothing is left" equal devices "" "$(ls /sys/class/ublk-char)"

keep_logs
finish_checks
