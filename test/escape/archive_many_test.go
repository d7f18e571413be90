package escape

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/client/llb"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/test/escape/hostile"
)

var _ = register(
	entry{
		ID: "archive/image-many", Severity: takesNodeDown,
		Threat: "An image has more layers than a mount's options have room for, or a thousand, which keep the node busy.",
		Test:   imageMany,
	},
	entry{
		ID: "archive/image-index", Severity: takesNodeDown, Once: noStep,
		Threat: "An image's index names itself, or indexes of indexes, and manifests have a hundred thousand entries.",
		Test:   imageIndex,
	},
)

// layered is an image of a program and so many layers in all, each with a file of its own
// and one that all have.
func layered(t *testing.T, n int) hostile.Image {
	t.Helper()
	layers := [][]byte{program(t)}
	for i := 2; i <= n; i++ {
		layers = append(layers, hostile.Tar(hostile.Plain,
			hostile.Entry{Type: hostile.File, Name: fmt.Sprint("layer-", i), Mode: 0o644},
			hostile.Entry{Type: hostile.File, Name: "last", Mode: 0o644, Body: fmt.Sprint(i)}))
	}
	return hostile.NewImage(layers, nil)
}

// run builds a step in the registry's image. The image is not named by its digest:
// BuildKit races with itself when it unpacks many layers of one that is.
func (reg *hostileRegistry) run(t *testing.T, ctx context.Context, e *env, command string) result {
	t.Helper()
	st := llb.Image(reg.Address + "/image:latest").Run(llb.Args([]string{"/bin/sh", "-c", command})).Root()
	def, err := st.Marshal(t.Context(), llb.LinuxAmd64)
	require.NoError(t, err)
	return e.BuildContext(t, ctx, build{LLB: def, NoExport: true})
}

// asked returns how many requests for manifests or blobs there were, but for those that ask
// only whether they are there.
func (reg *hostileRegistry) asked(what string) int {
	n := 0
	for _, r := range reg.Requests() {
		if r.Method != http.MethodHead && strings.Contains(r.URL.Path, "/"+what+"/") {
			n++
		}
	}
	return n
}

func imageMany(t *testing.T, e *env) {
	e = e.inMemory(t)
	// Names of so many directories are longer than a page.
	r := registryOf(t, e, layered(t, 130), nil).run(t, t.Context(), e, "echo $(cat /last); set -- /layer-*; echo $#; echo new > /layer-2")
	require.NoError(t, r.Err, r.Log)
	require.Equal(t, "130\n129\n", r.Log)

	// The kernel's overlay takes 500: of an image that has more no layer is fetched.
	for _, n := range []int{501, 1000} {
		over := registryOf(t, e, layered(t, n), nil)
		start := time.Now()
		r = over.run(t, t.Context(), e, "true")
		require.ErrorContains(t, r.Err, fmt.Sprintf("has %d layers, and the kernel mounts 500 at most", n))
		require.Less(t, time.Since(start), 5*time.Second)
		require.Equal(t, 1, over.asked("blobs"), "its configuration")
	}

	// Meanwhile others build, and it can be stopped.
	many := registryOf(t, e, layered(t, 500), nil)
	ctx, cancel := context.WithTimeout(t.Context(), buildTimeout)
	defer cancel()
	done := make(chan result, 1)
	go func() { done <- many.run(t, ctx, e, "true") }()
	require.Eventually(t, func() bool { return len(many.Requests()) > 1 }, 10*time.Second, 10*time.Millisecond, "the image is fetched")
	start := time.Now()
	e.healthy(t)
	t.Logf("another tenant's build took %v meanwhile", time.Since(start).Round(time.Millisecond))
	require.Less(t, time.Since(start), 10*time.Second)
	cancel()
	select {
	case r = <-done:
		require.Error(t, r.Err)
	case <-time.After(10 * time.Second):
		t.Fatal("the build does not end when it is cancelled")
	}
	e.healthy(t)
}

