#!/usr/bin/env bash
# A cluster on this machine: three servers on 127.0.0.11 to 13 and two agents on
# 127.0.0.21 and 22, each a process of its own with the default ports and its
# data in .demo. It runs the examples, loses its leader and an agent, and grows to
# five servers and three agents. Needs bin/persys (make build).
#
#   hack/demo.sh up            start it anew, run the examples, show all that
#   hack/demo.sh start NAME    start one that was killed: s1 to s5, n1 to n3
#   hack/demo.sh stop          delete its workloads, stop it, remove .demo
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$PWD/.demo
persys=$PWD/bin/persys
servers=(s1 s2 s3 s4 s5)
agents=(n1 n2 n3)
# Plain, for etcd's clients on this machine; not etcd's own, which may be taken.
etcd_port=7483

# What the user has set for a cluster of their own is not for this one.
for v in "${!PERSYS_@}"; do unset "$v"; done
export PERSYS_CONFIG=$dir/config.yaml

fail() {
	echo "demo: $*" >&2
	exit 1
}
say() { printf '\n== %s\n' "$*"; }
# Shows a command as a user would type it, and runs it.
show() {
	printf '\n$ %s\n' "${*/#$persys/persys}"
	"$@"
}
docker_answers() { docker version >/dev/null 2>&1; }

address() {
	case $1 in
	s*) echo "127.0.0.1${1#s}" ;;
	n*) echo "127.0.0.2${1#n}" ;;
	esac
}

# The process of that name, if it is there and is ours.
pid_of() {
	local pid
	pid=$(cat "$dir/pid/$1" 2>/dev/null) || return 1
	is_ours "$pid" && echo "$pid"
}
is_ours() { command_line "$1" | grep -qF -- "$dir/"; }
command_line() { { tr '\0' ' ' <"/proc/$1/cmdline"; } 2>/dev/null; }

# start NAME: what its data directory says it is, or what is to be done first.
start() {
	local name=$1 line
	if pid_of "$name" >/dev/null; then
		echo "demo: $name runs already"
		return
	fi
	case $name in
	s1)
		line=(init)
		[ ! -e "$dir/s1/identity.json" ] || line=(server)
		;;
	s[2-5]) line=(join --token-file "$dir/token/$name") ;;
	n[1-3]) line=(join --token-file "$dir/token/$name" --cpu 2 --memory 2Gi) ;;
	*) fail "there is no $name; there are ${servers[*]} ${agents[*]}" ;;
	esac
	case $name in
	s*) line+=(--etcd-listen "$(address "$name"):$etcd_port") ;;
	esac
	mkdir -p "$dir/pid" "$dir/log"
	setsid nohup "$persys" "${line[@]}" --name "$name" --data-dir "$dir/$name" --advertise "$(address "$name")" \
		>>"$dir/log/$name.log" 2>&1 </dev/null &
	echo $! >"$dir/pid/$name"
	disown
}

# until_true SECONDS WHAT COMMAND...: waits for it, and gives up with the log of
# a process that has ended.
until_true() {
	local end=$((SECONDS + $1)) what=$2 name
	shift 2
	until "$@" >/dev/null 2>&1; do
		for name in "${servers[@]}" "${agents[@]}"; do
			if [ -e "$dir/pid/$name" ] && ! pid_of "$name" >/dev/null; then
				tail -n 15 "$dir/log/$name.log" >&2
				fail "$name has ended; its log is $dir/log/$name.log"
			fi
		done
		[ $SECONDS -lt $end ] || fail "gave up waiting until $what; the logs are in $dir/log"
		sleep 0.2
	done
}
voters() { [ "$("$persys" member ls -o json 2>/dev/null | grep -c '"voter": true')" = "$1" ]; }
ready() { [ "$("$persys" get nodes -o json | grep -c '"state": "READY"')" = "$1" ]; }

token() { # role, name
	mkdir -p "$dir/token"
	(umask 077 && "$persys" token create --role "$1" --node "$2" -o name >"$dir/token/$2")
}

# Where the replicas of a workload answer, one host:port a line.
ports_of() { "$persys" get workload "$1" -o wide | grep -o '[0-9.]*:[0-9]*->' | sed 's/->//'; }

