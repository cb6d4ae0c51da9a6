package etcd

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// alarmsPrefix holds one empty value for each alarm: its key says who has raised
// which, as "<member id, 16 hex digits>/<type>".
const alarmsPrefix = model.SystemPrefix + "alarms/"

func alarmKey(m *etcdpb.AlarmMember) []byte {
	return fmt.Appendf(nil, "%s%016x/%s", alarmsPrefix, m.MemberID, m.Alarm)
}

// alarms are those that are raised.
func alarms(v *fsm.View) []*etcdpb.AlarmMember {
	var all []*etcdpb.AlarmMember
	for kv := range v.Scan(alarmsPrefix) {
		member, kind, _ := strings.Cut(strings.TrimPrefix(string(kv.Key), alarmsPrefix), "/")
		id, err := strconv.ParseUint(member, 16, 64)
		alarm, known := etcdpb.AlarmType_value[kind]
		if err == nil && known {
			all = append(all, &etcdpb.AlarmMember{MemberID: id, Alarm: etcdpb.AlarmType(alarm)})
		}
	}
	return all
}

// Alarm lists, raises or disarms alarms. As in etcd, to raise what is raised
// answers with it, to disarm what is not answers with nothing, and the type NONE
// asks for all and changes none.
func (s *Server) Alarm(ctx context.Context, r *etcdpb.AlarmRequest) (*etcdpb.AlarmResponse, error) {
	if _, known := etcdpb.AlarmType_name[int32(r.Alarm)]; !known {
		return nil, status.Errorf(codes.InvalidArgument, "etcdserver: there is no alarm of type %d", r.Alarm)
	}
	switch r.Action {
	case etcdpb.AlarmRequest_GET:
		if err := s.mustBeUser(ctx); err != nil {
			return nil, err
		}
		return s.listAlarms(ctx, r.Alarm)
	case etcdpb.AlarmRequest_ACTIVATE, etcdpb.AlarmRequest_DEACTIVATE:
		if err := s.mustBeRoot(ctx); err != nil {
			return nil, err
		}
		if r.Alarm == etcdpb.AlarmType_NONE {
			return &etcdpb.AlarmResponse{Header: s.header(s.store.View().Revision())}, nil
		}
		return s.setAlarm(ctx, &etcdpb.AlarmMember{MemberID: r.MemberID, Alarm: r.Alarm}, r.Action == etcdpb.AlarmRequest_ACTIVATE)
	}
	return nil, status.Errorf(codes.InvalidArgument, "etcdserver: there is no action %d on alarms", r.Action)
}

func (s *Server) listAlarms(ctx context.Context, kind etcdpb.AlarmType) (*etcdpb.AlarmResponse, error) {
	v, err := s.store.Linearizable(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	answer := &etcdpb.AlarmResponse{Header: s.header(v.Revision())}
	for _, a := range alarms(v) {
		if kind == etcdpb.AlarmType_NONE || kind == a.Alarm {
			answer.Alarms = append(answer.Alarms, a)
		}
	}
	return answer, nil
}

// setAlarm does not go through propose: nothing that an alarm refuses may keep it
// from being raised or disarmed.
func (s *Server) setAlarm(ctx context.Context, a *etcdpb.AlarmMember, raised bool) (*etcdpb.AlarmResponse, error) {
	key := alarmKey(a)
	change := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key}}}
	if !raised {
		change = &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: key}}}
	}
	txn := &pb.Txn{Compare: []*pb.Compare{{Key: key, Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{}}}}
	if raised {
		txn.Success = []*pb.RequestOp{change}
	} else {
		txn.Failure = []*pb.RequestOp{change}
	}
	done, err := s.store.Propose(ctx, txn)
	if err != nil {
		return nil, statusOf(err)
	}
	if changed := done.Succeeded == raised; changed {
		s.log.Warn("alarm", "type", a.Alarm, "member", fmt.Sprintf("%x", a.MemberID), "raised", raised)
	}
	s.quota.forget()
	answer := &etcdpb.AlarmResponse{Header: s.header(done.Revision)}
	if raised || !done.Succeeded {
		answer.Alarms = []*etcdpb.AlarmMember{a}
	}
	return answer, nil
}
