package sessions

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/moby/buildkit/session/sshforward"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// agents signs for SSH clients of a build.
type agents struct {
	loan  *Loan
	rings map[string]agent.Agent
}

func newAgents(l *Loan) (*agents, error) {
	a := &agents{loan: l, rings: map[string]agent.Agent{}}
	for id, pem := range l.SSHKeys {
		key, err := ParseSSHKey(pem)
		if err != nil {
			return nil, err
		}
		ring := agent.NewKeyring()
		if err := ring.Add(agent.AddedKey{PrivateKey: key}); err != nil {
			return nil, fmt.Errorf("use SSH key: %w", err)
		}
		a.rings[id] = fixedRing{ring}
	}
	return a, nil
}

// ParseSSHKey returns the private key in pem. The error says what is wrong with it
// and nothing of what is in it.
func ParseSSHKey(pem []byte) (any, error) {
	key, err := ssh.ParseRawPrivateKey(pem)
	var missing *ssh.PassphraseMissingError
	switch {
	case errors.As(err, &missing):
		return nil, errors.New("the SSH key has a passphrase; give one without")
	case err != nil:
		return nil, errors.New("the SSH key is not a private key in PEM or OpenSSH's format")
	}
	return key, nil
}

// Register implements session.Attachable.
func (a *agents) Register(s *grpc.Server) { sshforward.RegisterSSHServer(s, a) }

// CheckAgent implements sshforward.SSHServer.
func (a *agents) CheckAgent(_ context.Context, req *sshforward.CheckAgentRequest) (*sshforward.CheckAgentResponse, error) {
	if _, err := a.ring(req.ID); err != nil {
		return nil, err
	}
	return &sshforward.CheckAgentResponse{}, nil
}

// ForwardAgent implements sshforward.SSHServer.
func (a *agents) ForwardAgent(stream sshforward.SSH_ForwardAgentServer) error {
	var id string
	md, _ := metadata.FromIncomingContext(stream.Context())
	if v := md.Get(sshforward.KeySSHID); len(v) > 0 {
		id = v[0]
	}
	ring, err := a.ring(id)
	if err != nil {
		return err
	}
	server, client := net.Pipe()
	served := make(chan struct{})
	go func() {
		defer close(served)
		// It ends with an error when its client hangs up.
		_ = agent.ServeAgent(ring, server)
		_ = server.Close()
	}()
	err = sshforward.Copy(stream.Context(), client, stream, nil)
	_ = client.Close()
	<-served
	return err
}

func (a *agents) ring(id string) (agent.Agent, error) {
	ring, ok := a.rings[id]
	if !ok || !a.loan.open() {
		return nil, status.Error(codes.NotFound, "the build has no such SSH agent")
	}
	return ring, nil
}

// fixedRing lists keys and signs with them, and changes nothing.
type fixedRing struct{ agent.Agent }

var errFixed = errors.New("the keys of a build cannot be changed")

// Add implements agent.Agent.
func (fixedRing) Add(agent.AddedKey) error { return errFixed }

// Remove implements agent.Agent.
func (fixedRing) Remove(ssh.PublicKey) error { return errFixed }

// RemoveAll implements agent.Agent.
func (fixedRing) RemoveAll() error { return errFixed }

// Lock implements agent.Agent.
func (fixedRing) Lock([]byte) error { return errFixed }

// Unlock implements agent.Agent.
func (fixedRing) Unlock([]byte) error { return errFixed }
