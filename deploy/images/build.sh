#!/usr/bin/env bash
# Builds kiln's images with kiln, and pushes them when REGISTRY is set.
#   REGISTRY=registry.example.com/kiln TAG=v1 deploy/images/build.sh
# Without REGISTRY they become OCI archives in bin/images. BIN is the directory of the programs. INSECURE=true pushes over plain HTTP.
set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "$0")/../.."
root=${KILN_ROOT:-/var/lib/kiln}
bin=${BIN:-bin}
tag=${TAG:-dev}
cache=$root/images
mkdir -p "$cache" "$bin/images"

# git and ssh fetch sources, mount prepares the agent's container.
packages=git,openssh-client,ca-certificates,mount
rootfs=$cache/agent-$(sha256sum "$script" | cut -c1-12).tar
if [ ! -e "$rootfs" ]; then
	mmdebstrap --quiet --variant=minbase --include="$packages" \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
		bookworm "$cache/part.tar"
	mv "$cache/part.tar" "$rootfs"
fi
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
ln "$rootfs" "$context/rootfs.tar" 2>/dev/null || cp "$rootfs" "$context/rootfs.tar"

image() { # name, context
	local out="type=oci,dest=$bin/images/$1.tar,name=kiln/$1:$tag"
	if [ -n "${REGISTRY:-}" ]; then
		out="type=image,name=$REGISTRY/$1:$tag,push=true,registry.insecure=${INSECURE:-false}"
	fi
	"$bin/kiln" build --root "$root" --progress plain --provenance=false --build-context "bin=$bin" -f "deploy/images/$1/Dockerfile" -o "$out" "$2"
	echo "${REGISTRY:-$bin/images}/$1:$tag"
}
image agent "$context"
image controller deploy/images/controller
