#!/usr/bin/env bash
# Builds examples/hello in a gVisor sandbox, with no daemon and no registry, and runs the result.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/bin:$PATH"
root=${KILN_ROOT:-/var/lib/kiln}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The base image comes from Debian's packages: a C compiler and busybox.
toolbox=$root/quickstart/toolbox
if [ ! -e "$toolbox/index.json" ]; then
	mkdir -p "$work/toolbox" "$toolbox"
	mmdebstrap --quiet --variant=extract --include=busybox,gcc,libc6-dev bookworm "$work/toolbox/rootfs.tar"
	printf 'FROM scratch\nADD rootfs.tar /\nRUN ["/bin/busybox", "ln", "-s", "busybox", "/bin/sh"]\n' >"$work/toolbox/Dockerfile"
	kiln build --root "$root" --progress plain --provenance=false -o "type=oci,tar=false,dest=$toolbox" "$work/toolbox"
fi

hello() { kiln build --root "$root" --sandbox gvisor --provenance=false --build-context "toolbox=oci-layout://$toolbox" "$@" examples/hello; }
hello --progress plain --no-cache -o "type=oci,dest=$work/hello.tar" --metadata-file "$work/metadata.json"
hello --progress quiet -o "type=local,dest=$work/rootfs" >"$work/quiet"

echo
echo "Image digest: $(sed -n 's/.*"containerimage.digest": *"\([^"]*\)".*/\1/p' "$work/metadata.json" | head -n 1)"
echo "Its output:"
chroot "$work/rootfs" /hello | tee "$work/output"
grep -q gvisor "$work/output" && echo "The step ran in gVisor: its kernel is the sandbox's, not this machine's ($(uname -r))."