// index adds an index of manifests to an image.
func index(im *hostile.Image, manifests ...ocispecs.Descriptor) ocispecs.Descriptor {
	data, err := json.Marshal(ocispecs.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispecs.MediaTypeImageIndex, Manifests: manifests})
	if err != nil {
		panic(err)
	}
	return im.Add(ocispecs.MediaTypeImageIndex, data)
}

func repeat(d ocispecs.Descriptor, n int) []ocispecs.Descriptor {
	out := make([]ocispecs.Descriptor, n)
	for i := range out {
		out[i] = d
	}
	return out
}

// indexes are images by what is wrong with them.
func indexes(t *testing.T) map[string]hostile.Image {
	t.Helper()
	out := map[string]hostile.Image{}
	for name, change := range map[string]func(im *hostile.Image, top ocispecs.Descriptor) ocispecs.Descriptor{
		"nested": func(im *hostile.Image, top ocispecs.Descriptor) ocispecs.Descriptor {
			for range 100 {
				top = index(im, top)
			}
			return top
		},
		"twice each": func(im *hostile.Image, top ocispecs.Descriptor) ocispecs.Descriptor {
			for range 60 {
				top = index(im, top, top)
			}
			return top
		},
		"wide": func(im *hostile.Image, top ocispecs.Descriptor) ocispecs.Descriptor {
			return index(im, repeat(top, 15_000)...)
		},
		"too wide": func(im *hostile.Image, top ocispecs.Descriptor) ocispecs.Descriptor {
			return index(im, repeat(top, 100_000)...)
		},
	} {
		im := imageOf(t, nil)
		im.Manifest = change(&im, im.Manifest)
		out[name] = im
	}
	for name, n := range map[string]int{"9,000 layers": 9_000, "12,000 layers": 12_000, "100,000 layers": 100_000} {
		out[name] = imageOf(t, func(c *ocispecs.Image, m *ocispecs.Manifest) {
			m.Layers = repeat(m.Layers[0], n)
			c.RootFS.DiffIDs = make([]digest.Digest, n)
			for i := range n {
				c.RootFS.DiffIDs[i] = m.Layers[0].Digest
			}
		})
	}
	return out
}

func imageIndex(t *testing.T, e *env) {
	e = e.small(t)
	grown := peakMemory(t)
	try := func(name, says string, reg *hostileRegistry) {
		start := time.Now()
		r := reg.pull(t, t.Context(), e, nil)
		took := time.Since(start)
		t.Logf("%s: %v, %d requests: %.200v", name, took.Round(time.Millisecond), len(reg.Requests()), r.Err)
		require.Less(t, took, lieTime+10*time.Second, name)
		if says == "" {
			require.NoError(t, r.Err, name)
		} else {
			require.ErrorContains(t, r.Err, says, name)
		}
	}
	says := map[string]string{"too wide": "rejecting", "9,000 layers": "has 9000 layers", "12,000 layers": "too many descriptors", "100,000 layers": "rejecting"}
	for name, im := range indexes(t) {
		try(name, says[name], registryOf(t, e, im, nil))
	}
	im := imageOf(t, nil)
	itself := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageIndex, Digest: digest.FromString("itself"), Size: 300}
	body := im.Blobs[index(&im, itself).Digest]
	try("names itself", "unexpected commit digest", registryOf(t, e, im, func(w http.ResponseWriter, r *http.Request, what string) bool {
		if what != "manifests" {
			return false
		}
		w.Header().Set("Content-Type", itself.MediaType)
		w.Header().Set("Docker-Content-Digest", itself.Digest.String())
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		if r.Method != http.MethodHead {
			_, _ = w.Write(body)
		}
		return true
	}))
	e.healthy(t)
	e.reclaimed(t)
	t.Logf("memory grew by %d MiB", grown()>>20)
	require.Less(t, grown(), int64(1<<30), "memory of the agent")
}
