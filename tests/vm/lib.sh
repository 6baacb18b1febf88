# shellcheck shell=bash
# For scripts that run in the guest of boot.sh (the demo also runs outside of it): narration, checks that are counted,
# daemons that are started and ended by process id. Source it, and end a test with `finish_checks`.

passed=0
failed=0
CHECK_SECONDS=${CHECK_SECONDS:-60}

# A heading, with the guest's seconds since boot: under emulation one wants to know where the time goes.
step() { printf '\n== %s (at %ss)\n' "$*" "$(cut -d. -f1 /proc/uptime)"; }

# check NAME COMMAND... runs a command or a shell function, whose first failing line ends it, and counts the outcome.
# What it printed is shown only if it failed. A check that hangs is given up after CHECK_SECONDS and what it started
# is killed, so that one lost request does not hide what else works. A check runs in a subshell: it sets no variables.
check() {
    local name=$1 code work dog ended from=${EPOCHREALTIME/./}
    shift
    set -m
    # Not `if (...)`, where bash ignores errexit.
    (set -e && "$@") >"$T/check.out" 2>&1 </dev/null &
    work=$!
    sleep "$CHECK_SECONDS" &
    dog=$!
    set +m
    wait -n -p ended "$work" "$dog"
    code=$?
    if [ "$ended" = "$dog" ]; then
        kill -KILL -- "-$work" 2>/dev/null
        echo "given up after $CHECK_SECONDS s" >>"$T/check.out"
        code=124
    else
        { kill "$dog" && wait "$dog"; } 2>/dev/null
    fi
    from=$(((${EPOCHREALTIME/./} - from) / 100000))
    if [ "$code" = 0 ]; then
        passed=$((passed + 1))
        printf 'ok    %s (%d.%d s)\n' "$name" $((from / 10)) $((from % 10))
    else
        failed=$((failed + 1))
        printf 'FAIL  %s (exit %d, %d.%d s)\n' "$name" "$code" $((from / 10)) $((from % 10))
        tail -n 40 "$T/check.out" | sed 's/^/      | /'
    fi
}

# The daemons' logs stay outside of the guest; their ends are shown if something has failed.
keep_logs() {
    local log
    cp "$T"/*.log "$VM_OUT" 2>/dev/null
    [ "$failed" != 0 ] || return 0
    for log in "$T"/*.log; do
        [ ! -s "$log" ] || { echo "--- the end of ${log##*/}:"; tail -n 20 "$log"; }
    done
}

# The script's last words, which tests/run.sh adds up.
finish_checks() {
    local code=0
    printf '\nchecks: %d ok, %d failed\n' "$passed" "$failed"
    [ "$failed" = 0 ] || code=1
    exit "$code"
}

# refused TEXT COMMAND...: the command fails and says TEXT (a regular expression) in what it prints.
refused() {
    local text=$1 said code=0
    shift
    said=$("$@" 2>&1) || code=$?
    echo "exit $code: $said"
    [ "$code" != 0 ] || { echo "it was not refused: $*"; return 1; }
    grep -Eqi -- "$text" <<<"$said" || { echo "the refusal does not say: $text"; return 1; }
}

# equal WHAT WANT GOT
equal() { [ "$2" = "$3" ] || { echo "$1: want $2, got $3"; return 1; }; }

# until_true SECONDS COMMAND...: waits for it, asking five times a second.
until_true() {
    local n=$(($1 * 5))
    shift
    until "$@" >/dev/null 2>&1; do
        n=$((n - 1))
        [ "$n" -gt 0 ] || { echo "waited in vain for: $*"; return 1; }
        sleep 0.2
    done
}

connects() { (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
# from_linux VERSION: the running kernel is that one or newer.
from_linux() { [ "$(printf '%s\n' "$1" "$(uname -r)" | sort -V | head -n 1)" = "$1" ]; }
gone() { ! kill -0 "$1" 2>/dev/null; }

# prepare_guest sets T, a fresh directory in memory, and loads what the tests use.
prepare_guest() {
    T=/run/dst-test
    mkdir -p "$T"
    mount -t tmpfs -o size=85% tmpfs "$T"
    ip link set lo up
    local module
    for module in "$@"; do
        modprobe "$module" || echo "cannot load $module"
    done
}

# start_daemon NAME COMMAND...: in the background, away from the checks' process groups; its id is in pid_NAME,
# its log in $T/NAME.log.
start_daemon() {
    local name=$1
    shift
    setsid "$@" >>"$T/$name.log" 2>&1 </dev/null &
    printf -v "pid_$name" %d $!
    disown
}

# end_daemon NAME [SIGNAL] and wait until it is gone.
end_daemon() {
    local pid=pid_$1
    kill "-${2:-TERM}" "${!pid}" 2>/dev/null
    until_true 20 gone "${!pid}"
}
