package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/kiln-build/kiln/sandbox"
)

// Domain is one tenant's builds in one class of sandbox. Domains share blobs and
// layers that are named by what is in them, and nothing else: step-cache keys,
// cache mounts, sessions and history are their own. What ran in a weaker class of
// sandbox is never reused in a stronger one.
type Domain struct {
	Tenant  string
	Sandbox sandbox.Class
}

// key names the domain in the store.
func (d Domain) key() string { return d.Tenant + "/" + string(d.Sandbox) }

// idleTime is how long an engine that nobody uses stays open.
const idleTime = 5 * time.Minute

// validTenant is an RFC 1123 label: the name of a Kubernetes namespace, and safe
// as the name of a directory.
var validTenant = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// ErrClosed is returned by a Node that was closed.
var ErrClosed = errors.New("engines of this node are closed")

// openEngine is an engine with the number of its users.
type openEngine struct {
	engine *Engine
	users  int
	// idle closes the engine; it is set while there is no user.
	idle *time.Timer
}

// Engine returns the engine of a domain, and opens it when it is not open. The
// caller calls release when it is done with the engine, once. An engine that
// nobody uses is closed after a while; its state stays.
func (n *Node) Engine(ctx context.Context, d Domain) (_ *Engine, release func(), err error) {
	if !validTenant.MatchString(d.Tenant) {
		return nil, nil, fmt.Errorf("tenant %q: want a Kubernetes namespace's name", d.Tenant)
	}
	if _, err := sandbox.ParseClass(string(d.Sandbox)); err != nil {
		return nil, nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, nil, ErrClosed
	}
	open := n.engines[d]
	if open == nil {
		dir := n.domainDir(d)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, nil, fmt.Errorf("make state of tenant %s: %w", d.Tenant, err)
		}
		// It outlives the call that opened it.
		e, err := n.newEngine(context.WithoutCancel(ctx), dir, d)
		if err != nil {
			return nil, nil, fmt.Errorf("open engine of tenant %s: %w", d.Tenant, err)
		}
		open = &openEngine{engine: e}
		n.engines[d] = open
	}
	if open.idle != nil {
		open.idle.Stop()
		open.idle = nil
	}
	open.users++
	return open.engine, func() { n.release(d, open) }, nil
}

func (n *Node) release(d Domain, open *openEngine) {
	n.mu.Lock()
	defer n.mu.Unlock()
	open.users--
	if open.users > 0 || n.closed {
		return
	}
	n.collector.start(n)
	open.idle = time.AfterFunc(idleTime, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if open.users > 0 || n.engines[d] != open {
			return
		}
		delete(n.engines, d)
		if err := open.engine.Close(); err != nil {
			logrus.WithError(err).WithField("tenant", d.Tenant).Error("close idle engine")
		}
	})
}

// domainDir holds what is a domain's own.
func (n *Node) domainDir(d Domain) string {
	return filepath.Join(n.cfg.Root, "domains", d.Tenant, string(d.Sandbox))
}

// Domains lists the domains that have state on the node.
func (n *Node) Domains() ([]Domain, error) {
	tenants, err := os.ReadDir(filepath.Join(n.cfg.Root, "domains"))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		return nil, fmt.Errorf("list domains: %w", err)
	}
	var all []Domain
	for _, t := range tenants {
		for _, c := range sandbox.Classes {
			d := Domain{Tenant: t.Name(), Sandbox: c}
			if _, err := os.Stat(n.domainDir(d)); err == nil && validTenant.MatchString(d.Tenant) {
				all = append(all, d)
			}
		}
	}
	return all, nil
}
