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
	slsa1 "github.com/in-toto/in-toto-golang/in_toto/slsa_provenance/v1"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	provenancetypes "github.com/moby/buildkit/solver/llbsolver/provenance/types"
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

func readProvenance(ctx context.Context, store content.Store, r *controlapi.BuildResultInfo) (*provenancetypes.ProvenancePredicateSLSA02, error) {
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
		return decodeProvenance(data, a.Annotations[predicateTypeKey])
	}
	return nil, nil
}

// decodeProvenance returns a document in the form that buildx writes: SLSA 0.2
// without the build's definition and times.
func decodeProvenance(data []byte, predicate string) (*provenancetypes.ProvenancePredicateSLSA02, error) {
	var doc provenancetypes.ProvenancePredicateSLSA02
	if predicate == slsa1.PredicateSLSAProvenance {
		var v1 provenancetypes.ProvenancePredicateSLSA1
		if err := json.Unmarshal(data, &v1); err != nil {
			return nil, fmt.Errorf("decode provenance: %w", err)
		}
		doc = *v1.ConvertToSLSA02()
	} else if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("decode provenance: %w", err)
	}
	doc.BuildConfig, doc.Metadata = nil, nil
	return &doc, nil
}
