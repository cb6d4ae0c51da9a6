#!/bin/sh
# Regenerates the Go code and the OpenAPI document from the .proto files.
# Needs protoc (Debian: protobuf-compiler); its plugins come from tools/go.mod, and
# etcd's .proto files from the modules that go.mod names.
set -eu
cd "$(dirname "$0")/.."
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
for plugin in \
	google.golang.org/protobuf/cmd/protoc-gen-go \
	google.golang.org/grpc/cmd/protoc-gen-go-grpc \
	github.com/grpc-ecosystem/grpc-gateway/v2/protoc-gen-grpc-gateway \
	github.com/grpc-ecosystem/grpc-gateway/v2/protoc-gen-openapiv2; do
	(cd tools && go build -o "$bin/" "$plugin")
done
PATH="$bin:$PATH" protoc -I proto -I proto/third_party \
	--go_out=proto --go_opt=paths=source_relative \
	--go-grpc_out=proto --go-grpc_opt=paths=source_relative \
	--grpc-gateway_out=proto --grpc-gateway_opt=paths=source_relative \
	--openapiv2_out=proto/persys/v1 --openapiv2_opt=allow_merge=true,merge_file_name=persys,openapi_naming_strategy=simple,openapi_configuration=proto/openapi.yaml \
	proto/persys/v1/*.proto

# The name under which etcd's own files import each other.
mkdir -p "$bin/include/etcd"
ln -s "$(go list -m -f '{{.Dir}}' go.etcd.io/etcd/api/v3)" "$bin/include/etcd/api"
for service in v3lock v3election; do
	PATH="$bin:$PATH" protoc -I "proto/etcd/${service}pb" -I "$bin/include" -I proto/third_party \
		-I "$(go list -m -f '{{.Dir}}' github.com/grpc-ecosystem/grpc-gateway/v2)" \
		--go_out="proto/etcd/${service}pb" --go_opt=paths=source_relative \
		--go-grpc_out="proto/etcd/${service}pb" --go-grpc_opt=paths=source_relative \
		--grpc-gateway_out="proto/etcd/${service}pb" --grpc-gateway_opt=paths=source_relative \
		"$service.proto"
done
