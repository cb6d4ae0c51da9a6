package etcd

import (
	"path"
	"strings"

	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// Descriptors are the program's, for reflection: etcd's published files import each
// other as etcd/api/<directory>/<file>, which is not what they are registered as.
type Descriptors struct{}

var _ protodesc.Resolver = Descriptors{}

// FindFileByPath finds a file by either name.
func (Descriptors) FindFileByPath(name string) (protoreflect.FileDescriptor, error) {
	found, err := protoregistry.GlobalFiles.FindFileByPath(name)
	if err == nil || !strings.HasPrefix(name, "etcd/api/") {
		return found, err
	}
	if found, err = protoregistry.GlobalFiles.FindFileByPath(path.Base(name)); err != nil {
		return nil, err
	}
	return renamed{found, name}, nil
}

// renamed is a file by another name.
type renamed struct {
	protoreflect.FileDescriptor
	path string
}

func (r renamed) Path() string { return r.path }

// FindDescriptorByName finds a message, a service, or what else has a name.
func (Descriptors) FindDescriptorByName(name protoreflect.FullName) (protoreflect.Descriptor, error) {
	return protoregistry.GlobalFiles.FindDescriptorByName(name)
}
