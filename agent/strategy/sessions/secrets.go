package sessions

import (
	"context"
	"fmt"

	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
)

// secretStore looks secrets up in a loan.
type secretStore struct{ loan *Loan }

func newSecrets(l *Loan) session.Attachable {
	return secretsprovider.NewSecretProvider(secretStore{l})
}

// GetSecret implements secrets.SecretStore.
func (s secretStore) GetSecret(_ context.Context, id string) ([]byte, error) {
	v, ok := s.loan.Secrets[id]
	if !ok || !s.loan.open() {
		return nil, fmt.Errorf("secret %q: %w", id, secrets.ErrNotFound)
	}
	return v, nil
}
