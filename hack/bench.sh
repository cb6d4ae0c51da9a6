#!/usr/bin/env bash
# Measures what docs/performance.md records. Figures of different days do not
# compare: take what is compared in one run.
#
#   hack/bench.sh            everything, about twenty minutes
#   hack/bench.sh fsm        one part: fsm, scheduler, raftstore, placement,
#                            failover, loss, idle, sim (100 agents), etcd (beside Debian's, each load ROUNDS times for ROUND)
set -euo pipefail
cd "$(dirname "$0")/.."
bench() { go test -run '^$' -benchmem -timeout 30m "$@"; }
part() {
	echo "== $1"
	case $1 in
	fsm) bench -bench . ./fsm ;;
	scheduler) bench -bench . ./scheduler ;;
	raftstore) bench -bench . ./raftstore ;;
	placement) hack/bench-placement.sh ;;
	failover) bench -bench Failover -benchtime 20x ./chaos/procs ;;
	loss) bench -bench AgentLost -benchtime 5x ./chaos/procs ;;
	etcd) go test -run BesideEtcd -v -timeout 2h ./chaos/procs -round "${ROUND:-1s}" -rounds "${ROUNDS:-2}" ;;
	sim)
		go build -o /tmp/persys-bench-sim ./cmd/persys
		/tmp/persys-bench-sim sim --nodes 100 --replicas 5000 --scenario agent-loss
		/tmp/persys-bench-sim sim --nodes 100 --replicas 1000 --scenario submit-many --rest
		/tmp/persys-bench-sim sim --nodes 100 --replicas 2000 --scenario leader-and-agent-loss
		rm /tmp/persys-bench-sim
		;;
	idle) go test -run IdleClusterWritesNothing -v ./chaos/procs -idle 60s ;;
	*)
		sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
		exit 2
		;;
	esac
}
echo "$(nproc) cores, $(uname -r), $(go version)"
for p in "${@:-fsm scheduler raftstore placement failover loss idle sim etcd}"; do
	for q in $p; do part "$q"; done
done
