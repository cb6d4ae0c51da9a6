#!/usr/bin/env bash
# Installs what building, testing and the demo need on Debian or Ubuntu, and
# starts a Docker Engine where none answers. Safe to run again: what is there is
# left alone.
#
#   hack/setup.sh               everything
#   hack/setup.sh --no-docker   no Docker Engine; tests and demo then leave containers out
set -euo pipefail

docker=yes
case "${1:-}" in
"") ;;
--no-docker) docker=no ;;
*)
	sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
	exit 2
	;;
esac

say() { echo "setup: $*" >&2; }
fail() {
	say "$@"
	exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

as_root=()
if [ "$(id -u)" != 0 ]; then
	have sudo || fail "must be root to install packages, and there is no sudo; run it as root"
	as_root=(sudo)
fi

# Debian's Go is older than what go.mod asks for.
want_go=$(sed -n 's/^go \([0-9.]*\)$/\1/p' "$(dirname "$0")/../go.mod")
have go || fail "Go is missing: install Go $want_go or newer from https://go.dev/dl/ and put it into PATH"
have_go=$(go env GOVERSION | sed 's/^go//; s/[ -].*//')
if [ "$(printf '%s\n%s\n' "$want_go" "$have_go" | sort -V | head -n1)" != "$want_go" ]; then
	fail "Go $have_go is too old: install Go $want_go or newer from https://go.dev/dl/"
fi

packages=()
need() { # program, package
	have "$1" || packages+=("$2")
}
need make make
need git git
need gcc gcc # the race detector links with it
need curl curl
need protoc protobuf-compiler
need setsid util-linux
need ps procps
[ -f /usr/include/stdlib.h ] || packages+=(libc6-dev)
[ -f /usr/include/google/protobuf/descriptor.proto ] || packages+=(libprotobuf-dev)
if [ "$docker" = yes ]; then
	have docker || packages+=(docker.io)
	# An engine that answers may be elsewhere; only without one is a daemon needed.
	docker version >/dev/null 2>&1 || need dockerd docker.io
fi
# Tests compare with a real etcd and call etcdctl; they run both themselves, so
# Debian's service is neither started nor enabled.
etcd=no
if ! have etcd || ! have etcdctl; then
	etcd=yes
	need etcd etcd-server
	need etcdctl etcd-client
fi
if [ ${#packages[@]} -gt 0 ]; then
	have apt-get || fail "missing: ${packages[*]}; there is no apt-get here, install them with your system's package manager"
	mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)
	say "installing ${packages[*]}"
	export DEBIAN_FRONTEND=noninteractive
	"${as_root[@]}" apt-get update -q >&2 || say "apt-get update failed; trying with the lists that are there"
	policy=/usr/sbin/policy-rc.d
	if [ $etcd = yes ] && [ ! -e $policy ]; then
		trap '"${as_root[@]}" rm -f $policy' EXIT
		printf '#!/bin/sh\nfor a; do case $a in etcd | etcd.service) exit 101 ;; esac; done\n' | "${as_root[@]}" sh -c "cat >$policy && chmod 755 $policy"
	fi
	"${as_root[@]}" apt-get install -q -y --no-install-recommends "${packages[@]}" >&2 || fail "apt-get could not install ${packages[*]}"
	if [ $etcd = yes ] && have systemctl; then
		"${as_root[@]}" systemctl -q disable --now etcd 2>/dev/null || true
	fi
fi

answers() { "${as_root[@]}" docker version >/dev/null 2>&1; }
wait_for_docker() {
	for _ in $(seq 60); do
		answers && return 0
		sleep 0.5
	done
	return 1
}

if [ "$docker" = yes ] && ! answers; then
	log=/var/log/persys-dockerd.log
	say "no Docker Engine answers; starting one"
	if [ -d /run/systemd/system ] && have systemctl; then
		"${as_root[@]}" systemctl start docker || true
		wait_for_docker || fail "the docker service does not come up: see 'journalctl -u docker'"
	else
		# vfs works where overlay file systems may not be mounted.
		for driver in "" vfs; do
			"${as_root[@]}" sh -c "setsid dockerd ${driver:+--storage-driver=$driver} >>$log 2>&1 </dev/null &"
			wait_for_docker && break
			say "dockerd ${driver:+with $driver }does not come up"
		done
		answers || fail "no Docker Engine could be started: see $log; 'hack/setup.sh --no-docker' goes on without"
	fi
fi
if [ "$docker" = yes ] && ! docker version >/dev/null 2>&1; then
	say "the Docker Engine answers to root only: add yourself to the group docker and log in again"
fi

say "ready: go $have_go, $(protoc --version)$([ "$docker" = yes ] && echo ", docker $("${as_root[@]}" docker version -f '{{.Server.Version}}')")"
