#!/usr/bin/env bash
# hack/fuzz.sh TIME: runs each fuzz target for so long. What is found is written
# to the package's testdata/fuzz, to be committed with the fix.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:?how long each, as in 10s}

# One package's targets share one instrumented test program.
programs=$(mktemp -d)
trap 'rm -rf "$programs"' EXIT
git ls-files -co --exclude-standard '*_test.go' | xargs grep -lE '^func Fuzz' | xargs -n1 dirname | sort -u | while read -r package; do
	name=$(echo "$package" | tr / -)
	go test -c -fuzz=Fuzz -o "$programs/$name" "./$package"
	sed -nE 's/^func (Fuzz[A-Za-z0-9_]*)\(.*/\1/p' "$package"/*_test.go | sort | while read -r target; do
		echo "fuzz $package $target $time"
		(cd "$package" && "$programs/$name" -test.run='^$' -test.fuzz="^$target\$" -test.fuzztime="$time" -test.fuzzcachedir="$programs/cache-$name" >"$programs/out" 2>&1) || {
			cat "$programs/out" >&2
			exit 1
		}
	done
done
