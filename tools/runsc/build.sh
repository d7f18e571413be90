#!/bin/sh
# Builds runsc with kiln's additions: build.sh OUTPUT
#
# The go command takes no overlay over its module cache, so the module is copied,
# the files of sentry/ are added to it, and nothing else is changed.
set -eu
cd "$(dirname "$0")"
out=$1
src=$(dirname "$out")/.runsc-source
go=${GO:-go}

$go mod download gvisor.dev/gvisor
module=$($go list -m -f '{{.Dir}}' gvisor.dev/gvisor)
version=$($go list -m -f '{{.Version}}' gvisor.dev/gvisor)
if [ "$(cat "$src/version" 2>/dev/null)" != "$version" ]; then
	rm -rf "$src"
	mkdir -p "$src"
	cp -r "$module" "$src/gvisor"
	chmod -R u+w "$src/gvisor"
	echo "$version" >"$src/version"
fi
cp sentry/step.go "$src/gvisor/runsc/boot/kiln_step.go"
cp go.mod "$src/go.mod"
cp go.sum "$src/go.sum"
$go mod edit -replace "gvisor.dev/gvisor=$src/gvisor" "$src/go.mod"
CGO_ENABLED=0 $go build -modfile="$src/go.mod" -trimpath \
	-ldflags "-s -w -X gvisor.dev/gvisor/runsc/version.version=$version+kiln" -o "$out.new" gvisor.dev/gvisor/runsc
mv "$out.new" "$out"
