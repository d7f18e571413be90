package pki

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
)

var names = Config{Namespace: "kiln-system", CASecret: "kiln-ca", AgentSecret: "kiln-agent-tls", AgentName: "kiln-agent.kiln-system.svc", ClientName: "kiln-controller", ServiceNames: []string{"kiln-controller.kiln-system.svc"}}

func authority(c client.Client, now *time.Time) *Authority {
	a := New(names, c, slog.New(slog.NewTextHandler(io.Discard, nil)), nil)
	a.now = func() time.Time { return *now }
	return a
}

func secretOf(t *testing.T, c client.Client, name string) map[string][]byte {
	s := &corev1.Secret{}
	require.NoError(t, c.Get(t.Context(), types.NamespacedName{Namespace: names.Namespace, Name: name}, s))
	return s.Data
}

// peer is a server that took its certificates from the agents' Secret at some time.
func peer(t *testing.T, data map[string][]byte, now time.Time) *tls.Config {
	cert, err := tls.X509KeyPair(data["tls.crt"], data["tls.key"])
	require.NoError(t, err)
	pool := x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM(data["ca.crt"]))
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, Time: func() time.Time { return now }}
}

// shake makes a connection and returns the client's name as the server knows it.
func shake(server, client *tls.Config) (string, error) {
	l, r := net.Pipe()
	defer func() { _, _ = l.Close(), r.Close() }()
	s, c := tls.Server(l, server), tls.Client(r, client)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	failed := make(chan error, 1)
	go func() {
		err := s.HandshakeContext(ctx)
		if err == nil {
			_, err = s.Write([]byte("x"))
		}
		_ = l.Close()
		failed <- err
	}()
	err := c.HandshakeContext(ctx)
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	_ = r.Close()
	if serverErr := <-failed; err == nil {
		err = serverErr
	}
	if err != nil {
		return "", err
	}
	return s.ConnectionState().PeerCertificates[0].Subject.CommonName, nil
}

func TestAgentsAndControllerAcceptEachOtherThroughEveryRotation(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	c := fake.NewClientBuilder().Build()
	a := authority(c, &now)
	require.NoError(t, a.Ensure(t.Context()))
	mounted := secretOf(t, c, names.AgentSecret) // kubelet's copy, half a day old
	first := string(secretOf(t, c, names.CASecret)["tls.crt"])
	signers, leafs := map[string]bool{}, map[string]bool{}
	for day := range 800 {
		for range 2 {
			now = now.Add(12 * time.Hour)
			require.NoError(t, a.Ensure(t.Context()))
			current := secretOf(t, c, names.AgentSecret)
			if day%10 != 0 && bytes.Equal(current["tls.crt"], mounted["tls.crt"]) && bytes.Equal(current["ca.crt"], mounted["ca.crt"]) {
				continue // Nothing is new.
			}
			cfg, err := a.ClientTLS()
			require.NoError(t, err)
			cfg.Time = func() time.Time { return now }
			name, err := shake(peer(t, mounted, now), cfg)
			require.NoError(t, err, "day %d, with the old Secret", day)
			require.Equal(t, "kiln-controller", name)
			mounted = current
			_, err = shake(peer(t, mounted, now), cfg)
			require.NoError(t, err, "day %d, with the new Secret", day)
		}
		signers[string(secretOf(t, c, names.CASecret)["tls.crt"])] = true
		leafs[string(mounted["tls.crt"])] = true
	}
	require.Len(t, signers, 4, "a new CA every eight months")
	require.Greater(t, len(leafs), 35)
	require.Less(t, len(leafs), 50)
	require.NotContains(t, string(secretOf(t, c, names.CASecret)["ca.crt"]), first, "what has ended is not trusted any more")
}

func TestControllerThatSleptFindsItsWayBack(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	c := fake.NewClientBuilder().Build()
	require.NoError(t, authority(c, &now).Ensure(t.Context()))
	now = now.Add(3 * caLife)
	a := authority(c, &now)
	require.NoError(t, a.Ensure(t.Context()))
	cfg, err := a.ClientTLS()
	require.NoError(t, err)
	cfg.Time = func() time.Time { return now }
	_, err = shake(peer(t, secretOf(t, c, names.AgentSecret), now), cfg)
	require.NoError(t, err)
}