up() {
	[ -x "$persys" ] || fail "bin/persys is missing; make build makes it"
	if [ -e "$dir" ]; then
		say "Stopping the demo that is there"
		stop
	fi
	mkdir -p "$dir"
	chmod 700 "$dir"

	say "Three servers"
	start s1
	until_true 30 "the first server answers" "$persys" cluster info
	token server s2
	token server s3
	start s2
	start s3
	until_true 60 "all three vote" voters 3
	show "$persys" member ls

	say "Two agents"
	token agent n1
	token agent n2
	start n1
	start n2
	until_true 60 "both nodes are ready" ready 2
	local containers=no
	if docker_answers; then
		containers=yes
		until_true 30 "the agents see the Docker Engine" sees_docker
	fi
	show "$persys" get nodes

	if [ $containers = yes ]; then
		say "The examples' image"
		sh hack/demo-image.sh
	fi
	say "The examples"
	if [ $containers = yes ]; then
		show "$persys" apply -f examples/container.yaml -f examples/process.yaml -f examples/replicated.yaml --wait --timeout 2m
	else
		show "$persys" apply -f examples/process.yaml -f examples/replicated-process.yaml --wait --timeout 2m
	fi
	show "$persys" get workloads -o wide
	until_true 20 "the process has written something" has_log clock
	show "$persys" logs clock --tail 3
	if [ $containers = yes ]; then
		say "The containers answer"
		local at
		for at in $(ports_of web) $(ports_of many); do
			show curl -sS --max-time 5 --retry 10 --retry-delay 1 --retry-connrefused "http://$at/"
		done
	fi
	lose_leader
	lose_agent $containers
	grow
	look_around $containers
}

member() { "$persys" member ls | awk -v "what=$1" '$2 == what { print $1 }'; }
another_leads() { [ -n "$(member leader)" ] && [ "$(member leader)" != "$1" ]; }
reachable() { "$persys" member ls | grep -q "^$1 .* reachable "; }

# kill_hard NAME: as a power cut would.
kill_hard() {
	local pid
	pid=$(pid_of "$1")
	printf '\n$ kill -9 %s    # %s\n' "$pid" "$1"
	kill -9 "$pid"
	rm "$dir/pid/$1"
}

lose_leader() {
	local leader
	leader=$(member leader)
	say "The leader is killed: another one takes new work, and nothing that runs notices"
	kill_hard "$leader"
	show "$persys" run --process --name after --wait -- sh -c 'while sleep 1; do date; done'
	until_true 20 "another server leads" another_leads "$leader"
	show "$persys" member ls
	start "$leader"
	until_true 30 "$leader is back" reachable "$leader"
	show "$persys" member ls
}

lose_agent() {
	local many=ticks ids cluster pid
	say "An agent is killed with all its work: it runs elsewhere once the lease of 10 s is over"
	kill_hard n2
	for pid in $(supervisors n2); do kill -9 "$pid" 2>/dev/null || true; done
	if [ "$1" = yes ]; then
		many=many
		cluster=$(cluster_id)
		ids=$(docker ps -aq --filter "label=persys.cluster=$cluster" --filter label=persys.node=n2)
		# shellcheck disable=SC2086 # one word per id
		[ -z "$ids" ] || docker rm -f $ids >/dev/null
	fi
	until_true 40 "n1 runs all of it" all_on_n1 "$many"
	show "$persys" get nodes
	show "$persys" get workloads -o wide
	start n2
	until_true 30 "n2 is back" ready 2
}
all_on_n1() {
	local json
	json=$("$persys" get workload "$1" -o json)
	! grep -q '"node_id": "n2"' <<<"$json" && grep -q '"running": 4' <<<"$json"
}

grow() {
	say "Two more servers and an agent join while work runs"
	local name
	for name in s4 s5; do token server $name; start $name; done
	token agent n3
	start n3
	for name in s4 s5; do until_true 30 "$name is there" reachable $name; done
	"$persys" member promote s4 >/dev/null
	"$persys" member promote s5 >/dev/null
	until_true 60 "all five vote" voters 5
	until_true 30 "three nodes are ready" ready 3
	show "$persys" member ls
	show "$persys" get nodes
}

