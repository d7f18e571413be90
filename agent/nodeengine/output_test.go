package nodeengine_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/agent"
	"github.com/kiln-build/kiln/agent/agenttest"
	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/agent/nodeengine"
	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox/policy"
	"github.com/kiln-build/kiln/snapshot/nodestore"
)

// receiver reads what it is given, as a node's runtime does.
type receiver struct {
	mu     sync.Mutex
	names  []string
	layers int
	fail   error
}

func (r *receiver) Receive(ctx context.Context, image nodestore.Image) (digest.Digest, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail != nil {
		return "", r.fail
	}
	var m ocispecs.Manifest
	data, err := content.ReadBlob(ctx, image.Content, image.Target)
	if err != nil {
		return "", err
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return "", err
	}
	for _, l := range m.Layers {
		if _, err := content.ReadBlob(ctx, image.Content, l); err != nil {
			return "", err
		}
	}
	r.names = append(r.names, image.Name.String())
	r.layers = len(m.Layers)
	return m.Config.Digest, nil
}

// outputAgent is an agent with a receiver for images under node.example.
func outputAgent(t *testing.T, r *receiver) (agentv1.BuildServiceClient, *engine.Node) {
	t.Helper()
	t.Setenv("TMPDIR", os.TempDir())
	root := t.TempDir()
	node, err := engine.OpenNode(context.Background(), engine.NodeConfig{Root: root})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, node.Close()) })
	return agenttest.Serve(t, agenttest.New(t, nodeengine.New(node), func(c *agent.Config) {
		c.Root, c.Images = root, r
		c.Policy = agent.RulePolicy(func(string) agent.TenantRules {
			return agent.TenantRules{Rules: []policy.Rules{{Name: "test"}}, NodeImages: []string{"node.example"}}
		})
	})), node
}

func TestOutputs(t *testing.T) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	r := &receiver{}
	c, node := outputAgent(t, r)
	ctx := agenttest.Context(t, "a")
	outputs := func(s *agentv1.BuildSpec) {
		s.Outputs = []*agentv1.Output{
			{To: &agentv1.Output_Registry{Registry: &agentv1.RegistryOutput{Image: host + "/x:1"}}},
			{To: &agentv1.Output_Registry{Registry: &agentv1.RegistryOutput{Image: host + "/y:1"}}},
			{To: &agentv1.Output_Node{Node: &agentv1.NodeOutput{Image: "node.example/z:1"}}},
		}
	}
	class := agentv1.SandboxClass_SANDBOX_CLASS_USERNS
	result := agenttest.CheckEvents(t, build(t, ctx, c, "one", class, base, outputs), 0)
	require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "%v", result)
	for _, repo := range []string{"/x:1", "/y:1"} {
		ref, err := name.ParseReference(host + repo)
		require.NoError(t, err)
		desc, err := remote.Head(ref)
		require.NoError(t, err)
		require.Equal(t, desc.Digest.String(), result.GetImageDigest())
	}
	require.ElementsMatch(t, []string{host + "/x:1", host + "/y:1", "node.example/z:1"}, result.GetImageNames())
	require.Equal(t, []string{"node.example/z:1"}, r.names)
	require.Equal(t, 1, r.layers)
	size := sizeAt(t, host+"/x:1")
	require.Greater(t, size, int64(1<<19), "busybox is in it")
	require.Equal(t, size, result.GetImageSize())

	// The engine has forgotten what was handed on.
	e, release, err := node.Engine(ctx, engine.Domain{Tenant: "a", Sandbox: "userns"})
	require.NoError(t, err)
	defer release()
	_, _, err = e.Image(ctx, "node.example/z:1")
	require.Error(t, err)

	r.fail = errors.New("the node's runtime does not answer")
	result = agenttest.CheckEvents(t, build(t, ctx, c, "two", class, base, outputs), 0)
	require.Equal(t, agentv1.BuildState_BUILD_STATE_FAILED, result.GetState(), "%v", result)
	require.Equal(t, agentv1.FailureReason_FAILURE_REASON_PUSH, result.GetFailure().GetReason())
	require.Contains(t, result.GetFailure().GetMessage(), "spec.outputs[2].node")
	_, _, err = e.Image(ctx, "node.example/z:1")
	require.Error(t, err)
}

