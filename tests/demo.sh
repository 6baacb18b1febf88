#!/bin/bash
# `make demo`: installs what is missing, builds, and does dst's main job once for real, on the running kernel if it has
# ublk, else in a virtual machine. The last line is `demo: ok` or `demo: FAILED: why`.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

ended() {
    echo "demo: $1"
    [ "$1" = ok ]
    exit
}

tests/setup.sh || ended "FAILED: this machine lacks something, see the lines above"
make --no-print-directory build || ended "FAILED: dst does not build, see the lines above"

running_kernel_has_ublk() {
    [ "$(id -u)" = 0 ] || return 1
    [ -c /dev/ublk-control ] || modprobe -q ublk_drv 2>/dev/null
    [ -c /dev/ublk-control ]
}

log=target/demo.log
story=(tests/vm/demo.sh)
if running_kernel_has_ublk; then
    echo "demo: this kernel has ublk, so this is the real thing"
    PATH=$PWD/target/release:$PATH
    export PATH
else
    echo "demo: this kernel has no ublk, so a virtual machine with one starts now (in software, 20 to 40 times slower than this machine)"
    story=(tests/vm/boot.sh --memory 3G --timeout 400 "${story[@]}")
fi
# Its verdict is kept back, to be the last line.
"${story[@]}" 2>&1 | tee "$log" | grep --line-buffered -v '^demo: '
code=${PIPESTATUS[0]}
verdict=$(sed -n 's/^demo: //p' "$log" | tail -n 1)
if [ "$code" = 0 ] && [ "$verdict" = ok ]; then
    ended ok
fi
case $verdict in FAILED:*) ended "$verdict" ;; esac
ended "FAILED: it ended with exit code $code before it came to a verdict, see $log"
