#!/bin/bash
# The story that `make demo` tells, with the commands that a user would type: three storage servers, a striped array
# of one volume on each, a filesystem on it, files; one node of it moves to a fourth server while files are being written; and
# everything is still there after the array was stopped and started.
# Needs a kernel with ublk, root, and dstd and dst on PATH.
set -uo pipefail

here=$(cd "$(dirname "$0")/../.." && pwd)
cd "$here" || exit 1
export LC_ALL=C

if [ -n "${IN_VM:-}" ]; then
    D=/run/demo
    modprobe ublk_drv
    ip link set lo up
    mkdir -p "$D"
    mount -t tmpfs -o size=80% tmpfs "$D"
else
    D=$(mktemp -d "$here/target/demo.XXXXXX")
fi
export DST_SOCKET=$D/dstd.sock
mkdir -p "$D/mnt"
daemons=()
array=
clean=

tidy_up() {
    # On the user's own machine nothing may be left behind; a virtual machine is simply switched off.
    if [ -z "${IN_VM:-}" ]; then
        ! mountpoint -q "$D/mnt" || umount "$D/mnt"
        [ -z "$array" ] || dst stop "$array" >/dev/null 2>&1
        [ ${#daemons[@]} = 0 ] || kill "${daemons[@]}" 2>/dev/null
        wait
        [ -z "$clean" ] || rm -rf "$D"
    fi
}

failed() {
    echo
    local log
    for log in "$D"/*.log; do
        [ ! -s "$log" ] || { echo "--- the end of ${log##*/}:"; tail -n 12 "$log"; }
    done
    tidy_up
    echo "demo: FAILED: $*"
    exit 1
}

say() { printf '\n# %s\n' "$*"; }

# Shows a command, then runs it, in this shell so that it may set variables.
run() {
    printf '$ %s\n' "$*"
    eval "$*" || failed "\`$*\` ended with exit code $?"
}

# The same for a daemon. It is ready when COMMAND succeeds.
run_daemon() {
    local ready=$1 log=$2
    shift 2
    printf '$ %s &\n' "$*"
    "$@" >"$log" 2>&1 </dev/null &
    local pid=$! n
    daemons+=("$pid")
    for n in $(seq 150); do
        eval "$ready" 2>/dev/null && return
        kill -0 "$pid" 2>/dev/null || failed "\`$*\` ended at once"
        sleep 0.2
    done
    failed "\`$*\` was not ready after $((n / 5)) s"
}

echo "# kernel $(uname -r), $(nproc) CPUs"
say "Three storage servers. They would be three machines; here each has its own directory and port."
for n in 1 2 3; do
    mkdir -p "$D/server$n"
    run_daemon ": </dev/tcp/127.0.0.1/2007$n" "$D/server$n.log" dstd server --listen 127.0.0.1:2007$n --pool "$D/server$n"
done

say "A volume on each."
run dst volume create 127.0.0.1:20071/red --size 128M
run dst volume create 127.0.0.1:20072/green --size 128M
run dst volume create 127.0.0.1:20073/blue --size 128M
run dst volume list 127.0.0.1:20071

say "The daemon that owns arrays, on the machine that uses them."
run_daemon "[ -S $DST_SOCKET ]" "$D/array.log" dstd array --state-dir "$D/state" --run-dir "$D/run" --socket "$DST_SOCKET"

say "One array of the three volumes, striped, and its block device."
run dst create storage --alg striped --chunk 64K 127.0.0.1:20071/red 127.0.0.1:20072/green 127.0.0.1:20073/blue
array=storage
run dst start storage '|' tee "$D/started"
device=$(grep -o '/dev/ublkb[0-9]*' "$D/started" | head -n 1)
[ -b "$device" ] || failed "\`dst start\` printed no block device"
run lsblk -o NAME,SIZE,LOG-SEC,OPT-IO,TYPE "$device"

say "A filesystem on it, and files."
run mkfs.ext4 -q "$device"
run mount "$device" "$D/mnt"
run dd if=/dev/urandom of="$D/mnt/random" bs=1M count=24 conv=fsync status=none
run cp -r src tests/it Cargo.lock "$D/mnt/"
run "(cd $D/mnt && find . -type f -exec sha256sum {} + >$D/sums && wc -l <$D/sums)"
run sync
run df -h "$D/mnt"
run dst status storage

say "A fourth server. The node on the second one moves there, while files are being written."
mkdir -p "$D/server4"
run_daemon ": </dev/tcp/127.0.0.1/20074" "$D/server4.log" dstd server --listen 127.0.0.1:20074 --pool "$D/server4"
keep_writing() {
    local n=0
    until [ -e "$D/enough" ]; do
        dd if=/dev/urandom of="$D/mnt/new.$((n % 8))" bs=64k count=16 conv=fsync status=none || return 1
        n=$((n + 1))
    done
    echo $n >"$D/written"
}
keep_writing &
writer=$!
run dst migrate storage n-128 --to 127.0.0.1:20074/
touch "$D/enough"
wait "$writer" || failed "a write failed while the node was moving"
echo "meanwhile $(cat "$D/written") files of 1 MiB were written and made durable"
run dst status storage
run "(cd $D/mnt && sha256sum --check --quiet $D/sums && find . -name 'new.*' -exec sha256sum {} + >>$D/sums)"

say "What remains on the second server can go."
run dst volume list 127.0.0.1:20072

say "Unmounted, stopped, started again: everything is still there."
run umount "$D/mnt"
run dst stop storage
run dst start storage '|' tee "$D/started"
device=$(grep -o '/dev/ublkb[0-9]*' "$D/started" | head -n 1)
run e2fsck -fn "$device"
run mount -o ro "$device" "$D/mnt"
run "(cd $D/mnt && sha256sum --check --quiet $D/sums && echo every file is as it was)"
run umount "$D/mnt"

say "The end."
run dst status
run dst stop storage
run dst remove storage
array=
clean=yes
tidy_up
echo "demo: ok"
