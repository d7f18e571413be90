package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"

	"github.com/kiln-build/kiln/agent/auth"
	"github.com/kiln-build/kiln/agent/config"
	"github.com/kiln-build/kiln/agent/engine"
	"github.com/kiln-build/kiln/agent/server"
)

// newAccess makes what authenticates callers.
func newAccess(l config.Listeners, reg prometheus.Registerer, log *slog.Logger) (*auth.Authenticator, credentials.TransportCredentials, error) {
	var rules auth.Config
	if l.Unix != nil {
		for _, p := range l.Unix.Peers {
			rules.Peers = append(rules.Peers, auth.PeerRule{UID: p.UID, GID: p.GID, Tenant: p.Tenant})
		}
	}
	if l.TCP == nil {
		return auth.New(rules), auth.NewTransport(nil, false), nil
	}
	rules.InsecureLoopback = l.TCP.InsecureLoopback
	if l.TCP.TLS == nil {
		return auth.New(rules), auth.NewTransport(nil, l.TCP.InsecureLoopback), nil
	}
	for _, c := range l.TCP.Clients {
		rules.Clients = append(rules.Clients, auth.ClientRule{
			CommonName: c.CommonName, URI: c.URI, Organization: c.Organization, Role: auth.Role(c.Role), Tenant: c.Tenant,
		})
	}
	if t := l.TCP.Tokens; t != nil {
		reviewer, err := auth.NewAPIServer(t.Kubeconfig)
		if err != nil {
			return nil, nil, err
		}
		rules.Tokens = auth.NewServiceAccounts(auth.TokenConfig{Audiences: t.Audiences, TTL: t.CacheTTL.Value(), Entries: t.CacheEntries}, reviewer)
	}
	files := auth.Files{Cert: l.TCP.TLS.CertFile, Key: l.TCP.TLS.KeyFile, ClientCAs: l.TCP.TLS.ClientCAFiles}
	keys, err := auth.NewKeyring(files, l.TCP.Tokens == nil, log)
	if err != nil {
		return nil, nil, err
	}
	expiry := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "kiln_agent_tls_certificate_not_after_seconds", Help: "When the agent's certificate ends, in seconds since 1970.",
	}, func() float64 { return float64(keys.NotAfter().Unix()) })
	if err := reg.Register(expiry); err != nil {
		return nil, nil, fmt.Errorf("register metrics: %w", err)
	}
	return auth.New(rules), auth.NewTransport(keys.TLS(), false), nil
}

// listen opens the listeners of the gRPC server.
func listen(ctx context.Context, l config.Listeners) (_ []net.Listener, err error) {
	var open []net.Listener
	defer func() {
		if err != nil {
			for _, o := range open {
				err = errors.Join(err, o.Close())
			}
		}
	}()
	if l.Unix != nil {
		mode, err := l.Unix.FileMode()
		if err != nil {
			return nil, err
		}
		u, err := server.ListenUnix(ctx, l.Unix.Path, os.FileMode(mode))
		if err != nil {
			return nil, err
		}
		open = append(open, u)
	}
	if l.TCP != nil {
		t, err := server.ListenTCP(ctx, l.TCP.Address)
		if err != nil {
			return nil, err
		}
		open = append(open, t)
	}
	return open, nil
}

// pickEngine chooses the engine that serves a call of BuildKit's API: that of the
// caller's tenant and the tenant's default class of sandbox.
func pickEngine(cfg *config.Agent, cluster clusterRules, node *engine.Node, infos []*agentv1.SandboxInfo, log *slog.Logger) engine.Pick {
	return func(ctx context.Context) (*engine.Engine, func(), error) {
		id, ok := auth.FromContext(ctx)
		if !ok {
			return nil, nil, status.Error(codes.Unauthenticated, "the call has no identity")
		}
		tenant, err := id.TenantFor("")
		if err != nil {
			return nil, nil, err
		}
		policy := cfg.Policy(tenant)
		if ok, why := policy.AllowsBuildKit(); !ok {
			return nil, nil, status.Errorf(codes.PermissionDenied, "tenant %q may not use BuildKit's clients: %s; use kiln, or have it allowed with buildKitClients", tenant, why)
		}
		required, err := buildKitClass(cluster(tenant), policy.DefaultSandbox)
		if err != nil {
			return nil, nil, err
		}
		class := sandbox.Class(required)
		for _, i := range infos {
			if i.Class == classNumber(class) && !i.Available {
				return nil, nil, status.Errorf(codes.FailedPrecondition, "sandbox %s does not work on this node: %s", class, i.Problem)
			}
		}
		e, release, err := node.Engine(ctx, engine.Domain{Tenant: tenant, Sandbox: class})
		if err != nil {
			log.Error("engine cannot be opened", "tenant", tenant, "sandbox", string(class), "error", err)
			return nil, nil, status.Error(codes.Unavailable, "the tenant's engine cannot be opened; the agent's log has the details")
		}
		return e, release, nil
	}
}
