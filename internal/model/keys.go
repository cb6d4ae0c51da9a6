// Package model says what the keys mean: their names, typed reads of them,
// validation of what users write, and admission, which turns a request into
// the transaction that carries it out. It holds functions only: no state, no
// clock, no I/O.
package model

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Prefixes of the system's part of the keyspace. docs/architecture.md names the
// one writer of each. Everything else belongs to etcd clients.
const (
	NodesPrefix        = "/nodes/"
	WorkloadsPrefix    = "/workloads/"
	RevisionsPrefix    = "/revisions/"
	AssignmentsPrefix  = "/assignments/"
	ReplicasPrefix     = "/replicas/"
	RetriesPrefix      = "/retries/"
	EventsPrefix       = "/events/"
	MembersPrefix      = "/members/"
	TokensPrefix       = "/tokens/"
	CertificatesPrefix = "/certificates/"
	SystemPrefix       = "/system/"

	EpochKey   = SystemPrefix + "epoch"
	ClusterKey = SystemPrefix + "cluster"
	// Holds pb.SchedulerConfig; what is absent means the defaults.
	SchedulerKey = SystemPrefix + "scheduler"
)

// SystemPrefixes are all prefixes that belong to Persys itself.
var SystemPrefixes = []string{
	NodesPrefix, WorkloadsPrefix, RevisionsPrefix, AssignmentsPrefix, ReplicasPrefix, RetriesPrefix,
	EventsPrefix, MembersPrefix, TokensPrefix, CertificatesPrefix, SystemPrefix,
}

func NodeKey(id string) string           { return NodesPrefix + id }
func NodeLeaseKey(id string) string      { return NodesPrefix + id + "/lease" }
func WorkloadKey(id string) string       { return WorkloadsPrefix + id }
func WorkloadStatusKey(id string) string { return WorkloadsPrefix + id + "/status" }
func RolloutKey(id string) string        { return WorkloadsPrefix + id + "/rollout" }
func MemberKey(id string) string         { return MembersPrefix + id }
func TokenKey(id string) string          { return TokensPrefix + id }
func CertificateKey(serial string) string {
	return CertificatesPrefix + serial
}

func RevisionKey(workload, revision string) string {
	return RevisionsPrefix + workload + "/" + revision
}

// The replica number is padded so that replicas sort by number.
func replicaPath(workload string, replica int32) string {
	return fmt.Sprintf("%s/%06d", workload, replica)
}

func AssignmentKey(workload string, replica int32) string {
	return AssignmentsPrefix + replicaPath(workload, replica)
}

func ReplicaKey(workload string, replica int32) string {
	return ReplicasPrefix + replicaPath(workload, replica)
}

func RetryKey(workload string, replica int32) string {
	return RetriesPrefix + replicaPath(workload, replica)
}

// EventKey orders events by time; discriminator tells those of one nanosecond
// apart.
func EventKey(t time.Time, discriminator string) string {
	return fmt.Sprintf("%s%020d-%s", EventsPrefix, t.UnixNano(), discriminator)
}

// IsSystemKey reports whether the key belongs to Persys itself.
func IsSystemKey(key string) bool {
	for _, p := range SystemPrefixes {
		if strings.HasPrefix(key, p) {
			return true
		}
	}
	return false
}

// SplitReplicaKey takes the workload and the replica number from a key below
// prefix, one of AssignmentsPrefix, ReplicasPrefix and RetriesPrefix.
func SplitReplicaKey(prefix, key string) (workload string, replica int32, ok bool) {
	rest, ok := strings.CutPrefix(key, prefix)
	if !ok {
		return "", 0, false
	}
	workload, number, ok := strings.Cut(rest, "/")
	if !ok {
		return "", 0, false
	}
	n, err := strconv.ParseInt(number, 10, 32)
	if err != nil || n < 0 {
		return "", 0, false
	}
	return workload, int32(n), true
}

// SplitRevisionKey takes the workload and the revision from a key below
// RevisionsPrefix.
func SplitRevisionKey(key string) (workload, revision string, ok bool) {
	rest, ok := strings.CutPrefix(key, RevisionsPrefix)
	if !ok {
		return "", "", false
	}
	return strings.Cut(rest, "/")
}

// IsDNSLabel reports whether id may name a workload, a node or a server: lower
// case letters, digits and inner hyphens, at most 63.
func IsDNSLabel(id string) bool {
	if id == "" || len(id) > 63 || id[0] == '-' || id[len(id)-1] == '-' {
		return false
	}
	for i := range len(id) {
		if c := id[i]; c != '-' && (c < '0' || c > '9') && (c < 'a' || c > 'z') {
			return false
		}
	}
	return true
}

// PrefixEnd is the exclusive upper bound of the keys that begin with prefix, in
// etcd's form: one zero byte where there is no bound.
func PrefixEnd(prefix string) []byte {
	end := []byte(prefix)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i] < 0xff {
			end[i]++
			return end[:i+1]
		}
	}
	return []byte{0}
}
