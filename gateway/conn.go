package gateway

import (
	"context"

	"google.golang.org/grpc/metadata"

	"github.com/persys-dev/persys/gateway/local"
)

// localConn lets REST call the services in process.
func (g *Gateway) localConn() *local.Conn {
	c := local.New(AdmitLocally)
	g.Register(c)
	return c
}

// AdmitLocally asks the table that the interceptors ask, which do not run in
// process. The caller's identity is a value in the context, put there by the HTTP
// handler out of the TLS connection. Nothing that a request carries can set it;
// metadata, the only thing that headers could become, is dropped.
func AdmitLocally(ctx context.Context, method string) (context.Context, error) {
	id, ok := IdentityFrom(ctx)
	if err := Authorize(method, id, ok); err != nil {
		return nil, err
	}
	return metadata.NewOutgoingContext(ctx, metadata.MD{}), nil
}
