package gateway

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/persys-dev/persys/internal/model"
	"github.com/persys-dev/persys/internal/pki"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// mayReadMetrics: what /metrics says is no secret to those who may read, and
// there is a role that may do nothing else.
const mayReadMetrics = mayRead | 1<<pb.Role_ROLE_METRICS

// Handler serves the HTTPS port: REST below /v1, etcd's JSON below /v3, the
// predecessor's routes, health, metrics and the OpenAPI document. Who calls is taken from the TLS
// connection. Health needs no identity, everything else does.
func (g *Gateway) Handler() http.Handler {
	rest, err := restMux(g.localConn())
	if err != nil {
		// The proto files are part of the program: it was built wrong.
		panic(fmt.Sprintf("gateway: %v", err))
	}
	mux := http.NewServeMux()
	mux.Handle("/v1/", rest)
	if g.config.Etcd != nil {
		mux.Handle("/v3/", g.config.Etcd)
		mux.Handle("/v3beta/", g.config.Etcd)
		mux.Handle("/v3alpha/", g.config.Etcd)
		mux.Handle("GET /version", g.config.Etcd)
	}
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, r *http.Request) { serveChecks(w, r, g.config.Live) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { serveChecks(w, r, g.config.Ready) })
	mux.HandleFunc("GET /health", g.serveHealth)
	mux.Handle("GET /metrics", restricted(mayReadMetrics, promhttp.HandlerFor(g.config.Gatherer, promhttp.HandlerOpts{})))
	mux.Handle("GET /openapi.json", restricted(mayReadMetrics, http.HandlerFunc(serveOpenAPI)))
	g.former(mux, rest)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { writeRoutingProblem(w, r, http.StatusNotFound) })
	return identified(mux)
}

// identified notes who calls. A caller within the process may have put an
// identity into the context; nothing in the request can.
func identified(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Content-Type-Options", "nosniff")
		if r.TLS != nil {
			if id, ok := pki.PeerIdentity(*r.TLS); ok {
				r = r.WithContext(WithIdentity(r.Context(), id))
			}
		}
		next.ServeHTTP(w, r)
	})
}

// restricted is authorization of what is no method of the API.
func restricted(allowed callers, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, ok := IdentityFrom(r.Context())
		switch {
		case !ok:
			writeProblem(w, r, status.Errorf(codes.Unauthenticated, "%s needs a client certificate of this cluster, and none was presented", r.URL.Path))
		case !allowed.has(id.Role):
			writeProblem(w, r, status.Errorf(codes.PermissionDenied, "%s may not read %s", id, r.URL.Path))
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// former routes the predecessor's paths to what they are called now. It had
// each of them below /clusters/ID too, of which there is one here.
func (g *Gateway) former(mux *http.ServeMux, rest http.Handler) {
	for pattern, now := range map[string]string{
		"POST /workloads/schedule":   "/v1/workloads",
		"GET /workloads":             "/v1/workloads",
		"GET /workloads/{id}":        "/v1/workloads/{id}",
		"DELETE /workloads/{id}":     "/v1/workloads/{id}",
		"POST /workloads/{id}/retry": "/v1/workloads/{id}/retry",
		"GET /nodes":                 "/v1/nodes",
		"GET /nodes/{id}":            "/v1/nodes/{id}",
		"GET /cluster/metrics":       "/v1/cluster",
	} {
		serve := func(w http.ResponseWriter, r *http.Request) {
			if cluster := r.PathValue("cluster"); cluster != "" {
				if err := g.isCluster(cluster); err != nil {
					writeProblem(w, r, err)
					return
				}
			}
			r = r.Clone(r.Context())
			id := r.PathValue("id")
			r.URL.Path, r.URL.RawPath = strings.Replace(now, "{id}", id, 1), strings.Replace(now, "{id}", url.PathEscape(id), 1)
			rest.ServeHTTP(w, r)
		}
		verb, path, _ := strings.Cut(pattern, " ")
		mux.HandleFunc(pattern, serve)
		mux.HandleFunc(verb+" /clusters/{cluster}"+path, serve)
	}
}

func (g *Gateway) isCluster(id string) error {
	cluster := &pb.ClusterInfo{}
	if _, _, err := model.Load(g.store.View(), model.ClusterKey, cluster); err != nil {
		return statusOf(err)
	}
	if id != cluster.Id {
		return status.Errorf(codes.NotFound, "there is no cluster %.100q here; this is %s", id, cluster.Id)
	}
	return nil
}

func serveOpenAPI(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(pb.OpenAPI) // a client that is gone needs no answer
}

// outcome is one check and what came of it.
type outcome struct {
	name string
	err  error
}

func run(ctx context.Context, checks []Check) (all []outcome, healthy bool) {
	healthy = true
	for _, c := range checks {
		err := c.Run(ctx)
		healthy = healthy && err == nil
		all = append(all, outcome{c.Name, err})
	}
	return all, healthy
}

// serveChecks answers "ok", or 503 with what is wrong; ?verbose lists all checks.
func serveChecks(w http.ResponseWriter, r *http.Request, checks []Check) {
	all, healthy := run(r.Context(), checks)
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	if !healthy {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	verbose := r.URL.Query().Has("verbose")
	for _, o := range all {
		switch {
		case o.err != nil:
			fmt.Fprintf(w, "[-] %s: %v\n", o.name, o.err)
		case verbose:
			fmt.Fprintf(w, "[+] %s ok\n", o.name)
		}
	}
	if healthy {
		fmt.Fprintln(w, "ok")
	}
}

// serveHealth is the predecessor's: JSON, of the checks for readiness.
func (g *Gateway) serveHealth(w http.ResponseWriter, r *http.Request) {
	all, healthy := run(r.Context(), g.config.Ready)
	answer := struct {
		Status  string            `json:"status"`
		Version string            `json:"version"`
		Checks  map[string]string `json:"checks"`
	}{"ok", g.config.Version, map[string]string{}}
	for _, o := range all {
		answer.Checks[o.name] = "ok"
		if o.err != nil {
			answer.Checks[o.name] = o.err.Error()
		}
	}
	code := http.StatusOK
	if !healthy {
		answer.Status, code = "unavailable", http.StatusServiceUnavailable
	}
	writeDocument(w, code, "application/json", answer)
}
