package nodestore

import (
	"context"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// releaseTimeout bounds the release of a hold, which goes on when the request that
// made it is cancelled.
const releaseTimeout = 10 * time.Second

// maxRedirects bounds how often the check of a tenant's right follows a redirect.
const maxRedirects = 5

// maxCorrupt bounds how many corrupt blobs of the node are remembered.
const maxCorrupt = 1024

// Loan tells what became of a blob that a pull asked for and that the node has.
type Loan struct {
	// Repository is the full name of the repository that was pulled from.
	Repository string
	// Blob and Size are the blob's digest and its size in bytes.
	Blob digest.Digest
	Size int64
	// Err is why the blob was fetched from the registry after all; nil when the
	// node's copy was used.
	Err error
}

// Lending returns hosts whose pulls take blobs from the node when it has them.
//
// Every blob that the node has is asked for at the registry first, by HEAD with
// the credentials of the pull: only what the registry would have given is lent,
// and only from images that the node knows by the same registry and repository.
// So neither a guessed digest nor a registry that says yes to everything gets a
// tenant what it could not pull. Manifests always come from the registry.
//
// A blob that is not lent, for whatever reason, is fetched as if there were no
// node. report, which may be nil, is told of every blob that the node has; it is
// called concurrently.
func Lending(hosts docker.RegistryHosts, node Node, report func(Loan)) docker.RegistryHosts {
	if report == nil {
		report = func(Loan) {}
	}
	l := &lender{node: node, report: report, corrupt: map[digest.Digest]struct{}{}}
	return func(host string) ([]docker.RegistryHost, error) {
		found, err := hosts(host)
		if err != nil {
			return nil, err
		}
		out := slices.Clone(found)
		for i := range out {
			out[i].Client = l.client(host, out[i])
		}
		return out, nil
	}
}

// lender lends the blobs of a node.
type lender struct {
	node   Node
	report func(Loan)

	mu sync.Mutex
	// corrupt has the blobs whose bytes on the node were found to be wrong; mu
	// guards it.
	corrupt map[digest.Digest]struct{}
}

// client returns a copy of the client of registry, a host that serves the images
// named by domain.
func (l *lender) client(domain string, registry docker.RegistryHost) *http.Client {
	client := http.Client{}
	if registry.Client != nil {
		client = *registry.Client
	}
	base := client.Transport
	if base == nil {
		base = http.DefaultTransport
	}
	client.Transport = &transport{lender: l, base: base, domain: domain, host: registry.Host, prefix: strings.TrimSuffix(registry.Path, "/") + "/"}
	return &client
}

// transport answers requests for blobs that the node has.
type transport struct {
	*lender
	base http.RoundTripper
	// domain is the registry as image names have it, host as URLs do.
	domain, host string
	// prefix comes before the repository in the path of a URL.
	prefix string
}

// RoundTrip implements http.RoundTripper.
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	repo, blob, ok := t.blobOf(req)
	if !ok || t.isCorrupt(blob) {
		return t.base.RoundTrip(req)
	}
	has, err := t.node.Probe(req.Context(), blob)
	if err != nil {
		t.report(Loan{Repository: repo.Name(), Blob: blob, Err: err})
		return t.base.RoundTrip(req)
	}
	size, ok := has[blob]
	if !ok {
		return t.base.RoundTrip(req)
	}
	resp, err := t.lend(req, repo, blob, size)
	t.report(Loan{Repository: repo.Name(), Blob: blob, Size: size, Err: err})
	if err != nil {
		return t.base.RoundTrip(req)
	}
	return resp, nil
}

// blobOf returns the repository and blob that req asks for, or false when it is
// another request, or one for a part of a blob.
func (t *transport) blobOf(req *http.Request) (reference.Named, digest.Digest, bool) {
	if req.Method != http.MethodGet || req.URL.Host != t.host || req.Header.Get("Range") != "" {
		return nil, "", false
	}
	rest, ok := strings.CutPrefix(req.URL.Path, t.prefix)
	if !ok {
		return nil, "", false
	}
	i := strings.LastIndex(rest, "/blobs/")
	if i < 0 {
		return nil, "", false
	}
	blob, err := digest.Parse(rest[i+len("/blobs/"):])
	if err != nil {
		return nil, "", false
	}
	repo, ok := repository(t.domain, rest[:i])
	return repo, blob, ok
}

// lend returns the node's copy of blob as the registry would have sent it.
func (t *transport) lend(req *http.Request, repo reference.Named, blob digest.Digest, size int64) (*http.Response, error) {
	if err := t.authorise(req, size); err != nil {
		return nil, err
	}
	hold, err := t.node.Lend(req.Context(), repo)
	if err != nil {
		return nil, err
	}
	release := func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(req.Context()), releaseTimeout)
		defer cancel()
		return hold.Release(ctx)
	}
	reader, err := hold.ReaderAt(req.Context(), ocispecs.Descriptor{Digest: blob, Size: size})
	if err != nil {
		_ = release() // the failed loan is what matters; the hold expires
		return nil, err
	}
	return &http.Response{
		Status:     "200 OK",
		StatusCode: http.StatusOK,
		Proto:      "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{
			"Content-Type":          {"application/octet-stream"},
			"Content-Length":        {strconv.FormatInt(size, 10)},
			"Docker-Content-Digest": {blob.String()},
		},
		ContentLength: size,
		Body:          newBody(reader, blob, size, release, func() { t.markCorrupt(blob) }, t.broken(req, repo, blob)),
		Request:       req,
	}, nil
}

// broken returns what a reader is told when the runtime ends in the middle of a blob: the
// same as when a registry does, after which a pull asks for the rest. Parts of blobs are
// never lent, so that comes from the registry.
func (t *transport) broken(req *http.Request, repo reference.Named, blob digest.Digest) func(error) error {
	return func(err error) error {
		if req.Context().Err() != nil {
			return err
		}
		t.report(Loan{Repository: repo.Name(), Blob: blob, Err: err})
		return io.ErrUnexpectedEOF
	}
}

// authorise asks the registry whether it would have answered req, with the
// credentials that req has.
func (t *transport) authorise(req *http.Request, size int64) error {
	head := req.Clone(req.Context())
	head.Method = http.MethodHead
	head.RequestURI = ""
	client := http.Client{Transport: t.base, CheckRedirect: checkRedirect}
	resp, err := client.Do(head)
	if err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<10))
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return &RefusedError{Status: resp.Status}
	}
	if resp.ContentLength >= 0 && resp.ContentLength != size {
		return &RefusedError{Status: "another size of the blob: " + strconv.FormatInt(resp.ContentLength, 10)}
	}
	return nil
}

// RefusedError is why a blob is not lent: the registry would not have given it to
// the same request.
type RefusedError struct {
	// Status is what the registry answered.
	Status string
}

func (e *RefusedError) Error() string { return "registry answers " + e.Status }

// checkRedirect takes the credentials away from a request that leaves its host.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects {
		return http.ErrUseLastResponse
	}
	first := via[0].URL
	if req.URL.Host != first.Host || req.URL.Scheme != first.Scheme {
		for _, name := range []string{"Authorization", "Proxy-Authorization", "Cookie"} {
			req.Header.Del(name)
		}
	}
	return nil
}

func (l *lender) isCorrupt(blob digest.Digest) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, bad := l.corrupt[blob]
	return bad
}

func (l *lender) markCorrupt(blob digest.Digest) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.corrupt) >= maxCorrupt {
		clear(l.corrupt)
	}
	l.corrupt[blob] = struct{}{}
}
