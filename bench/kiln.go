package main

import (
	"context"
	"os"
	"path/filepath"
	"time"
)

type kilnPeer struct {
	name, program, sandbox, root string
}

func startKiln(sandbox string) func(context.Context, config, string) (peer, error) {
	return func(_ context.Context, c config, dir string) (peer, error) {
		k := &kilnPeer{name: "kiln-" + sandbox, program: c.kiln, sandbox: sandbox, root: filepath.Join(dir, "root")}
		if _, err := os.Stat(c.kiln); err != nil {
			return nil, err
		}
		return k, k.mkroot()
	}
}

func (k *kilnPeer) Name() string             { return k.name }
func (k *kilnPeer) StartTime() time.Duration { return 0 }
func (k *kilnPeer) Close() error             { return nil }

// Reset removes what was built as a user would, and as the other peers do: ext4
// without a journal makes new files slowly for minutes where many were removed, so
// both have to make theirs in directories that stay.
func (k *kilnPeer) Reset(ctx context.Context) error {
	return command(ctx, nil, k.program, "prune", "--root", k.root, "--all", "--force")
}

func (k *kilnPeer) mkroot() error { return os.MkdirAll(k.root, 0o700) }

func (k *kilnPeer) Build(ctx context.Context, r request) (usage, error) {
	args := kilnArgs(r, "--root", k.root, "--sandbox", k.sandbox)
	var peak func() int64
	begin := time.Now()
	err := command(ctx, func(pid int) { peak = watchPeak(pid) }, k.program, args...)
	u := usage{elapsed: time.Since(begin)}
	if peak != nil {
		u.peak = peak()
	}
	return u, err
}

// kilnArgs are the arguments of kiln for a request; target says where it builds.
func kilnArgs(r request, target ...string) []string {
	args := append([]string{"build", "--progress", "plain", "--provenance=false"}, target...)
	for name, layout := range r.bases {
		args = append(args, "--build-context", name+"=oci-layout://"+layout)
	}
	if r.noCache {
		args = append(args, "--no-cache")
	}
	if r.push != "" {
		args = append(args, "--output", "type=image,name="+r.push+",push=true,registry.insecure=true")
	} else {
		args = append(args, "--output", "type=cacheonly")
	}
	return append(args, r.dir)
}
