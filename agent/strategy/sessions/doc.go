// Package sessions lends a build what it may ask for while it runs, from memory:
// registry credentials, secrets, an SSH key and an uploaded archive.
//
// It promises that nothing that it was given is written to a file, an environment
// or a log, that a build gets only what it was given by name, and that a loan
// ends with Close: what asks later is refused. A private SSH key never leaves
// the package; only signatures do.
package sessions

import (
	"sync"

	"github.com/moby/buildkit/session"
)

// Loan is everything that one build may ask for. The zero value lends nothing.
// The fields are set before Attachables is called and not changed after it.
type Loan struct {
	// Registries are credentials by host name, with a port if there is one. The
	// name of Docker Hub is "docker.io".
	Registries map[string]Credential
	// Secrets are values by the ID that a step or source names.
	Secrets map[string][]byte
	// SSHKeys are private keys in PEM or OpenSSH's format by the ID of the agent
	// that signs with them.
	SSHKeys map[string][]byte
	// Uploads are paths of files by name; UploadURL names one.
	Uploads map[string]string

	mu sync.RWMutex
	// closed ends the loan; mu guards it.
	closed bool
}

// Credential authenticates to a registry.
type Credential struct {
	Username, Password string
	// IdentityToken is used in place of a user name and password.
	IdentityToken string
}

// Attachables returns what serves the loan to a build's session. It fails when a
// key cannot be used.
func (l *Loan) Attachables() ([]session.Attachable, error) {
	agents, err := newAgents(l)
	if err != nil {
		return nil, err
	}
	out := []session.Attachable{&registries{loan: l}, newSecrets(l)}
	if len(l.SSHKeys) > 0 {
		out = append(out, agents)
	}
	if len(l.Uploads) > 0 {
		out = append(out, &uploads{loan: l})
	}
	return out, nil
}

// Close ends the loan. It may be called more than once, and at any time.
func (l *Loan) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
}

// open reports whether the loan still lasts.
func (l *Loan) open() bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return !l.closed
}
