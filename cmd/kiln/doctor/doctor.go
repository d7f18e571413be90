// Package doctor checks what kiln needs of a machine.
//
// It promises that a check changes nothing that outlives it but empty lock files below
// /run/kiln, ends within its time limit, and that every failure says how to fix it.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/kiln-build/kiln/sandbox"
)

// checkTimeout bounds one check.
const checkTimeout = 20 * time.Second

// Config says what to check.
type Config struct {
	// Root is the state directory; it need not exist.
	Root string
	// RunscPath is the OCI runtime of gVisor sandboxes, or empty when none was found.
	RunscPath string
}

// Check looks at one thing.
type Check struct {
	Name string
	// Needs lists the sandbox classes that do not work when the check fails. A
	// failed check that no class needs is a warning.
	Needs []sandbox.Class
	// Run returns what was found, or an error, which may be a *Problem.
	Run func(ctx context.Context) (detail string, err error)
}

// Problem is a failure with its remedy.
type Problem struct {
	Err error
	// Fix tells what to do, in one sentence.
	Fix string
}

func (p *Problem) Error() string { return p.Err.Error() }
func (p *Problem) Unwrap() error { return p.Err }

func problem(fix, format string, args ...any) error {
	return &Problem{Err: fmt.Errorf(format, args...), Fix: fix}
}

// Result is what came of a check.
type Result struct {
	Check  Check
	Detail string
	Err    error
}

// Report has the results of all checks, in order.
type Report []Result

// Run runs all checks.
func Run(ctx context.Context, cfg Config) Report {
	return runAll(ctx, Checks(cfg))
}

func runAll(ctx context.Context, checks []Check) Report {
	report := make(Report, 0, len(checks))
	for _, c := range checks {
		cctx, cancel := context.WithTimeout(ctx, checkTimeout)
		detail, err := c.Run(cctx)
		cancel()
		report = append(report, Result{Check: c, Detail: detail, Err: err})
	}
	return report
}

// broken returns the names of the failed checks that class needs.
func (r Report) broken(class sandbox.Class) []string {
	var out []string
	for _, res := range r {
		if res.Err == nil {
			continue
		}
		for _, c := range res.Check.Needs {
			if c == class {
				out = append(out, res.Check.Name)
			}
		}
	}
	return out
}

// Usable tells whether at least one class of sandbox works.
func (r Report) Usable() bool {
	for _, c := range sandbox.Classes {
		if len(r.broken(c)) == 0 {
			return true
		}
	}
	return false
}

// Write prints the report as a table, with what to do below it.
func (r Report) Write(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "CHECK\tRESULT\tDETAIL")
	var fixes []string
	for _, res := range r {
		state, detail := "ok", res.Detail
		if res.Err != nil {
			state, detail = "FAIL", oneLine(res.Err.Error())
			if len(res.Check.Needs) == 0 {
				state = "warn"
			}
			var p *Problem
			if errors.As(res.Err, &p) {
				fixes = append(fixes, fmt.Sprintf("%s: %s", res.Check.Name, p.Fix))
			}
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\n", res.Check.Name, state, detail)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	if len(fixes) > 0 {
		fmt.Fprintf(w, "\nHow to fix it:\n")
		for _, f := range fixes {
			fmt.Fprintf(w, "  %s\n", f)
		}
	}
	fmt.Fprintln(w)
	for _, c := range sandbox.Classes {
		if broken := r.broken(c); len(broken) > 0 {
			fmt.Fprintf(w, "Sandbox %s does not work here: %s\n", c, strings.Join(broken, ", "))
		} else {
			fmt.Fprintf(w, "Sandbox %s works here\n", c)
		}
	}
	return nil
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
