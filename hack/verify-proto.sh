#!/usr/bin/env bash
# Generates from proto/ into a copy and compares. Versions of protoc itself, which
# are in the headers, are not compared.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v protoc >/dev/null; then
	echo "verify-proto: left out, protoc is missing (hack/setup.sh installs it)" >&2
	exit 0
fi
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r proto tools go.mod go.sum "$copy/"
(cd "$copy" && sh proto/generate.sh)
if ! diff -r -q -I '^//[[:space:]-]*protoc' proto "$copy/proto" >&2; then
	echo "verify-proto: the generated code is not what proto/*.proto says (make proto makes it)" >&2
	exit 1
fi
