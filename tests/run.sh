#!/bin/bash
# Runs the test phases, all of them or those that are named, and adds up what they counted. Each phase's output is also kept in
# target/test-logs/PHASE.log. The last line is `N passed, M failed`; the exit code is 0 only if nothing failed.
# A phase that counts nothing itself (a format check, a build) counts as one.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

phase_setup() { tests/setup.sh; }
phase_fmt() { cargo fmt --all --check; }
phase_build() { make --no-print-directory build; }
phase_clippy() { cargo clippy --release --workspace --all-targets -- -D warnings; }
# The command line links only the pure floors: they must build without the rest.
phase_floors() { cargo check --release -p dst --lib --no-default-features && cargo check --release -p dst-cli; }
# What `make install` and `make deb` make is installed, used, and taken away again.
phase_package() { tests/package.sh; }
phase_unit() { cargo test --release --workspace --lib --bins; }
phase_it() { cargo test --release --test it -- --skip chaos::; }
# A request in the engine allocates nothing; each of its measurements runs once.
phase_bench() { cargo test --release --bench engine; }
# Real processes in a bad world; ROUNDS=n for more of it. What it says of itself is worth seeing.
phase_chaos() { cargo test --release --test it chaos:: -- --nocapture; }
# A node that moves back and forth under writes, MOVES=n times; the integration tests have it 20 times.
phase_moves() { MOVES=${MOVES:-20} cargo test --release --test it migrate::a_node_moves -- --nocapture; }
# The engine and the store against seeded faults; SEEDS=n for more of them.
phase_sim() { SEEDS=${SEEDS:-20000} cargo test --release --test sim; }
# The block device alone, without an array behind it.
phase_ublk() { tests/vm/boot.sh --memory 3G --timeout 600 tests/vm/ublk-test.sh; }
# What was flushed survives a disk that loses its cache. The judge is the integration tests' program.
phase_power() {
    local program
    program=$(cargo test --release --test it --no-run 2>&1 | sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
    [ -n "$program" ] || { echo "the integration tests do not build"; return 1; }
    tests/vm/boot.sh --memory 3G --timeout 600 tests/vm/power-test.sh "$PWD/$program"
}
# The device outlives its daemon; RAW=n and FS=n rounds.
phase_recover() {
    local raw=${RAW:-2} fs=${FS:-1}
    tests/vm/boot.sh --memory 3G --timeout $((600 + 60 * raw + 60 * fs)) tests/vm/recover-test.sh "$raw" "$fs"
}
# `ublk` and `recover` on the newest kernel, with what ublk has learned since: in short, or with NEWER=n rounds. Not among those that always run.
phase_newer() {
    tests/vm/boot.sh --kernel new --memory 3G --timeout 600 tests/vm/ublk-test.sh release brief &&
        tests/vm/boot.sh --kernel new --memory 3G --timeout $((600 + 60 * ${NEWER:-1})) tests/vm/recover-test.sh "${NEWER:-1}" "${NEWER:-0}"
}
# One of four nodes is suspended for SUSPEND seconds, memory is short for PRESSURE seconds.
phase_vm() {
    local suspend=${SUSPEND:-10} pressure=${PRESSURE:-20}
    tests/vm/boot.sh --memory 3G --timeout $((600 + suspend + 2 * pressure)) tests/vm/guest-test.sh "$suspend" "$pressure"
}

# Format first, because it fails fastest; the build before the tests, because they start dstd and dst.
all='setup fmt build clippy floors package unit it bench chaos sim ublk vm recover power'
phases=${*:-$all}
for phase in $phases; do
    declare -F "phase_$phase" >/dev/null || { echo "run.sh: no phase $phase; there are: $all" >&2; exit 2; }
done

logs=target/test-logs
mkdir -p "$logs"

# The sums of what cargo's and the guest's runners report in LOG: "passed failed".
counts() {
    awk '/^test result: /            { for (i = 2; i <= NF; i++) { if ($i == "passed;") p += $(i-1); if ($i == "failed;") f += $(i-1) } }
         /^checks: [0-9]+ ok, [0-9]+ failed$/ { p += $2; f += $4 }
         END { print p + 0, f + 0 }' "$1"
}

passed=0 failed=0
table=
for phase in $phases; do
    printf '\n==== %s\n' "$phase"
    from=$SECONDS
    "phase_$phase" 2>&1 | tee "$logs/$phase.log"
    code=${PIPESTATUS[0]}
    read -r p f < <(counts "$logs/$phase.log")
    [ "$code" != 0 ] || [ $((p + f)) != 0 ] || p=1
    # It failed, yet none of its tests did: it did not build, or did not reach its end.
    [ "$code" = 0 ] || [ "$f" != 0 ] || f=1
    passed=$((passed + p)) failed=$((failed + f))
    verdict=ok
    [ "$f" = 0 ] || verdict=FAILED
    table+=$(printf '%-8s %-7s %5d passed %4d failed %5d s   %s/%s.log' "$phase" "$verdict" "$p" "$f" $((SECONDS - from)) "$logs" "$phase")$'\n'
    # Nothing after these can work without them.
    case $phase:$verdict in setup:FAILED | build:FAILED) break ;; esac
done

printf '\n==== what ran\n%s\n' "$table"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
