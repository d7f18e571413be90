package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/v1/layout"
	"golang.org/x/sys/unix"
)

// buildkitPeer is a daemon that serves BuildKit's API, with buildctl as its client.
type buildkitPeer struct {
	*daemon
	name, client, addr string
	mounted            string // what runsc leaves mounted, if anything
}

// runscWrapper lets stock BuildKit drive runsc: `runsc run` knows no --keep, and
// has deleted the container when it returns. $0 of the format is runsc.
const runscWrapper = `#!/bin/sh
# Drops the flag that runsc does not have, and a deletion that is done already.
for a; do
	shift
	case $a in
	--keep) ;;
	delete) exit 0 ;;
	*) set -- "$@" "$a" ;;
	esac
done
exec '%s' --root '%s' --ignore-cgroups --network=host --overlay2=none --platform=systrap "$@"
`

func startBuildKit(gvisor bool) func(context.Context, config, string) (peer, error) {
	return func(ctx context.Context, c config, dir string) (peer, error) {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		b := &buildkitPeer{name: "buildkit-runc", client: c.buildctl, addr: "unix://" + filepath.Join(dir, "s")}
		runtime := c.runc
		if gvisor {
			b.name = "buildkit-runsc"
			runtime = filepath.Join(dir, "runsc-for-buildkit")
			b.mounted = filepath.Join(dir, "runsc", "null-netns")
			if err := os.WriteFile(runtime, fmt.Appendf(nil, runscWrapper, c.runsc, filepath.Join(dir, "runsc")), 0o700); err != nil {
				return nil, err
			}
		}
		conf := filepath.Join(dir, "buildkitd.toml") // not the machine's
		if err := os.WriteFile(conf, nil, 0o600); err != nil {
			return nil, err
		}
		var err error
		b.daemon, err = startDaemon(ctx, b.ready, c.buildkitd, "--config", conf, "--root", filepath.Join(dir, "root"), "--addr", b.addr,
			"--otel-socket-path", filepath.Join(dir, "otel"), "--containerd-worker=false", "--oci-worker=true",
			"--oci-worker-snapshotter", "overlayfs", "--oci-worker-net", "host", "--oci-worker-binary", runtime)
		return b, err
	}
}

func (b *buildkitPeer) Name() string { return b.name }

func (b *buildkitPeer) ready(ctx context.Context) error {
	return command(ctx, nil, b.client, "--addr", b.addr, "debug", "workers")
}

func (b *buildkitPeer) Close() error {
	if err := b.daemon.Close(); err != nil || b.mounted == "" {
		return err
	}
	// Sandboxes that started at the same time have each mounted it.
	for {
		switch err := unix.Unmount(b.mounted, unix.MNT_DETACH); {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil
		case err != nil:
			return fmt.Errorf("unmount %s: %w", b.mounted, err)
		}
	}
}

func (b *buildkitPeer) Reset(ctx context.Context) error {
	return command(ctx, nil, b.client, "--addr", b.addr, "prune", "--all")
}

func (b *buildkitPeer) Build(ctx context.Context, r request) (usage, error) {
	args := []string{"--addr", b.addr, "build", "--progress", "plain", "--frontend", "dockerfile.v0",
		"--local", "context=" + r.dir, "--local", "dockerfile=" + r.dir}
	for name, dir := range r.bases {
		digest, err := layoutDigest(dir)
		if err != nil {
			return usage{}, err
		}
		args = append(args, "--oci-layout", name+"="+dir, "--opt", "context:"+name+"=oci-layout://"+name+"@"+digest)
	}
	if r.noCache {
		args = append(args, "--no-cache")
	}
	if r.push != "" {
		args = append(args, "--output", "type=image,name="+r.push+",push=true,registry.insecure=true")
	}
	return b.measure(ctx, 0, b.client, args...)
}

// BuildAs implements tenantPeer: everyone is the same to BuildKit.
func (b *buildkitPeer) BuildAs(ctx context.Context, _ uint32, r request) (usage, error) {
	return b.Build(ctx, r)
}

func layoutDigest(dir string) (string, error) {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return "", fmt.Errorf("read OCI layout %s: %w", dir, err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		return "", err
	}
	if len(m.Manifests) != 1 {
		return "", fmt.Errorf("OCI layout %s has %d images, want 1", dir, len(m.Manifests))
	}
	return m.Manifests[0].Digest.String(), nil
}
