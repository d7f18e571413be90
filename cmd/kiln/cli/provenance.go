package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	provenanceKey       = "buildx.build.provenance"
	provenancePredicate = "https://slsa.dev/provenance/"
	predicateTypeKey    = "in-toto.io/predicate-type"

	// maxProvenance bounds a provenance document in bytes.
	maxProvenance = 64 << 20
)

// fetchProvenance returns the provenance that the engine recorded for the build
// ref, by metadata key: one for the build or one for each platform. What repeats
// the build's definition and times is left out.
func fetchProvenance(ctx context.Context, c *client.Client, ref string) (map[string]any, error) {
	events, err := c.ControlClient().ListenBuildHistory(ctx, &controlapi.BuildHistoryRequest{Ref: ref, EarlyExit: true})
	if err != nil {
		return nil, fmt.Errorf("read build record: %w", err)
	}
	store := proxy.NewContentStore(c.ContentClient())
	out := map[string]any{}
	for {
		ev, err := events.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read build record: %w", err)
		}
		if ev.Record == nil {
			continue
		}
		results := map[string]*controlapi.BuildResultInfo{}
		if ev.Record.Result != nil {
			results[provenanceKey] = ev.Record.Result
		}
		if len(ev.Record.Results) > 0 {
			clear(results)
			for platform, r := range ev.Record.Results {
				results[provenanceKey+"/"+platform] = r
			}
		}
		for key, r := range results {
			doc, err := readProvenance(ctx, store, r)
			if err != nil {
				return nil, err
			}
			if doc != nil {
				out[key] = doc
			}
		}
	}
}

func readProvenance(ctx context.Context, store content.Store, r *controlapi.BuildResultInfo) (map[string]any, error) {
	for _, a := range r.Attestations {
		if a.MediaType != "application/vnd.in-toto+json" || !strings.HasPrefix(a.Annotations[predicateTypeKey], provenancePredicate) {
			continue
		}
		if a.Size > maxProvenance {
			return nil, fmt.Errorf("provenance of %d bytes is too large", a.Size)
		}
		data, err := content.ReadBlob(ctx, store, ocispecs.Descriptor{MediaType: a.MediaType, Digest: digest.Digest(a.Digest), Size: a.Size})
		if err != nil {
			return nil, fmt.Errorf("read provenance: %w", err)
		}
		var doc map[string]any
		if err := json.Unmarshal(data, &doc); err != nil {
			return nil, fmt.Errorf("decode provenance: %w", err)
		}
		delete(doc, "buildConfig")
		delete(doc, "metadata")
		if d, ok := doc["buildDefinition"].(map[string]any); ok {
			if p, ok := d["internalParameters"].(map[string]any); ok {
				delete(p, "buildConfig")
			}
		}
		return doc, nil
	}
	return nil, nil
}
