package gvisor

import (
	"fmt"

	"github.com/kiln-build/kiln/sandbox"
)

// restrict has the sandbox's network reach what the step may.
func (s *stepRun) restrict() error {
	if s.step.Egress == nil || s.box.net == nil {
		return nil
	}
	if err := s.box.net.Restrict(s.step.Egress); err != nil {
		return fmt.Errorf("restrict network: %w", err)
	}
	return nil
}

// contacts adds to res what the step did with its network.
func (s *stepRun) contacts(res *sandbox.Result) (err error) {
	if s.box.net != nil {
		res.Network, err = s.box.net.Contacts()
	}
	return err
}
