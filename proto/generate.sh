#!/bin/sh
# Regenerates the Go code and the OpenAPI document from the .proto files.
# Needs protoc (Debian: protobuf-compiler); its plugins come from tools/go.mod.
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
