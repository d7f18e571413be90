package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/kiln-build/kiln/agent/config"
	"github.com/kiln-build/kiln/sandbox/egress"
)

// Variables that tell a Pod addresses which no build has business with.
const (
	// apiServerEnv has the API server's, where the agent is trusted.
	apiServerEnv = "KUBERNETES_SERVICE_HOST"
	// nodeEnv has the node's, with commas between them.
	nodeEnv = "NODE_IPS"
)

// lookupTimeout bounds the look-up of the API server.
const lookupTimeout = 5 * time.Second

// fetchPolicy says what may be connected to for builds.
func fetchPolicy(ctx context.Context, cfg config.Fetch) (*egress.Policy, error) {
	exceptions, err := egress.ParseExceptions(cfg.Allow)
	if err != nil {
		return nil, fmt.Errorf("read fetch.allow: %w", err)
	}
	p := &egress.Policy{Exceptions: exceptions, DenyPrivate: cfg.DenyPrivate}
	deny := func(list []string, what, from string) error {
		for _, s := range list {
			r, err := egress.ParseRange(s, what)
			if err != nil {
				return fmt.Errorf("read %s: %w", from, err)
			}
			p.Deny = append(p.Deny, r)
		}
		return nil
	}
	if err := deny(cfg.Deny, "in fetch.deny", "fetch.deny"); err != nil {
		return nil, err
	}
	if err := deny(addresses(ctx, os.Getenv(apiServerEnv)), "the Kubernetes API server", "variable "+apiServerEnv); err != nil {
		return nil, err
	}
	if ips := os.Getenv(nodeEnv); ips != "" {
		if err := deny(strings.Split(ips, ","), "the node itself", "variable "+nodeEnv); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// addresses returns those of a host, which some clusters give a name; none when it is
// empty or cannot be found.
func addresses(ctx context.Context, host string) []string {
	if host == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	found, err := net.DefaultResolver.LookupHost(ctx, host)
	if err != nil {
		return nil
	}
	return found
}
