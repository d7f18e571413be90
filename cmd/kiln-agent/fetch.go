package main

import (
	"fmt"
	"net/netip"
	"os"

	"github.com/kiln-build/kiln/agent/config"
	"github.com/kiln-build/kiln/sandbox/egress"
)

// apiServerEnv is the variable that tells a Pod the API server's address.
const apiServerEnv = "KUBERNETES_SERVICE_HOST"

// fetchPolicy says what may be connected to for builds. What the agent itself is
// trusted at is not for them.
func fetchPolicy(cfg config.Fetch) (*egress.Policy, error) {
	exceptions, err := egress.ParseExceptions(cfg.Allow)
	if err != nil {
		return nil, fmt.Errorf("read fetch.allow: %w", err)
	}
	p := &egress.Policy{Exceptions: exceptions, DenyPrivate: cfg.DenyPrivate}
	if a, err := netip.ParseAddr(os.Getenv(apiServerEnv)); err == nil {
		a = a.WithZone("").Unmap()
		p.Deny = []egress.Range{{Prefix: netip.PrefixFrom(a, a.BitLen()), What: "the Kubernetes API server"}}
	}
	return p, nil
}
