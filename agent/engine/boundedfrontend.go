package engine

import (
	"context"
	"encoding/json"
	"path"
	"strings"

	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	dockerfile "github.com/moby/buildkit/frontend/dockerfile/builder"
	"github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/solver/result"
	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/agent/expansion"
)

// buildDockerfile is BuildKit's Dockerfile front end, which gets no Dockerfile and no base
// image with which it would take memory without end.
func buildDockerfile(ctx context.Context, c client.Client) (*client.Result, error) {
	args := map[string]string{}
	var configs [][]byte
	for key, value := range c.BuildOpts().Opts {
		if name, ok := strings.CutPrefix(key, "build-arg:"); ok {
			args[name] = value
		}
		if strings.HasPrefix(key, "input-metadata:") {
			var metadata map[string][]byte
			if json.Unmarshal([]byte(value), &metadata) == nil {
				configs = append(configs, metadata[exptypes.ExporterImageConfigKey])
			}
		}
	}
	b := &boundedClient{Client: c, check: expansion.New(args)}
	for _, config := range configs {
		if err := b.check.Image(config); err != nil {
			return nil, err
		}
	}
	res, err := dockerfile.Build(ctx, b)
	if err != nil || res == nil {
		return nil, err
	}
	return result.ConvertResult(res, func(ref client.Reference) (client.Reference, error) {
		if r, ok := ref.(*boundedReference); ok {
			return r.Reference, nil
		}
		return ref, nil
	})
}

// boundedClient checks what the front end reads.
type boundedClient struct {
	client.Client
	check *expansion.Check
}

// Solve implements client.Client.
func (b *boundedClient) Solve(ctx context.Context, req client.SolveRequest) (*client.Result, error) {
	res, err := b.Client.Solve(ctx, req)
	if err != nil || res == nil {
		return res, err
	}
	return result.ConvertResult(res, func(ref client.Reference) (client.Reference, error) {
		return &boundedReference{ref, b.check}, nil
	})
}

// ResolveImageConfig implements client.Client.
func (b *boundedClient) ResolveImageConfig(ctx context.Context, ref string, opt sourceresolver.Opt) (string, digest.Digest, []byte, error) {
	name, dgst, config, err := b.Client.ResolveImageConfig(ctx, ref, opt)
	if err == nil {
		err = b.check.Image(config)
	}
	return name, dgst, config, err
}

// ResolveSourceMetadata implements client.Client.
func (b *boundedClient) ResolveSourceMetadata(ctx context.Context, op *pb.SourceOp, opt sourceresolver.Opt) (*sourceresolver.MetaResponse, error) {
	res, err := b.Client.ResolveSourceMetadata(ctx, op, opt)
	if err == nil && res.Image != nil {
		err = b.check.Image(res.Image.Config)
	}
	return res, err
}

// boundedReference checks the files that are read of a result.
type boundedReference struct {
	client.Reference
	check *expansion.Check
}

// ReadFile implements client.Reference.
func (r *boundedReference) ReadFile(ctx context.Context, req client.ReadRequest) ([]byte, error) {
	data, err := r.Reference.ReadFile(ctx, req)
	if err == nil && path.Ext(req.Filename) != ".dockerignore" {
		err = r.check.Text(data)
	}
	return data, err
}