// sizeAt sums up what the manifests of an image at a registry say, attestations left out.
func sizeAt(t *testing.T, image string) (size int64) {
	t.Helper()
	ref, err := name.ParseReference(image)
	require.NoError(t, err)
	desc, err := remote.Get(ref)
	require.NoError(t, err)
	manifests := []v1.Hash{desc.Digest}
	if desc.MediaType.IsIndex() {
		manifests = nil
		index, err := desc.ImageIndex()
		require.NoError(t, err)
		list, err := index.IndexManifest()
		require.NoError(t, err)
		for _, m := range list.Manifests {
			if m.Platform.OS != "unknown" {
				manifests = append(manifests, m.Digest)
			}
		}
	}
	for _, digest := range manifests {
		img, err := remote.Image(ref.Context().Digest(digest.String()))
		require.NoError(t, err)
		m, err := img.Manifest()
		require.NoError(t, err)
		size += m.Config.Size
		for _, l := range m.Layers {
			size += l.Size
		}
	}
	return size
}

func TestSizeOfImagesOfManyPlatforms(t *testing.T) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	c, node := outputAgent(t, &receiver{})
	ctx := agenttest.Context(t, "a")
	const file = base + "ARG TARGETARCH\nLABEL arch=$TARGETARCH\nCOPY Dockerfile /$TARGETARCH\n"
	for id, tt := range map[string]struct {
		compression  string
		platforms    []string
		attestations map[string]string
		manifests    int
	}{
		"two":      {platforms: []string{"linux/amd64", "linux/arm64"}, manifests: 2},
		"zstd":     {platforms: []string{"linux/amd64", "linux/s390x"}, compression: "zstd", manifests: 2},
		"attested": {platforms: []string{"linux/amd64", "linux/arm64"}, attestations: map[string]string{"provenance": "mode=max"}, manifests: 4},
	} {
		t.Run(id, func(t *testing.T) {
			image := host + "/" + id + ":1"
			result := agenttest.CheckEvents(t, build(t, ctx, c, id, agentv1.SandboxClass_SANDBOX_CLASS_USERNS, file, func(s *agentv1.BuildSpec) {
				s.Platforms, s.Attestations = tt.platforms, tt.attestations
				s.Outputs = []*agentv1.Output{{To: &agentv1.Output_Registry{Registry: &agentv1.RegistryOutput{Image: image, Compression: tt.compression, ForceCompression: true}}}}
			}), 0)
			require.Equal(t, agentv1.BuildState_BUILD_STATE_SUCCEEDED, result.GetState(), "%v", result)
			ref, err := name.ParseReference(image)
			require.NoError(t, err)
			index, err := remote.Index(ref)
			require.NoError(t, err)
			list, err := index.IndexManifest()
			require.NoError(t, err)
			require.Len(t, list.Manifests, tt.manifests)
			require.Positive(t, result.GetImageSize())
			require.Equal(t, sizeAt(t, image), result.GetImageSize())

			// The cache and whatever nothing refers to may go between a build's end and the
			// look at its manifests.
			_, err = c.Prune(ctx, &agentv1.PruneRequest{All: true})
			require.NoError(t, err)
			s, err := nodeengine.New(node).Open(ctx, agent.Domain{Tenant: "a", Sandbox: "userns"})
			require.NoError(t, err)
			defer s.Close()
			for _, m := range list.Manifests {
				_, err = content.ReadBlob(ctx, s.Content(), ocispecs.Descriptor{Digest: digest.Digest(m.Digest.String())})
				require.NoError(t, err)
			}
			other, err := nodeengine.New(node).Open(ctx, agent.Domain{Tenant: "b", Sandbox: "userns"})
			require.NoError(t, err)
			defer other.Close()
			_, err = content.ReadBlob(ctx, other.Content(), ocispecs.Descriptor{Digest: digest.Digest(result.GetImageDigest())})
			require.Error(t, err, "what one tenant built another does not read")
		})
	}
}
