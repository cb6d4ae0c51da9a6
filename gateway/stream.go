package gateway

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"time"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/persys-dev/persys/gateway/local"
)

// keepAliveEvery is how often a stream of events with nothing to say says so,
// for proxies end what is silent.
const keepAliveEvery = 15 * time.Second

// serveStream answers with a stream: server-sent events where the client accepts
// them, else one JSON document a line. What is wrong with the call itself is an
// ordinary problem document; an error after the first byte is the last event
// ("problem") or line ({"error": …}).
func serveStream(w http.ResponseWriter, r *http.Request, conn *local.Conn, route *route, path map[string]string) {
	m := route.method
	request := m.input.New().Interface()
	err := route.decodeQuery(r.URL.Query(), request)
	for field, value := range path {
		err = errors.Join(err, runtime.PopulateFieldFromPath(request, field, value))
	}
	if err != nil {
		writeProblem(w, r, statusOf(err))
		return
	}
	stream, err := conn.NewStream(r.Context(), nil, m.fullName)
	if err != nil {
		writeProblem(w, r, err)
		return
	}
	if err := errors.Join(stream.SendMsg(request), stream.CloseSend()); err != nil {
		writeProblem(w, r, err)
		return
	}
	if _, err := stream.Header(); err != nil {
		writeProblem(w, r, err)
		return
	}
	out := &streamWriter{w: w, flush: http.NewResponseController(w).Flush, events: acceptsEvents(r.Header.Get("Accept"))}
	out.run(r, stream, m)
}

func acceptsEvents(accept string) bool {
	for one := range strings.SplitSeq(accept, ",") {
		if kind, _, err := mime.ParseMediaType(one); err == nil && kind == "text/event-stream" {
			return true
		}
	}
	return false
}

type streamWriter struct {
	w      http.ResponseWriter
	flush  func() error
	events bool
	begun  bool
}

func (s *streamWriter) run(r *http.Request, stream grpc.ClientStream, m *methodInfo) {
	type received struct {
		message proto.Message
		err     error
	}
	// The stream is read beside, so that silence can be interrupted. The reader
	// ends with the request's context at the latest.
	messages := make(chan received)
	go func() {
		for {
			next := received{message: m.output.New().Interface()}
			next.err = stream.RecvMsg(next.message)
			select {
			case messages <- next:
			case <-r.Context().Done():
				return
			}
			if next.err != nil {
				return
			}
		}
	}()
	// The header was sent or the call has ended: if it failed, it is said now.
	select {
	case <-stream.(*local.Stream).Ended():
	default:
		s.begin()
	}
	alive := time.NewTicker(keepAliveEvery)
	defer alive.Stop()
	for {
		var err error
		select {
		case next := <-messages:
			switch {
			case errors.Is(next.err, io.EOF):
				s.begin()
				return
			case next.err != nil:
				s.fail(r, next.err)
				return
			}
			s.begin()
			err = s.write(next.message)
		case <-alive.C:
			if s.events {
				_, err = io.WriteString(s.w, ":\n\n")
			}
		case <-r.Context().Done():
			return
		}
		if err == nil {
			err = s.flush()
		}
		if err != nil {
			return // the client is gone
		}
	}
}

func (s *streamWriter) begin() {
	if s.begun {
		return
	}
	s.begun = true
	h := s.w.Header()
	h.Set("Content-Type", "application/x-ndjson")
	if s.events {
		h.Set("Content-Type", "text/event-stream")
	}
	h.Set("Cache-Control", "no-store")
	s.w.WriteHeader(http.StatusOK)
	_ = s.flush() // a client that is gone is seen at the next write
}

func (s *streamWriter) write(m proto.Message) error {
	data, err := marshalJSON(m)
	if err != nil {
		return err
	}
	if !s.events {
		_, err = s.w.Write(append(data, '\n'))
		return err
	}
	// The revision is where a browser that reconnects goes on (Last-Event-ID).
	if f := m.ProtoReflect().Descriptor().Fields().ByName("revision"); f != nil && f.Kind() == protoreflect.Int64Kind {
		_, err = fmt.Fprintf(s.w, "id: %d\ndata: %s\n\n", m.ProtoReflect().Get(f).Int(), data)
		return err
	}
	_, err = fmt.Fprintf(s.w, "data: %s\n\n", data)
	return err
}

func (s *streamWriter) fail(r *http.Request, err error) {
	if !s.begun {
		writeProblem(s.w, r, err)
		return
	}
	data, marshalErr := json.Marshal(problemOf(r, err))
	if marshalErr != nil {
		return
	}
	if s.events {
		_, err = fmt.Fprintf(s.w, "event: problem\ndata: %s\n\n", data)
	} else {
		_, err = fmt.Fprintf(s.w, "{\"error\":%s}\n", data)
	}
	if err == nil {
		_ = s.flush() // the last write: nobody is left to be told
	}
}
