#!/bin/bash
# Block devices against each other: an array of ours, and the same bytes behind the kernel's own clients. Runs in the guest of boot.sh;
# `make bench-vm` starts it and reads the lines that begin with `sample`.
#
#   bench.sh ROUNDS SECONDS WORKS PEERS     the last two are extended regular expressions for names
#
# Everything is in memory and on loopback. Those who are compared have their turn within each round, and each round begins with another one.
# A sample: who, work, round, I/Os a second, p50 and p99 in µs (fio, with the time of submitting), CPU time in µs and context switches for an
# I/O (of the whole guest, /proc/stat, so that what the kernel does for its own clients counts, too).
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/vm/lib.sh
. "$here/lib.sh"
export LC_ALL=C
ROUNDS=$1 SECONDS_EACH=$2 WORKS=$3 PEERS=$4
# MiB of each device.
SIZE=128
HALF=$((SIZE / 2))
# Sectors of a stripe's chunk, everywhere.
CHUNK=128

prepare_guest ublk_drv dm-mod nvmet nvmet-tcp nvme-tcp
modprobe brd rd_nr=5 rd_size=$((SIZE * 1024)) && modprobe nbd nbds_max=4 || exit 1
export DM_DISABLE_UDEV=1
cd "$T" || exit 1
# Started for each measurement, so not across the wire to the host each time.
cp "$(command -v fio)" "$T/fio"

die() { echo "bench.sh: $*"; keep_logs; exit 1; }
wanted() { [[ $1 =~ $PEERS ]]; }
names=()
declare -A device
# compare NAME DEVICE: takes part, filled with data.
compare() {
    [ -b "$2" ] || die "$1: no device '$2'"
    ./fio --name=fill --filename="$2" --ioengine=io_uring --direct=1 --rw=write --bs=128k --iodepth=8 --output=/dev/null || die "$1: cannot be written"
    names+=("$1")
    device[$1]=$2
    echo "ready: $1 is $2"
}
# stripe NAME DEVICE DEVICE
stripe() {
    echo "0 $((SIZE * 2048)) striped 2 $CHUNK $2 0 $3 0" | dmsetup create "$1" || die "dmsetup create $1"
}

# --- ours ------------------------------------------------------------------------------------------------------------

# daemons NAME PORT WINDOW: two servers, an array daemon, and how long their threads look for what is due before they sleep. DST_SOCKET is
# that daemon's from then on.
daemons() {
    local n
    export DST_SOCKET=$T/$1.sock
    for n in 1 2; do
        mkdir -p "$T/$1.pool$n"
        start_daemon "$1_server$n" dstd --busy-poll "$3" server --listen "127.0.0.1:$2$n" --pool "$T/$1.pool$n"
        until_true 30 connects "$2$n"
    done
    start_daemon "$1_array" dstd --busy-poll "$3" array --state-dir "$T/$1.state" --run-dir "$T/$1.run" --socket "$DST_SOCKET"
    until_true 30 dst list
}
# striped NAME PORT
striped() {
    local n
    for n in 1 2; do dst volume create "127.0.0.1:$2$n/$1" --size ${HALF}M; done
    dst create "$1" --alg striped --chunk $((CHUNK / 2))K "127.0.0.1:$2"{1,2}"/$1"
}
start_dst() {
    daemons plain 2007 50us
    dst volume create 127.0.0.1:20071/one --size ${SIZE}M
    dst create one --alg linear 127.0.0.1:20071/one
    striped two 2007
    striped bare 2007
    # An emulated processor takes ten times as long for everything, so what is due soon is due in ten times as long.
    daemons near 2008 500us
    striped two 2008
    striped bare 2008
}
# dst_device DAEMONS ARRAY OPTION...
dst_device() { DST_SOCKET=$T/$1.sock dst start "${@:2}" | grep -o '/dev/ublkb[0-9]*' | head -n 1; }

# --- the kernel's NVMe over TCP --------------------------------------------------------------------------------------

