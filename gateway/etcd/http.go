package etcd

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"slices"
	"strings"

	"go.etcd.io/etcd/api/v3/version"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/gateway/local"
)

// clusterVersion is what etcd calls the version that all members have.
var clusterVersion = version.APIVersion + ".0"

// Handler serves what etcd serves over HTTP on the port of its clients: JSON below
// /v3/, /version, /health, /livez, /readyz, and the given metrics.
func (s *Server) Handler(admit local.Admit, metrics http.Handler) (http.Handler, error) {
	calls, err := s.JSON(admit)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("/v3/", calls)
	mux.Handle("/v3beta/", calls)
	mux.Handle("/v3alpha/", calls)
	mux.HandleFunc("GET /version", ServeVersion)
	mux.HandleFunc("GET /health", s.serveHealth)
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", s.serveReady)
	mux.Handle("GET /metrics", metrics)
	return mux, nil
}

// ServeVersion answers as etcd does.
func ServeVersion(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, struct {
		Server  string `json:"etcdserver"`
		Cluster string `json:"etcdcluster"`
	}{version.Version, clusterVersion})
}

// serveHealth is etcd's: unhealthy with an alarm, unless the query excludes it, and
// where there is nobody to read from. With serializable=true the replica need not
// hear of the others.
func (s *Server) serveHealth(w http.ResponseWriter, r *http.Request) {
	answer := struct {
		Health string `json:"health"`
		Reason string `json:"reason"`
	}{"true", ""}
	code := http.StatusOK
	query := r.URL.Query()
	if err := s.unhealthy(r.Context(), query["exclude"], query.Get("serializable") == "true"); err != "" {
		answer.Health, answer.Reason, code = "false", err, http.StatusServiceUnavailable
	}
	writeJSON(w, code, answer)
}

func (s *Server) serveReady(w http.ResponseWriter, r *http.Request) {
	if reason := s.unhealthy(r.Context(), nil, false); reason != "" {
		http.Error(w, reason, http.StatusServiceUnavailable)
		return
	}
	_, _ = w.Write([]byte("ok\n")) // a client that is gone needs no answer
}

// unhealthy says what is wrong, in etcd's words; empty: nothing.
func (s *Server) unhealthy(ctx context.Context, excluded []string, serializable bool) string {
	v := s.store.View()
	if !serializable {
		var err error
		if v, err = s.store.Linearizable(ctx); err != nil {
			return "RANGE ERROR:" + status.Convert(statusOf(err)).Message()
		}
	}
	for _, a := range alarms(v) {
		if !slices.Contains(excluded, a.Alarm.String()) {
			return "ALARM " + a.Alarm.String()
		}
	}
	return ""
}

func writeJSON(w http.ResponseWriter, code int, document any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(document) // a client that is gone needs no answer
}

// OnlyLocal refuses requests by another name than that of loopback. On a plain
// port it keeps out pages of the web whose name has been made to mean this machine.
func OnlyLocal(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if name, _, err := net.SplitHostPort(host); err == nil {
			host = name
		}
		ip := net.ParseIP(strings.Trim(host, "[]"))
		if host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			http.Error(w, "this port answers to loopback addresses and to localhost only", http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}
