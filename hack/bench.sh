#!/usr/bin/env bash
# Measures what docs/performance.md records. Figures of different days do not
# compare: take what is compared in one run.
#
#   hack/bench.sh            everything, about fifteen minutes
#   hack/bench.sh fsm        one part: fsm, scheduler, raftstore, failover, loss,
#                            idle, etcd (beside Debian's, each load ROUNDS times for ROUND)
set -euo pipefail
cd "$(dirname "$0")/.."
bench() { go test -run '^$' -benchmem -timeout 30m "$@"; }
part() {
	echo "== $1"
	case $1 in
	fsm) bench -bench . ./fsm ;;
	scheduler) bench -bench . ./scheduler ;;
	raftstore) bench -bench . ./raftstore ;;
	failover) bench -bench Failover -benchtime 20x ./chaos/procs ;;
	loss) bench -bench AgentLost -benchtime 5x ./chaos/procs ;;
	etcd) go test -run BesideEtcd -v -timeout 2h ./chaos/procs -round "${ROUND:-1s}" -rounds "${ROUNDS:-2}" ;;
	idle) go test -run IdleClusterWritesNothing -v ./chaos/procs -idle 60s ;;
	*)
		sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
		exit 2
		;;
	esac
}
echo "$(nproc) cores, $(uname -r), $(go version)"
for p in "${@:-fsm scheduler raftstore failover loss idle etcd}"; do
	for q in $p; do part "$q"; done
done
