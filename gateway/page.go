package gateway

import (
	"encoding/base64"
	"strings"

	"github.com/persys-dev/persys/fsm"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

const (
	defaultPage = 1000
	maxPage     = 10_000
)

// listWorkloads gives one page. Each page is of one revision; the next one is of
// a newer one and goes on after the last id, so that nothing that stays is left
// out or seen twice.
func listWorkloads(v *fsm.View, req *pb.ListWorkloadsRequest) (*pb.ListWorkloadsResponse, error) {
	size := int(req.PageSize)
	switch {
	case size < 0 || size > maxPage:
		return nil, badField("page_size", "%d is out of range; allowed: 1 to %d, or 0 for %d", size, maxPage, defaultPage)
	case size == 0:
		size = defaultPage
	}
	want, err := model.SelectLabels(req.LabelSelector)
	if err != nil {
		return nil, err
	}
	from := model.WorkloadsPrefix
	if req.PageToken != "" {
		last, err := readPageToken(req.PageToken, req.LabelSelector)
		if err != nil {
			return nil, err
		}
		from = model.WorkloadKey(last) + "\x00"
	}
	out := &pb.ListWorkloadsResponse{Revision: v.Revision()}
	for kv, err := range keysFrom(v, from, model.PrefixEnd(model.WorkloadsPrefix)) {
		if err != nil {
			return nil, err
		}
		if _, sub, _ := model.SplitKey(model.WorkloadsPrefix, string(kv.Key)); sub != "" {
			continue
		}
		w := &pb.Workload{}
		if err := model.Parse(kv, w); err != nil {
			return nil, err
		}
		if !hasLabels(w.Spec.GetLabels(), want) {
			continue
		}
		if len(out.Workloads) == size {
			out.NextPageToken = pageToken(out.Workloads[size-1].Spec.GetId(), req.LabelSelector)
			break
		}
		w.ResourceVersion = kv.ModRevision
		if err := addStatus(v, w); err != nil {
			return nil, err
		}
		if req.Replicas {
			if w.Replicas, err = replicas(v, w.Spec.GetId()); err != nil {
				return nil, err
			}
		}
		out.Workloads = append(out.Workloads, w)
	}
	return out, nil
}

func hasLabels(labels, want map[string]string) bool {
	for k, v := range want {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// A page token is the last id and the selector, so that the pages of two
// different lists are not mixed up.
func pageToken(last, selector string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(last + "\n" + selector))
}

func readPageToken(token, selector string) (last string, err error) {
	data, err := base64.RawURLEncoding.DecodeString(token)
	last, with, ok := strings.Cut(string(data), "\n")
	switch {
	case err != nil || !ok || !model.IsDNSLabel(last):
		return "", badField("page_token", "is not one that this list gave; allowed: next_page_token of the page before, or nothing for the first page")
	case with != selector:
		return "", badField("page_token", "belongs to the label_selector %q; allowed: the same selector on every page", with)
	}
	return last, nil
}
