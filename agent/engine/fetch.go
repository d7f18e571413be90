package engine

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/source"
	"github.com/moby/buildkit/source/containerimage"
	gitsource "github.com/moby/buildkit/source/git"
	httpsource "github.com/moby/buildkit/source/http"
	"github.com/moby/buildkit/util/gitutil"
	"github.com/moby/buildkit/util/tracing"
	"github.com/moby/buildkit/worker/base"

	"github.com/kiln-build/kiln/sandbox/egress"
	"github.com/kiln-build/kiln/sandbox/egress/gitcmd"
)

// fetching makes what the engines of a node fetch obey a policy: sources by HTTP and
// git, and registries with their tokens. A nil one changes nothing.
type fetching struct {
	policy    *egress.Policy
	transport *http.Transport
	client    *http.Client
	// before is what http.DefaultClient was.
	before *http.Client
	git    *gitcmd.Installed

	mu      sync.Mutex // guards domains
	domains []*domainFetching
}

// openFetching changes this process: git on the PATH and http.DefaultClient become
// those that policy holds for. dir is for files of git.
func openFetching(dir string, policy *egress.Policy) (*fetching, error) {
	if policy == nil {
		return nil, nil
	}
	git, err := gitcmd.Install(dir, policy)
	if err != nil {
		return nil, fmt.Errorf("restrict what git fetches: %w", err)
	}
	f := &fetching{policy: policy, transport: policy.Transport(), before: http.DefaultClient, git: git}
	f.client = &http.Client{Transport: tracing.NewTransport(f.transport)}
	// The library of registries takes this one for layers whose manifest names URLs.
	http.DefaultClient = f.client
	return f, nil
}

func (f *fetching) close() error {
	if f == nil {
		return nil
	}
	if http.DefaultClient == f.client {
		http.DefaultClient = f.before
	}
	f.transport.CloseIdleConnections()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, d := range f.domains {
		d.transport.CloseIdleConnections()
		d.unverified.CloseIdleConnections()
	}
	return f.git.Close()
}

// domainFetching makes what is fetched for one domain obey its own rules too. A nil one
// changes nothing.
type domainFetching struct {
	policy    *egress.Policy
	transport *http.Transport
	client    *http.Client
	// unverified is for registries that a build calls insecure.
	unverified *http.Transport
}

// of returns what fetches for a domain, whose policies say what rules returns; nil:
// nothing more. It may be used until close.
func (f *fetching) of(rules func() []egress.Rules) *domainFetching {
	if f == nil {
		return nil
	}
	p := *f.policy
	p.Rules = rules
	d := &domainFetching{policy: &p, transport: p.Transport(), unverified: unverifying(p.Transport())}
	d.client = &http.Client{Transport: tracing.NewTransport(d.transport)}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.domains = append(f.domains, d)
	return d
}

// hosts returns registries whose requests obey the policy, those for tokens too: the
// registry's client makes them. The given hosts must have no settings of TLS.
func (f *domainFetching) hosts(hosts docker.RegistryHosts) docker.RegistryHosts {
	if f == nil {
		return hosts
	}
	return func(host string) ([]docker.RegistryHost, error) {
		found, err := hosts(host)
		if err != nil {
			return nil, err
		}
		out := slices.Clone(found)
		for i := range out {
			out[i].Client = f.client
		}
		return out, nil
	}
}

// sources gives a worker sources that obey the policy in place of its own. By HTTP none
// keeps what has filled the disk, and no image has more layers than can be mounted.
func (f *domainFetching) sources(w *base.Worker, hosts docker.RegistryHosts) error {
	opt := httpsource.Opt{CacheAccessor: downloads{w.CacheMgr}}
	if f != nil {
		opt.Transport = f.client.Transport
	}
	h, err := httpsource.NewSource(opt)
	if err != nil {
		return fmt.Errorf("make HTTP source: %w", err)
	}
	w.HTTPSource = h
	w.SourceManager.Register(h)
	images := countedImages{w.ImageSource, w.ContentStore()}
	w.SourceManager.Register(images)
	w.SourceManager.Register(countedImages{w.OCILayoutSource, w.ContentStore()})
	if f == nil {
		return nil
	}
	if w.GitSource != nil {
		w.SourceManager.Register(gitSource{w.GitSource, f.policy})
	}
	if f.policy.Rules != nil {
		w.SourceManager.Register(imageSource{images, f.policy, hosts})
	}
	return nil
}

// imageSource tells early that a registry may not be reached. Of the clients of
// registries BuildKit keeps one for each name of an image, whoever pulls it, so the one
// that pulls may obey another domain's rules.
type imageSource struct {
	source.Source
	policy *egress.Policy
	hosts  docker.RegistryHosts
}

// Identifier implements source.Source.
func (s imageSource) Identifier(scheme, ref string, attrs map[string]string, platform *pb.Platform) (source.Identifier, error) {
	id, err := s.Source.Identifier(scheme, ref, attrs, platform)
	image, ok := id.(*containerimage.ImageIdentifier)
	if err != nil || !ok || !s.policy.Restricted() {
		return id, err
	}
	found, err := s.hosts(image.Reference.Hostname())
	if err != nil {
		return nil, fmt.Errorf("find registry of %s: %w", ref, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	for _, h := range found {
		if err := s.policy.CheckURL(ctx, &url.URL{Scheme: h.Scheme, Host: h.Host}); err != nil {
			return nil, fmt.Errorf("pull %s: %w", ref, err)
		}
	}
	return id, nil
}

// lookupTimeout bounds the look-up of a git server's name that is for the message of
// an error only.
const lookupTimeout = 5 * time.Second

// gitSource tells early, and in words, what git would be kept from: for HTTPS git
// shows no more of it than a number.
type gitSource struct {
	*gitsource.Source
	policy *egress.Policy
}

// Identifier implements source.Source. It is the one method that every use of a
// source begins with.
func (s gitSource) Identifier(scheme, ref string, attrs map[string]string, platform *pb.Platform) (source.Identifier, error) {
	id, err := s.Source.Identifier(scheme, ref, attrs, platform)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	if git, ok := id.(*gitsource.GitIdentifier); ok {
		if err := s.check(ctx, git.Remote); err != nil {
			return nil, err
		}
	}
	return id, nil
}

func (s gitSource) check(ctx context.Context, remote string) error {
	u, err := gitutil.ParseURL(remote)
	if err != nil {
		return nil // git refuses it in its own words
	}
	to := &url.URL{Scheme: u.Scheme, Host: u.Host}
	var denied *egress.DeniedError
	if err := s.policy.CheckURL(ctx, to); errors.As(err, &denied) {
		return fmt.Errorf("fetch from git: %w", denied)
	}
	return nil // a name that cannot be found is git's to tell
}
