package etcd

import (
	"path"
	"strconv"
	"strings"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// kind is one kind of what the system keeps.
type kind struct {
	// pattern of the keys; * stands for one part of a path.
	pattern string
	message proto.Message
	// complete, where it is there, adds what is in answers only and takes out
	// what is in none.
	complete func(proto.Message, *pb.KeyValue)
	// without are fields that documents do not have: they are filled in by other
	// APIs, or secret.
	without []string
	// put and remove admit what clients do. Where they are nil that is refused.
	put    func(v model.Reader, id string, document []byte, m model.Meta) (*pb.Txn, error)
	remove func(v model.Reader, id string, m model.Meta) (*pb.Txn, error)
	// writer is who writes the keys, and instead what to use, for refusals.
	writer, instead string
	// admins: only who manages the cluster may put and remove it.
	admins bool
	// part: it belongs to the object one level up, and goes when that goes.
	part bool
}

var kinds = []kind{
	{
		pattern: "/workloads/*", message: &pb.Workload{}, without: []string{"status", "replicas", "rollout"},
		complete: func(m proto.Message, kv *pb.KeyValue) { m.(*pb.Workload).ResourceVersion = kv.ModRevision },
		put: func(v model.Reader, id string, document []byte, m model.Meta) (*pb.Txn, error) {
			txn, _, err := model.PutWorkload(v, id, document, m)
			return txn, err
		},
		remove: func(v model.Reader, id string, m model.Meta) (*pb.Txn, error) {
			txn, _, err := model.DeleteWorkload(v, &pb.DeleteWorkloadRequest{Id: id}, m)
			return txn, err
		},
	},
	{
		pattern: "/workloads/*/status", message: &pb.WorkloadStatus{}, part: true,
		writer: "the scheduler", instead: "put or delete the workload one level up",
	},
	{
		pattern: "/workloads/*/rollout", message: &pb.Rollout{}, part: true,
		writer: "the scheduler", instead: "put or delete the workload one level up, or use persys rollout",
	},
	{
		pattern: "/nodes/*", message: &pb.Node{}, without: []string{"usage", "last_heartbeat", "reserved", "assignments"},
		complete: func(m proto.Message, kv *pb.KeyValue) { m.(*pb.Node).ResourceVersion = kv.ModRevision },
		put: func(v model.Reader, id string, document []byte, m model.Meta) (*pb.Txn, error) {
			txn, _, err := model.PutNode(v, id, document, m)
			return txn, err
		},
		remove: func(v model.Reader, id string, m model.Meta) (*pb.Txn, error) {
			txn, _, err := model.RemoveNode(v, &pb.NodeRequest{Id: id}, m)
			return txn, err
		},
	},
	{
		pattern: "/nodes/*/lease", message: &pb.NodeLease{}, part: true,
		writer: "the leader", instead: "it goes when the node is not heard of any more",
	},
	{
		pattern: "/revisions/*/*", message: &pb.Revision{},
		writer: "admission, with the workload", instead: "put the workload at /workloads/<id>",
	},
	{
		pattern: "/assignments/*/*", message: &pb.Assignment{},
		writer: "the scheduler", instead: "put the workload at /workloads/<id>, and say there where it may run",
	},
	{
		pattern: "/replicas/*/*", message: &pb.Replica{},
		writer: "the leader, from what agents report", instead: "put or delete the workload at /workloads/<id>",
	},
	{
		pattern: "/retries/*/*", message: &pb.Retry{},
		writer: "the scheduler", instead: "persys retry has the next attempt made at once",
	},
	{
		pattern: "/events/*", message: &pb.Event{},
		complete: func(m proto.Message, kv *pb.KeyValue) {
			m.(*pb.Event).Id = strings.TrimPrefix(string(kv.Key), model.EventsPrefix)
		},
		writer: "whoever changes something, with the change", instead: "keys outside of it are yours",
	},
	{
		pattern: "/members/*", message: &pb.Member{},
		without: []string{"voter", "leader", "reachable", "applied_index", "feature_level"},
		writer:  "the leader", instead: "use etcdctl member or persys members",
	},
	{
		pattern: "/tokens/*", message: &pb.Token{}, without: []string{"secret_hash"},
		complete: func(m proto.Message, _ *pb.KeyValue) { m.(*pb.Token).SecretHash = nil },
		writer:   "admission", instead: "use persys token create and persys token revoke",
	},
	{
		pattern: "/certificates/*", message: &pb.Certificate{},
		writer: "admission, when somebody joins", instead: "use persys token create",
	},
	{
		pattern: model.EpochKey, message: &pb.LeaderEpoch{},
		writer: "whoever is elected", instead: "use etcdctl move-leader for another leader",
	},
	{
		pattern: model.ClusterKey, message: &pb.ClusterInfo{},
		writer: "the first leader, once", instead: "it never changes",
	},
	{
		pattern: model.SchedulerKey, message: &pb.SchedulerConfig{}, admins: true,
		complete: func(m proto.Message, kv *pb.KeyValue) { m.(*pb.SchedulerConfig).ResourceVersion = kv.ModRevision },
		put: func(v model.Reader, _ string, document []byte, m model.Meta) (*pb.Txn, error) {
			return model.PutSchedulerConfig(v, document, m)
		},
		remove: func(v model.Reader, _ string, m model.Meta) (*pb.Txn, error) { return model.ResetSchedulerConfig(v, m) },
	},
	{
		pattern: "/system/alarms/*/*", message: &etcdpb.AlarmMember{}, complete: alarmOfKey,
		writer: "the server", instead: "use etcdctl alarm",
	},
}

// alarmOfKey reads the alarm out of its key, which has it all.
func alarmOfKey(m proto.Message, kv *pb.KeyValue) {
	member, alarm, _ := strings.Cut(strings.TrimPrefix(string(kv.Key), "/system/alarms/"), "/")
	a := m.(*etcdpb.AlarmMember)
	a.MemberID, _ = strconv.ParseUint(member, 16, 64)
	a.Alarm = etcdpb.AlarmType(etcdpb.AlarmType_value[alarm])
}

// kindOf is nil for keys of a form that the system does not use.
func kindOf(key string) *kind {
	for i := range kinds {
		if matches(kinds[i].pattern, key) {
			return &kinds[i]
		}
	}
	return nil
}

func matches(pattern, key string) bool {
	for {
		want, pattern2, more := strings.Cut(pattern, "/")
		got, key2, left := strings.Cut(key, "/")
		if more != left || want != got && (want != "*" || got == "") {
			return false
		}
		if !more {
			return true
		}
		pattern, key = pattern2, key2
	}
}

// closed is why a client may not write a key of the system.
func closed(key string) error {
	if ownerOf([]byte(key)) == hidden {
		return status.Errorf(codes.PermissionDenied, "%s is written only by the server; use etcdctl user, role and auth", authPrefix)
	}
	k := kindOf(key)
	prefix := key[:strings.IndexByte(key[1:], '/')+2]
	if k == nil {
		k = onlyKind(prefix)
	}
	switch {
	case k == nil:
		return status.Errorf(codes.PermissionDenied, "%.200q is no key of the system, and %s is the system's alone; allowed below it: %s", key, prefix, writable(prefix))
	case strings.Contains(k.pattern, "*") && !k.part:
		key, _, _ = strings.Cut(k.pattern, "*")
	}
	return status.Errorf(codes.PermissionDenied, "%s is written only by %s; %s", key, k.writer, k.instead)
}

// onlyKind is the kind of all keys with a prefix, where there is one.
func onlyKind(prefix string) *kind {
	var only *kind
	for i := range kinds {
		if strings.HasPrefix(kinds[i].pattern, prefix) {
			if only != nil {
				return nil
			}
			only = &kinds[i]
		}
	}
	return only
}

// writable is the keys with a prefix that clients may write, for refusals.
func writable(prefix string) string {
	for _, k := range kinds {
		if k.put != nil && strings.HasPrefix(k.pattern, prefix) {
			return strings.ReplaceAll(k.pattern, "*", "<id>")
		}
	}
	return "nothing"
}

// idOf is the name of an object that clients may write.
func idOf(key string) string { return path.Base(key) }
