#!/bin/bash
# Runs a script as root on a kernel that has ublk, in a virtual machine that needs no hardware support.
#
#   tests/vm/boot.sh [--kernel old|new] [--memory 3G] [--cpus 2] [--timeout SECONDS] [--keep] SCRIPT [ARGUMENT...]
#
# The kernel is the oldest on which dst serves block devices (old), unless it is to be the newest that Debian has (new).
# The guest sees this machine's root filesystem read-only (with a throw-away layer over most of it), so that it runs
# the programs built here, and one directory, $VM_OUT, that both sides can write. What SCRIPT prints appears here
# while it runs. The exit code is SCRIPT's; 123 when the guest then does not power down, 124 when the time is up, 125 when
# the guest died before SCRIPT ended. A guest that dies before SCRIPT has said its first word (the emulator does that now
# and then) is booted once more, and that is said.
# `make setup` must have run.
set -euo pipefail
arguments=("$@")
# Seconds within which a guest that lives has started SCRIPT; it takes about ten on an idle machine.
boot_seconds=180
# Seconds in which a guest powers down: what hangs in its kernel, a device that nobody serves for example, keeps it from that.
power_down_seconds=60

root=$(cd "$(dirname "$0")/../.." && pwd)
vm=$root/target/vm
kernel=kernel memory=3G cpus=2 timeout=600 keep=
PATH=$PATH:/usr/sbin:/sbin

usage() { sed -n 's/^#   //p' "$0" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
    --kernel)
        case ${2-} in old) kernel=kernel ;; new) kernel=kernel-new ;; *) usage ;; esac
        shift 2
        ;;
    --memory) memory=$2 && shift 2 ;;
    --cpus) cpus=$2 && shift 2 ;;
    --timeout) timeout=$2 && shift 2 ;;
    --keep) keep=yes && shift ;;
    -*) usage ;;
    *) break ;;
    esac
done
[ $# -gt 0 ] || usage
script=$(realpath "$1")
shift

[ -e "$vm/$kernel.version" ] || { echo "boot.sh: target/vm has no $kernel; run: make setup" >&2; exit 125; }
version=$(<"$vm/$kernel.version")
out=$(mktemp -d "$vm/run.XXXXXX")
log=$out/log
result=$out/result
guest=

stop_guest() {
    [ -n "$guest" ] || return 0
    # Its own process group: virtme-ng and the qemu it started, and nothing else.
    kill -TERM -- "-$guest" 2>/dev/null || true
    wait "$guest" 2>/dev/null || true
    guest=
}
finish() {
    local code=$?
    stop_guest
    [ -n "$keep" ] || [ "$code" != 0 ] || rm -rf "$out"
    exit "$code"
}
powers_down() {
    local until=$((SECONDS + power_down_seconds))
    while kill -0 "$guest" 2>/dev/null; do
        [ $SECONDS -lt $until ] || return 1
        sleep 0.3
    done
}
trap finish EXIT
trap 'exit 130' INT TERM

# The guest's standard output is lost without a terminal, so it writes to files. The result appears at once and whole.
#
# Every read of the root filesystem crosses to this machine: what is started often is copied into the guest's memory,
# without the line tables that make it ten times larger.
mkdir "$out/bin"
for program in dst dstd; do
    [ ! -e "$root/target/release/$program" ] || strip --strip-debug -o "$out/bin/$program" "$root/target/release/$program"
done
{
    printf 'cd %q\n' "$root"
    printf 'export DST_ROOT=%q VM_OUT=%q IN_VM=1\n' "$root" "$out"
    echo 'cp -r "$VM_OUT/bin" /run/dst-bin'
    echo 'export PATH=/run/dst-bin:$DST_ROOT/target/release:/usr/sbin:/usr/bin:/sbin:/bin'
    printf 'bash %q' "$script"
    [ $# = 0 ] || printf ' %q' "$@"
    printf ' >%q 2>&1 </dev/null\n' "$log"
    printf 'echo $? >%q.new && mv %q.new %q\n' "$result" "$result" "$result"
} >"$out/guest.sh"
: >"$log"

started=$SECONDS
set -m
PATH=$vm/venv/bin:$PATH vng -v -r "$vm/$kernel/boot/vmlinuz-$version" --force-9p --disable-kvm --cpus "$cpus" --memory "$memory" \
    --user root --rwdir="$out" --exec "bash $out/guest.sh" </dev/null >"$out/console" 2>&1 &
guest=$!
set +m
tail -n +1 -f --pid="$guest" -s 0.2 "$log" &
tail=$!

code=
while [ -z "$code" ]; do
    if [ -e "$result" ]; then
        code=$(<"$result")
    elif ! kill -0 "$guest" 2>/dev/null; then
        # It may have ended between the two questions.
        [ -e "$result" ] || code=125
    elif [ ! -s "$log" ] && [ $((SECONDS - started)) -ge "$boot_seconds" ]; then
        code=125
    elif [ $((SECONDS - started)) -ge "$timeout" ]; then
        code=124
    else
        sleep 0.3
    fi
done
[ "$code" != 0 ] || powers_down || code=123
stop_guest
wait "$tail" || true

if [ "$code" = 125 ] && [ ! -s "$log" ] && [ -z "${DST_BOOTED_ONCE-}" ]; then
    echo "boot.sh: the guest died before its script began ($out/console); one more try"
    DST_BOOTED_ONCE=1 exec "$0" "${arguments[@]}"
fi

# What the kernel said matters even when the script is content: a hung task, a bug, an Oops.
trouble=$(grep -aE 'BUG:|Oops|WARNING: CPU|Call Trace|blocked for more than|Kernel panic|Out of memory' "$out/console" | head -n 5 || true)
[ -z "$trouble" ] || printf 'boot.sh: the guest kernel complained (%s):\n%s\n' "$out/console" "$trouble"
case $code in
0) ;;
123) echo "boot.sh: the script has ended, and the guest has not powered down within $power_down_seconds s; its last words ($out/console):"; tail -n 15 "$out/console" ;;
124) echo "boot.sh: not finished after $timeout s; see $out" ;;
125) echo "boot.sh: the guest ended before the script did; its last words ($out/console):"; tail -n 15 "$out/console" ;;
*) echo "boot.sh: the script failed with exit code $code; see $out" ;;
esac
exit "$code"
