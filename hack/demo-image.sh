#!/bin/sh
# Builds the examples' image, persys-demo-web:1, from nothing but a static Go
# program: no registry is needed. Does nothing where the image is up to date.
set -eu
cd "$(dirname "$0")/.."
image=persys-demo-web:1

if ! docker version >/dev/null 2>&1; then
	echo "demo-image: no Docker Engine answers ('docker version'); hack/setup.sh installs and starts one" >&2
	exit 1
fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -buildid=' -o "$dir/web" ./examples/web
cp examples/web/Dockerfile "$dir/"
sum=$(cat "$dir/web" "$dir/Dockerfile" | sha256sum | cut -c1-64)
if [ "$(docker image inspect -f '{{index .Config.Labels "persys.demo.sum"}}' "$image" 2>/dev/null || true)" = "$sum" ]; then
	echo "demo-image: $image is up to date"
	exit 0
fi
if ! out=$(docker build -q --label "persys.demo.sum=$sum" -t "$image" "$dir" 2>&1); then
	printf 'demo-image: %s\n' "$out" >&2
	exit 1
fi
echo "demo-image: built $image"