has_log() { [ -n "$("$persys" logs "$1")" ]; }
sees_docker() { [ "$("$persys" get nodes | grep -c 'docker\(,\|  \)')" = 2 ]; }

etcd_hint() {
	local e="etcdctl --endpoints 127.0.0.11:$etcd_port,127.0.0.12:$etcd_port,127.0.0.13:$etcd_port"
	echo "  The same, and keys of your own, as an etcd:"
	if command -v etcdctl >/dev/null; then
		echo "  export ETCDCTL_API=3"
		echo "  $e get --prefix /workloads/"
		echo "  $e put greeting hello"
	else
		echo "  curl 127.0.0.11:$etcd_port/v3/kv/put -d '{\"key\": \"Z3JlZXRpbmc=\", \"value\": \"aGVsbG8=\"}'"
	fi
}

look_around() {
	local p="bin/persys --config .demo/config.yaml" admin=.demo/s1/pki/admin/credentials.pem
	say "It runs. Look around"
	cat <<END

  $p get workloads -o wide
  $p describe ${2:-clock}
  $p logs clock -f
  $p events -w
  $p scale $([ "$1" = yes ] && echo many || echo ticks) 6 --wait
  $p node drain n1 --wait

  REST, as the administrator:
  curl --cacert $admin --cert $admin https://127.0.0.12:7480/v1/workloads

$(etcd_hint)

  Kill a server or an agent and see what happens; bring it back:
  kill -9 \$(cat .demo/pid/s1);  $p member ls;  hack/demo.sh start s1
  kill -9 \$(cat .demo/pid/n2);  $p events -w;  hack/demo.sh start n2

  The logs are in .demo/log. Stop everything: make demo-stop
END
	if [ "$1" = no ]; then
		cat <<'END'

  No Docker Engine answers here, so only processes were run. For containers:
  hack/setup.sh (or apt-get install docker.io, and start dockerd), then make demo
END
	fi
}

cluster_id() { sed -n 's/.*"cluster_id": *"\([^"]*\)".*/\1/p' "$dir/s1/identity.json" 2>/dev/null || true; }
# The supervisors of an agent's processes, or of all agents'.
supervisors() {
	local pid
	for pid in /proc/[0-9]*; do
		pid=${pid#/proc/}
		if command_line "$pid" | grep -qF -- " process-shim run $dir/${1:+$1/}"; then echo "$pid"; fi
	done
}

# end NAME SIGNAL: sends it to the process, if it is ours.
end() {
	local pid
	pid=$(pid_of "$1") || return 0
	kill "-$2" "$pid" 2>/dev/null || true
}
gone() {
	local name
	for name in "$@"; do
		! pid_of "$name" >/dev/null || return 1
	done
}
halt() { # names: in order, then by force
	local name end=$((SECONDS + 20))
	for name in "$@"; do end "$name" TERM; done
	until gone "$@" || [ $SECONDS -ge $end ]; do sleep 0.1; done
	for name in "$@"; do end "$name" KILL; done
}

stop() {
	if [ ! -e "$dir" ]; then
		echo "demo: there is none"
		return
	fi
	local ids cluster pid
	if ids=$("$persys" get workloads -o name --timeout 10s 2>/dev/null) && [ -n "$ids" ]; then
		# shellcheck disable=SC2086 # one word per id
		"$persys" delete $ids --wait --timeout 40s || echo "demo: some workloads could not be deleted in order" >&2
	fi
	halt "${agents[@]}"
	halt "${servers[@]}"
	# What agents that were killed have left running.
	cluster=$(cluster_id)
	if [ -n "$cluster" ] && docker_answers; then
		ids=$(docker ps -aq --filter "label=persys.cluster=$cluster")
		# shellcheck disable=SC2086
		[ -z "$ids" ] || docker rm -f $ids >/dev/null
	fi
	for pid in $(supervisors ""); do kill -KILL "$pid" 2>/dev/null || true; done
	rm -rf "$dir"
	echo "demo: stopped"
}

case "${1:-up}" in
up) up ;;
start) start "${2:?which one}" ;;
stop) stop ;;
*)
	sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
	exit 2
	;;
esac