// TestClockThatJumps has the clock go ahead, by which all is made anew, and back again,
// where nothing of that is valid yet.
func TestClockThatJumps(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for name, ahead := range map[string]time.Duration{"an hour": time.Hour, "a year": caLife, "until a new CA waits": caLife * 3 / 4, "three years": 3 * caLife} {
		t.Run(name, func(t *testing.T) {
			now := start
			c := fake.NewClientBuilder().Build()
			a := authority(c, &now)
			for _, at := range []time.Time{start, start.Add(ahead), start, start.Add(time.Hour), start.Add(-ahead)} {
				now = at
				for range 2 { // the second finds nothing to do
					require.NoError(t, a.Ensure(t.Context()))
				}
				cfg, err := a.ClientTLS()
				require.NoError(t, err)
				cfg.Time = func() time.Time { return now }
				_, err = shake(peer(t, secretOf(t, c, names.AgentSecret), now), cfg)
				require.NoError(t, err, "at %v", at)
			}
		})
	}
}

func TestReplicasEndWithTheSameCA(t *testing.T) {
	now := time.Now()
	c := fake.NewClientBuilder().Build()
	errs := make(chan error, 8)
	for range 8 {
		go func() { errs <- authority(c, &now).Ensure(context.Background()) }()
	}
	for range 8 {
		require.NoError(t, <-errs)
	}
	a := authority(c, &now)
	require.NoError(t, a.Ensure(t.Context()))
	require.Equal(t, secretOf(t, c, names.CASecret)["tls.crt"], secretOf(t, c, names.CASecret)["ca.crt"], "one CA")
	agent, err := parsePair(secretOf(t, c, names.AgentSecret)["tls.crt"], secretOf(t, c, names.AgentSecret)["tls.key"])
	require.NoError(t, err)
	require.NoError(t, agent.cert.CheckSignatureFrom(a.ca.cert))
}

func TestStrangersAreNotAccepted(t *testing.T) {
	now := time.Now()
	ours, theirs := fake.NewClientBuilder().Build(), fake.NewClientBuilder().Build()
	a, b := authority(ours, &now), authority(theirs, &now)
	require.NoError(t, a.Ensure(t.Context()))
	require.NoError(t, b.Ensure(t.Context()))
	mine, err := a.ClientTLS()
	require.NoError(t, err)
	_, err = shake(peer(t, secretOf(t, theirs, names.AgentSecret), now), mine)
	require.Error(t, err, "an agent of another CA")
	stranger, err := b.ClientTLS()
	require.NoError(t, err)
	stranger.RootCAs = mine.RootCAs
	_, err = shake(peer(t, secretOf(t, ours, names.AgentSecret), now), stranger)
	require.Error(t, err, "a controller of another CA")
	// The serving certificate of the agents is not one of a client, nor the other way round.
	agent, err := tls.X509KeyPair(secretOf(t, ours, names.AgentSecret)["tls.crt"], secretOf(t, ours, names.AgentSecret)["tls.key"])
	require.NoError(t, err)
	thief := mine.Clone()
	thief.Certificates = []tls.Certificate{agent}
	_, err = shake(peer(t, secretOf(t, ours, names.AgentSecret), now), thief)
	require.Error(t, err, "an agent's certificate as the controller's")
	serving, err := a.ServingCertificate(nil)
	require.NoError(t, err)
	_, err = shake(&tls.Config{Certificates: []tls.Certificate{*serving}, MinVersion: tls.VersionTLS13}, mine)
	require.Error(t, err, "the controller's serving certificate as an agent's")
}

func TestDamagedSecretIsLeftAlone(t *testing.T) {
	now := time.Now()
	for _, key := range []string{"tls.crt", "tls.key", "next.crt", "ca.crt"} {
		data, _, err := advance(nil, now)
		require.NoError(t, err)
		data[key] = []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
		_, changed, err := advance(data, now)
		require.Error(t, err, key)
		require.False(t, changed, key)
	}
}