NVMET=/sys/kernel/config/nvmet
# nvme_export PORT DISK: a subsystem and a port of its own.
nvme_export() {
    local nqn=bench$1
    mkdir "$NVMET/subsystems/$nqn" "$NVMET/subsystems/$nqn/namespaces/1" "$NVMET/ports/$1" || return 1
    echo 1 >"$NVMET/subsystems/$nqn/attr_allow_any_host"
    echo "$2" >"$NVMET/subsystems/$nqn/namespaces/1/device_path"
    echo 1 >"$NVMET/subsystems/$nqn/namespaces/1/enable"
    echo 127.0.0.1 >"$NVMET/ports/$1/addr_traddr"
    echo tcp >"$NVMET/ports/$1/addr_trtype"
    echo "$1" >"$NVMET/ports/$1/addr_trsvcid"
    echo ipv4 >"$NVMET/ports/$1/addr_adrfam"
    ln -s "$NVMET/subsystems/$nqn" "$NVMET/ports/$1/subsystems/$nqn"
}
# nvme_connect PORT [,OPTION...]: its block device is printed.
nvme_connect() {
    local said instance
    # The answer to what was written is read from the same open file.
    exec 8<>/dev/nvme-fabrics
    echo "transport=tcp,traddr=127.0.0.1,trsvcid=$1,nqn=bench$1${2-}" >&8
    read -r said <&8
    exec 8>&-
    instance=${said#instance=}
    instance=${instance%%,*}
    # With native multipath the disk carries the subsystem's number, which need not be the controller's.
    until_true 20 nvme_disk "$1" && nvme_disk "$1" || die "NVMe: connected as '$said', but there is no disk"
}
nvme_disk() {
    local subsystem disk
    for subsystem in /sys/class/nvme-subsystem/*; do
        [ "$(<"$subsystem/subsysnqn")" = "bench$1" ] || continue
        for disk in "$subsystem"/nvme*n1; do
            [ ! -b "/dev/${disk##*/}" ] || { echo "/dev/${disk##*/}"; return 0; }
        done
    done
    for disk in /sys/class/nvme/*/nvme*n1; do
        [ "$(cat "${disk%/*}/subsysnqn" 2>/dev/null)" != "bench$1" ] || [ ! -b "/dev/${disk##*/}" ] || { echo "/dev/${disk##*/}"; return 0; }
    done
    return 1
}

# --- the kernel's NBD ------------------------------------------------------------------------------------------------

# nbd_device NUMBER MIB
nbd_device() {
    local port=1080$1
    start_daemon "nbdkit$1" nbdkit -f -i 127.0.0.1 -p "$port" memory "$2M"
    until_true 30 connects "$port"
    nbd-client 127.0.0.1 "$port" "/dev/nbd$1" -b 512 >"$T/nbd$1.log" 2>&1 || die "nbd-client: $(<"$T/nbd$1.log")"
    until_true 20 test "$(blockdev --getsz "/dev/nbd$1")" = $(($2 * 2048))
}

# --- measuring -------------------------------------------------------------------------------------------------------

# books: sets at (µs), busy (10 ms of all CPUs that were not idle) and switches (of context, since boot), and starts no process.
books() {
    local word user nice system idle iowait irq softirq rest
    at=${EPOCHREALTIME/./}
    while read -r word user nice system idle iowait irq softirq rest; do
        case $word in
        cpu) busy=$((user + nice + system + irq + softirq)) ;;
        ctxt) switches=$user ;;
        esac
    done </proc/stat
}
# completed DIRECTORY-IN-SYSFS: sets ios.
completed() {
    local reads writes rest
    read -r reads _ _ _ writes rest <"$1/stat"
    ios=$((reads + writes))
}
# measure NAME WORK ROUND FIO-OPTION...
measure() {
    local name=$1 work=$2 round=$3 sys pid ios then at busy switches from busy_then switches_then
    shift 3
    sys=$(stat -L -c '/sys/dev/block/%Hr:%Lr' "${device[$name]}")
    completed "$sys"
    then=$ios
    ./fio --name=bench --filename="${device[$name]}" --ioengine=io_uring --direct=1 --thread --time_based --ramp_time=300ms --runtime="$SECONDS_EACH" \
        --norandommap --randrepeat=0 --refill_buffers=0 --scramble_buffers=0 --lat_percentiles=1 --clat_percentiles=0 --output-format=terse \
        --terse-version=3 --output="$T/fio.out" "$@" </dev/null &
    pid=$!
    # What fio needs to start is no part of its I/O.
    until [ "$ios" -gt $((then + 4)) ] || gone "$pid"; do sleep 0.05; completed "$sys"; done
    sleep 0.3
    books
    from=$at busy_then=$busy switches_then=$switches
    sleep "$(awk "BEGIN { print $SECONDS_EACH - 0.3 }")"
    books
    wait "$pid" || die "$name, $work: fio failed: $(<"$T/fio.out")"
    # Version 3: from field 6 on those of reads, from 47 on those of writes: KiB, KiB/s, IOPS, ms, ... percentiles as `50.000000%=123`.
    awk -F';' -v who="$name" -v work="$work" -v round="$round" -v us="$((at - from))" -v cpu="$(((busy - busy_then) * 10000))" \
        -v switches="$((switches - switches_then))" '
        function at(from, name,   i) { for (i = from; i < from + 41; i++) if (index($i, name "%=") == 1) return substr($i, length(name) + 3) }
        $1 == 3 {
            from = $8 >= $49 ? 6 : 47
            ios = ($8 + $49) * us / 1e6
            if (ios < 1) ios = 1
            printf "sample|%s|%s|%d|%.1f|%s|%s|%.2f|%.2f\n", who, work, round, $8 + $49, at(from, "50.000000"), at(from, "99.000000"), cpu / ios, switches / ios
        }' "$T/fio.out"
}

