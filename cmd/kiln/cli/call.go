package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"strconv"
	"strings"

	"github.com/moby/buildkit/client"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/frontend/subrequests/lint"
	"github.com/moby/buildkit/frontend/subrequests/outline"
	"github.com/moby/buildkit/frontend/subrequests/targets"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/tonistiigi/go-csvvalue"
	"golang.org/x/sync/errgroup"

	"github.com/kiln-build/kiln/cmd/kiln/cli/buildopt"
)

// call is what is asked of the front end in place of a build.
type call struct {
	// name is lint, outline or targets.
	name         string
	json         bool
	ignoreStatus bool
}

// parseCall parses the value of --call; nil means a build.
func parseCall(s string) (*call, error) {
	fields, err := csvvalue.Fields(s, nil)
	if err != nil {
		return nil, fmt.Errorf("--call %s: %w", s, err)
	}
	c := &call{}
	for i, f := range fields {
		key, value, pair := strings.Cut(f, "=")
		switch {
		case i == 0 && (f == "build" || f == ""):
			c = nil
		case i == 0 && f == "check":
			c.name = "lint"
		case i == 0 && (f == "outline" || f == "targets"):
			c.name = f
		case c != nil && i > 0 && pair && key == "format" && (value == "json" || value == "text"):
			c.json = value == "json"
		case c != nil && i > 0 && pair && key == "ignorestatus":
			if c.ignoreStatus, err = strconv.ParseBool(value); err != nil {
				return nil, fmt.Errorf("--call %s: ignorestatus is true or false", s)
			}
		default:
			return nil, fmt.Errorf("--call %s: want build, check, outline or targets, and for the last three also format=json and ignorestatus=true", s)
		}
	}
	return c, nil
}

// ask asks the front end and prints its answer.
func (a *App) ask(ctx context.Context, c *client.Client, q *call, req *buildopt.Request, display progressui.Display) error {
	opt := req.Solve
	opt.Exports, opt.CacheExports = nil, nil
	inputs := map[string]*pb.Definition{}
	for name, st := range opt.FrontendInputs {
		def, err := st.Marshal(ctx)
		if err != nil {
			return fmt.Errorf("describe input %s: %w", name, err)
		}
		inputs[name] = def.ToPB()
	}
	attrs := maps.Clone(opt.FrontendAttrs)
	attrs["requestid"] = "frontend." + q.name
	caps := []string{"moby.buildkit.frontend.subrequests"}
	if have := attrs["frontend.caps"]; have != "" {
		caps = append(caps, have)
	}
	attrs["frontend.caps"] = strings.Join(caps, ",")
	frontend := opt.Frontend
	var answer map[string][]byte
	ch := make(chan *client.SolveStatus)
	eg := errgroup.Group{}
	eg.Go(func() error {
		_, err := c.Build(ctx, opt, "kiln", func(ctx context.Context, gw gateway.Client) (*gateway.Result, error) {
			res, err := gw.Solve(ctx, gateway.SolveRequest{Frontend: frontend, FrontendOpt: attrs, FrontendInputs: inputs, Evaluate: true})
			if err != nil {
				return nil, err
			}
			answer = res.Metadata
			return gateway.NewResult(), nil
		}, ch)
		return err
	})
	eg.Go(func() error {
		_, err := display.UpdateFrom(context.WithoutCancel(ctx), ch)
		return err
	})
	if err := eg.Wait(); err != nil {
		return err
	}
	return q.print(a.Stdout, answer)
}

// print writes the answer for people or programs. It fails when the check did.
func (q *call) print(w io.Writer, answer map[string][]byte) error {
	data := answer["result.json"]
	if len(data) == 0 {
		return errors.New("the front end of the Dockerfile's syntax line does not answer this; remove that line to use the built-in one")
	}
	var err error
	switch {
	case q.json:
		_, err = fmt.Fprintln(w, string(data))
	case q.name == "outline":
		err = outline.PrintOutline(data, w)
	case q.name == "targets":
		err = targets.PrintTargets(data, w)
	default:
		err = printChecks(w, data)
	}
	if err != nil {
		return err
	}
	if code := string(answer["result.statuscode"]); code != "" && code != "0" && !q.ignoreStatus {
		return silentError{}
	}
	return nil
}

// printChecks writes what the checks of a Dockerfile found.
func printChecks(w io.Writer, data []byte) error {
	var found lint.LintResults
	if err := json.Unmarshal(data, &found); err != nil {
		return fmt.Errorf("read the answer of the front end: %w", err)
	}
	same := func(s *pb.SourceInfo) *pb.SourceInfo { return s }
	if err := found.PrintTo(w, same); err != nil {
		return err
	}
	if found.Error != nil {
		var text bytes.Buffer
		found.PrintErrorTo(&text, same)
		return errors.New(strings.TrimSpace(text.String()))
	}
	switch n := len(found.Warnings); n {
	case 0:
		fmt.Fprintln(w, "Check complete, no warnings found.")
	case 1:
		fmt.Fprintln(w, "Check complete, 1 warning has been found.")
	default:
		fmt.Fprintf(w, "Check complete, %d warnings have been found.\n", n)
	}
	return nil
}
