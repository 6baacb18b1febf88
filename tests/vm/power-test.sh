#!/bin/bash
# Flush honesty under power cuts, in the guest of boot.sh: a memory-backed null_blk with a volatile write cache is a server's disk.
# Taking its `power` away loses what the cache holds and keeps the rest. The rounds and the judge are tests/it/chaos/power.rs.
#
#   power-test.sh TEST_PROGRAM
set -uo pipefail
modprobe null_blk nr_devices=0 || exit 1
modprobe ext4
ip link set lo up
mount -t configfs none /sys/kernel/config 2>/dev/null
disk=/sys/kernel/config/nullb/nullb0
mkdir "$disk" || exit 1
echo 256 >"$disk/size"          # MiB
echo 512 >"$disk/blocksize"
echo 1 >"$disk/memory_backed"
echo 64 >"$disk/cache_size"     # MiB: large enough that little leaves it by itself
echo 1 >"$disk/power" || exit 1
[ "$(cat /sys/block/nullb0/queue/write_cache)" = 'write back' ] || { echo "this null_blk has no volatile cache"; exit 1; }
DST_TEST_NULL_BLK=nullb0 exec "$1" chaos::power --nocapture --test-threads=1
