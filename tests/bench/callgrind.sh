#!/bin/bash
# Counts the instructions of one request in the engine, for each kind of array: the difference between two runs, so that nothing of
# the start is in it. Unlike time they are the same on every run.
set -euo pipefail
cd "$(dirname "$0")/../.."
program=$(cargo test --release --bench engine --no-run 2>&1 | sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
[ -n "$program" ] || { echo "the benchmark does not build" >&2; exit 1; }

# Instructions of N batches of a rig.
count() {
    RIG=$1 BATCHES=$2 valgrind --tool=callgrind --callgrind-out-file=/dev/null "$program" 2>&1 \
        | sed -n 's/.*Collected : \([0-9]*\).*/\1/p'
}

for rig in linear striped 'striped over 32' 'two replicas' 'during a copy'; do
    for op in read write; do
        few=$(count "$rig/$op" 100)
        many=$(count "$rig/$op" 600)
        printf '%-16s %-6s %5d instructions per request\n' "$rig" "$op" $(((many - few) / (500 * 32)))
    done
done
