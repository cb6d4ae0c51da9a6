#!/usr/bin/env bash
# The table of placements in docs/performance.md: ours, measured now, beside
# Nomad's as recorded on another such machine on another day.
#
#   hack/bench-placement.sh [REPLICAS]     of the test of memory; default 1,000,000
set -euo pipefail
cd "$(dirname "$0")/.."
go build -o bin/persys ./cmd/persys
bench() { go test ./internal/server -run '^$' -timeout 30m "$@"; }
# The value before a unit in the output of a benchmark; the seconds of a phase of
# a simulation.
metric() { awk -v unit="$2" '{ for (i = 2; i <= NF; i++) if ($i == unit) print $(i - 1) }' <<<"$1"; }
phase() { awk -v name="$2" 'index($0, name) == 1 { sub(name, ""); print $1 }' <<<"$1"; }
row() { printf '%-58s  %-14s  %s\n' "$@"; }

many=$(bench -bench PlacementOfMany -benchtime 20x)
ones=$(bench -bench PlacementOfOnes -benchtime 10x)
relay=$(bench -bench 'Relay$')
memory=$(go test ./internal/server -run MemoryOfReplicas -v -timeout 30m -replicas "${1:-1000000}")
lost=$(bin/persys sim --nodes 5 --replicas 5000 --scenario agent-loss --idle 0)
both=$(bin/persys sim --nodes 5 --replicas 5000 --scenario leader-and-agent-loss --idle 0)

row '' Nomad ours
row 'one workload of 5,000: committed and visible' '253–335/s' "$(metric "$many" placed/s)/s"
row '  all reported running by 100 agents' '35–46 s' "$(metric "$many" s-to-running) s"
row '  processor time for each, three servers and agents' '' "$(metric "$many" cpu-µs/replica) µs"
row '1,000 workloads of one, 32 callers over REST: placed' '27–33/s' "$(metric "$ones" placed/s)/s"
row '  processor time for each, servers, agents and callers' '' "$(metric "$ones" cpu-µs/workload) µs"
row 'node with 1,000 replicas lost: all started elsewhere' '13.5–26 s (20)' "$(phase "$lost" 'all started elsewhere')"
row 'node and leader lost together: all started elsewhere' '304 s (20)' "$(phase "$both" 'all started elsewhere')"
echo
grep '^BenchmarkRelay/' <<<"$relay"
sed -n 's/^ *million_test.go:[0-9]*: //p' <<<"$memory"
