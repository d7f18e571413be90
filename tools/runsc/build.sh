#!/bin/sh
# Builds runsc with kiln's additions: build.sh OUTPUT
#
# The go command takes no overlay over its module cache, so the module is copied
# and the files are added to the copy: sentry/ adds methods to the control server of a
# sandbox, and filters/ the system call filters in compiled form. What is changed are
# two calls, which use the compiled filters, and what sentry/changes.patch has: the
# overlay asks before it drops a file or a directory (overlay/keep.go); and where nobody
# spins (--systrap-disable-fast-path) a task waits for its program in the kernel at
# once, not first in the queue of the goroutine that would spin for all, and on the
# same processor (systrap/place.go), for which the sentry may bind threads, and on the same
# thread of the sentry, also after a new address space was made; more goroutines may run
# at once than there are processors (gomaxprocs/spare.go); memory that a program gave back
# goes to the next one (pgalloc/waste.go); and what a program is about to use is mapped
# before it asks (mm/map.go).
set -eu
cd "$(dirname "$0")"
out=$1
src=$(dirname "$out")/.runsc-source
go=${GO:-go}
export CGO_ENABLED=0

$go mod download gvisor.dev/gvisor
module=$($go list -m -f '{{.Dir}}' gvisor.dev/gvisor)
version=$($go list -m -f '{{.Version}}' gvisor.dev/gvisor)
rm -rf "$src"
mkdir -p "$src"
cp -r "$module" "$src/gvisor"
chmod -R u+w "$src/gvisor"
cp go.sum "$src/go.sum"
cp go.mod "$src/go.mod"
$go mod edit -replace "gvisor.dev/gvisor=$src/gvisor" "$src/go.mod"

(cd "$src/gvisor" && GIT_CEILING_DIRECTORIES=$src git apply "$OLDPWD/sentry/changes.patch")
cp sentry/gomaxprocs/spare.go "$src/gvisor/pkg/gomaxprocs/kiln_spare.go"
cp sentry/overlay/keep.go "$src/gvisor/pkg/sentry/fsimpl/overlay/kiln_keep.go"
cp sentry/mm/map.go "$src/gvisor/pkg/sentry/mm/kiln_map.go"
cp sentry/pgalloc/waste.go "$src/gvisor/pkg/sentry/pgalloc/kiln_waste.go"
cp sentry/systrap/place.go "$src/gvisor/pkg/sentry/platform/systrap/kiln_place.go"

mkdir "$src/gvisor/runsc/kilnfilters"
cp filters/config/compile.go "$src/gvisor/runsc/boot/filter/config/kiln_compile.go"
cp filters/systrap/compile.go "$src/gvisor/pkg/sentry/platform/systrap/kiln_compile.go"
cp filters/*.go "$src/gvisor/runsc/kilnfilters/"
$go run -modfile="$src/go.mod" -trimpath gvisor.dev/gvisor/runsc/kilnfilters "$src/gvisor"
rm "$src/gvisor/runsc/boot/filter/config/kiln_compile.go" "$src/gvisor/pkg/sentry/platform/systrap/kiln_compile.go"

mkdir "$src/gvisor/kilnstart"
cp sentry/kilnstart/*.go "$src/gvisor/kilnstart/"
cp sentry/seccheck/points.go "$src/gvisor/pkg/sentry/seccheck/kiln_points.go"
cp sentry/boot/step.go "$src/gvisor/runsc/boot/kiln_step.go"
cp sentry/kernel/step.go "$src/gvisor/pkg/sentry/kernel/kiln_step.go"
cp sentry/main/starter.go "$src/gvisor/runsc/kiln_starter.go"
cp sentry/overlay/upper.go "$src/gvisor/pkg/sentry/fsimpl/overlay/kiln_upper.go"
cp sentry/tmpfs/layer.go "$src/gvisor/pkg/sentry/fsimpl/tmpfs/kiln_layer.go"
$go build -modfile="$src/go.mod" -trimpath \
	-ldflags "-s -w -X gvisor.dev/gvisor/runsc/version.version=$version+kiln" -o "$out.new" gvisor.dev/gvisor/runsc
mv "$out.new" "$out"