# work NAME FIO-OPTION...: all who take part, from another one on in each round.
work() {
    local name=$1 place round
    shift
    [[ $name =~ $WORKS ]] || return 0
    for ((round = 0; round < ROUNDS; round++)); do
        for ((place = 0; place < ${#names[@]}; place++)); do
            measure "${names[(place + round) % ${#names[@]}]}" "$name" "$round" "$@"
        done
    done
}

step "devices"
if wanted 'dst, two nodes' || wanted 'dst, two, no digests' || wanted 'dst, two, 500us' || wanted 'dst, two, 500us, no digests' || wanted 'dst, one node'; then
    start_dst >"$T/dst.log" 2>&1 || die "dst: $(<"$T/dst.log")"
fi
! wanted 'dst, two nodes' || compare 'dst, two nodes' "$(dst_device plain two)"
# Without checksums of data, as NVMe/TCP and NBD are unless they are asked.
! wanted 'dst, two, no digests' || compare 'dst, two, no digests' "$(dst_device plain bare --data-digest none)"
# With a window for the emulator.
! wanted 'dst, two, 500us' || compare 'dst, two, 500us' "$(dst_device near two)"
! wanted 'dst, two, 500us, no digests' || compare 'dst, two, 500us, no digests' "$(dst_device near bare --data-digest none)"
if wanted 'NVMe/TCP, two, dm-stripe' || wanted 'NVMe/TCP, two, digests' || wanted 'NVMe/TCP, one'; then
    modprobe configfs
    mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config
    for n in 0 1 2 3 4; do nvme_export $((4420 + n)) "/dev/ram$n" || die "nvmet"; done
fi
if wanted 'NVMe/TCP, two, dm-stripe'; then
    stripe nvme "$(nvme_connect 4421)" "$(nvme_connect 4422)"
    compare 'NVMe/TCP, two, dm-stripe' /dev/mapper/nvme
fi
# With the checksums that dst makes, too.
if wanted 'NVMe/TCP, two, digests'; then
    stripe digests "$(nvme_connect 4423 ,hdr_digest,data_digest)" "$(nvme_connect 4424 ,hdr_digest,data_digest)"
    compare 'NVMe/TCP, two, digests' /dev/mapper/digests
fi
if wanted 'NBD, two, dm-stripe'; then
    nbd_device 1 $HALF
    nbd_device 2 $HALF
    stripe nbd /dev/nbd1 /dev/nbd2
    compare 'NBD, two, dm-stripe' /dev/mapper/nbd
fi
! wanted 'dst, one node' || compare 'dst, one node' "$(dst_device plain one)"
! wanted 'NVMe/TCP, one' || compare 'NVMe/TCP, one' "$(nvme_connect 4420)"
if wanted 'NBD, one'; then
    nbd_device 0 $SIZE
    compare 'NBD, one' /dev/nbd0
fi
if wanted 'ublk, nothing'; then
    # Its standard input stays open: the end of it is the end of the device.
    mkfifo "$T/null.in"
    sleep infinity >"$T/null.in" &
    start_daemon null sh -c "exec '$DST_ROOT/target/release/examples/ublk-target' null --size ${SIZE}M --queues 2 --depth 128 <'$T/null.in'"
    until_true 30 grep -q ready "$T/null.log"
    compare 'ublk, nothing' "$(grep -o '/dev/ublkb[0-9]*' "$T/null.log")"
fi

step "measuring"
work '4k randread QD1' --rw=randread --bs=4k --iodepth=1
work '4k randwrite QD1' --rw=randwrite --bs=4k --iodepth=1
work '4k randread QD32' --rw=randread --bs=4k --iodepth=32
work '4k randwrite QD32' --rw=randwrite --bs=4k --iodepth=32
work '4k mixed 70/30 QD32' --rw=randrw --rwmixread=70 --bs=4k --iodepth=32
work '128k randread QD8' --rw=randread --bs=128k --iodepth=8
work '128k randwrite QD8' --rw=randwrite --bs=128k --iodepth=8
work '128k read QD8' --rw=read --bs=128k --iodepth=8
work '128k write QD8' --rw=write --bs=128k --iodepth=8

keep_logs
step "done"
