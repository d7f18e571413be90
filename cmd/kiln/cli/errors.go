package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	"github.com/kiln-build/kiln/sandbox"
)

// usageError is an error in the command line.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// usage marks err as an error in the command line.
func usage(err error) error {
	if err == nil {
		return nil
	}
	return &usageError{err}
}

// silentError fails the command with a message that was already printed.
type silentError struct{}

func (silentError) Error() string { return "failed" }

// report prints err for the user and returns the exit code for it.
func (a *App) report(ctx context.Context, cmd *cobra.Command, err error) int {
	if err == nil {
		return ExitOK
	}
	var ue *usageError
	if errors.As(err, &ue) {
		fmt.Fprintf(a.Stderr, "kiln: %s\n", ue)
		fmt.Fprintf(a.Stderr, "Run '%s --help' for usage.\n", cmd.CommandPath())
		return ExitUsage
	}
	if errors.As(err, &silentError{}) {
		return ExitFailed
	}
	if ctx.Err() != nil {
		fmt.Fprintf(a.Stderr, "kiln: %v\n", context.Cause(ctx))
		return ExitInterrupted
	}
	printSources(a.Stderr, err)
	fmt.Fprintf(a.Stderr, "kiln: %s\n", message(err))
	if advice := adviceFor(err); advice != "" {
		fmt.Fprintf(a.Stderr, "%s\n", advice)
	}
	if grpcerrors.Code(err) == codes.Canceled {
		return ExitInterrupted
	}
	return ExitFailed
}

// printSources shows the lines of the Dockerfile that err is about.
func printSources(w io.Writer, err error) {
	for _, s := range errdefs.Sources(err) {
		_ = s.Print(w)
	}
}

// message returns the text of err without the wrapping that only says which
// remote call carried it.
func message(err error) string {
	s := err.Error()
	s = strings.TrimPrefix(s, "failed to solve: ")
	if st, ok := grpcerrors.AsGRPCStatus(err); ok && st.Message() != "" {
		prefix := fmt.Sprintf("rpc error: code = %s desc = ", st.Code())
		s = strings.ReplaceAll(s, prefix, "")
	}
	return strings.TrimRight(s, "\n")
}

const noEntitlements = "Entitlements do not exist in kiln: no step runs privileged or in the node's network. Remove --security or --network=host from the Dockerfile."

// advice maps what an error says to what to do about it.
var advice = []struct{ part, advice string }{
	{"no space left on device", "The disk is full. Run 'kiln du' to see what takes space and 'kiln prune' to free it."},
	{"401 Unauthorized", "The registry refused the credentials. Log in to it (docker login writes what kiln reads, ~/.docker/config.json)."},
	{"insufficient_scope", "The registry refused the credentials. Log in to it (docker login writes what kiln reads, ~/.docker/config.json)."},
	{"pull access denied", "The registry refused the credentials, or there is no such image. Log in to it (docker login writes what kiln reads, ~/.docker/config.json)."},
	{"403 Forbidden", "The registry does not allow this. Check that the credentials in ~/.docker/config.json may do it."},
	{"connection refused", "Nothing listens at that address. Check its name and port."},
	{"no such host", "The name cannot be resolved. Check its spelling and this machine's DNS."},
	{"server gave HTTP response to HTTPS client", "The registry speaks plain HTTP, which is accepted on loopback addresses only."},
	{"failed to calculate checksum of ref", "The file is not in the build context, or .dockerignore leaves it out."},
	{"security.insecure is not allowed", noEntitlements},
	{"network.host is not allowed", noEntitlements},
	{"entitlement", noEntitlements},
	{"unsupported frontend capability", "The front end that the Dockerfile's syntax line names is too old for --build-context. Remove that line to use the built-in one."},
}

// adviceFor returns what to do about err, when that is known.
func adviceFor(err error) string {
	var ua *sandbox.UnavailableError
	if errors.As(err, &ua) {
		return "Run 'kiln doctor' to see what this machine can do."
	}
	s := err.Error()
	if strings.Contains(s, "sandbox") && strings.Contains(s, "not available on this node") {
		return "Run 'kiln doctor' to see what this machine can do."
	}
	for _, a := range advice {
		if strings.Contains(s, a.part) {
			return a.advice
		}
	}
	return ""
}
