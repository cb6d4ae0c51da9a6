package etcd

import (
	"context"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/reflection"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/persys-dev/persys/gateway/local"
)

// What a client learns by reflection describes every service in full.
func TestReflectionIsComplete(t *testing.T) {
	s, conn := grpc.NewServer(), local.New(func(ctx context.Context, _ string) (context.Context, error) { return ctx, nil })
	New(Config{}).Register(s)
	reflectionpb.RegisterServerReflectionServer(conn, reflection.NewServerV1(reflection.ServerOptions{Services: s, DescriptorResolver: Descriptors{}}))
	for service := range s.GetServiceInfo() {
		t.Run(service, func(t *testing.T) {
			stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			set, have := &descriptorpb.FileDescriptorSet{}, map[string]bool{}
			ask := func(r *reflectionpb.ServerReflectionRequest) {
				t.Helper()
				if err := stream.Send(r); err != nil {
					t.Fatal(err)
				}
				answer, err := stream.Recv()
				if err != nil || answer.GetErrorResponse() != nil {
					t.Fatalf("%v: %v, %v", r, answer, err)
				}
				for _, data := range answer.GetFileDescriptorResponse().FileDescriptorProto {
					file := &descriptorpb.FileDescriptorProto{}
					if err := proto.Unmarshal(data, file); err != nil {
						t.Fatal(err)
					}
					if !have[file.GetName()] {
						have[file.GetName()] = true
						set.File = append(set.File, file)
					}
				}
			}
			ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: service}})
			for i := 0; i < len(set.File); i++ {
				for _, name := range set.File[i].Dependency {
					if !have[name] {
						ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileByFilename{FileByFilename: name}})
					}
				}
			}
			files, err := protodesc.NewFiles(set)
			if err != nil {
				t.Fatal(err)
			}
			if d, err := files.FindDescriptorByName(protoreflect.FullName(service)); err != nil || d.(protoreflect.ServiceDescriptor).Methods().Len() == 0 {
				t.Errorf("%v, %v", d, err)
			}
		})
	}
}
