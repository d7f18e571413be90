package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"
)

// bomb is a step that uses as much of something as it gets, again and again. Each
// bounds itself to what a machine survives, for builders that have no limits.
type bomb struct{ name, about, script string }

// bombs need nothing but a shell and coreutils.
func bombs() []bomb {
	return []bomb{
		{"cpu", "8 processes that never rest", `for i in 1 2 3 4 5 6 7 8; do (while :; do :; done) & done; wait`},
		{"fork", "1,000 processes that start processes", `n=0; while [ $n -lt 1000 ]; do (while :; do (:); done) & n=$((n+1)); done; wait`},
		{"memory", "1 GiB of memory, given back and taken again", `while :; do head -c 1000000000 /dev/zero | tail -n 1 | head -c 1; done`},
		{"disk", "1.5 GB written and removed", `while :; do head -c 1500000000 /dev/zero >/big; rm -f /big; done`},
		{"inodes", "20,000 files made and removed", `while :; do mkdir /d; i=0; while [ $i -lt 20000 ]; do : >/d/$i; i=$((i+1)); done; rm -rf /d; done`},
		{"log", "output without end", `yes 0123456789012345678901234567890123456789012345678901234567890123456789`},
		{"files", "2,000 processes with 100 open files each", `f=$(ls -d /usr/include/*.h /usr/include/linux/*.h | head -n 100); n=0; while [ $n -lt 2000 ]; do tail -q -f -s 1000 $f >/dev/null & n=$((n+1)); done; wait`},
	}
}

const (
	healthyUID, bombUID = 10001, 10002
	// lead is how long a bomb goes on before the build beside it starts, and rest how
	// long the machine is left alone when it has ended.
	lead, rest = 1500 * time.Millisecond, time.Second
)

// tenantPeer is a peer that builds for several tenants at once.
type tenantPeer interface {
	peer
	// BuildAs builds for a tenant that is known by the user ID of the client.
	BuildAs(ctx context.Context, uid uint32, r request) (usage, error)
}

// besidePeer is how long a build took with a peer, alone and beside a bomb.
type besidePeer struct {
	Name   string    `json:"name"`
	Alone  []float64 `json:"aloneSeconds"`
	Beside []float64 `json:"besideSeconds"`
	Ratio  float64   `json:"ratio"` // of the medians
	Error  string    `json:"error,omitempty"`
}

// besideResult has the figures of one bomb.
type besideResult struct {
	Bomb  string       `json:"bomb"`
	About string       `json:"about"`
	Peers []besidePeer `json:"peers"`
}

// measureBombs measures the healthy build w alone and beside each bomb, in turns,
// with every peer that serves several tenants.
func measureBombs(ctx context.Context, w workload, list []bomb, peers []peer, in *inputs, tmp string, n int) ([]besideResult, error) {
	healthy, err := w.requests(in, tmp)
	if err != nil {
		return nil, err
	}
	if err := unpackForBombs(ctx, w, peers, in, tmp); err != nil {
		return nil, err
	}
	var out []besideResult
	for _, b := range list {
		dir := filepath.Join(tmp, "bomb-"+b.name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), fmt.Appendf(nil, "FROM base\nRUN %s\n", b.script), 0o644); err != nil {
			return nil, err
		}
		res := besideResult{Bomb: b.name, About: b.about}
		bad := request{dir: dir, bases: w.base(in), noCache: true}
		for _, p := range peers {
			tp, ok := p.(tenantPeer)
			if !ok {
				continue
			}
			pr := besidePeer{Name: p.Name()}
			if err := pr.measure(ctx, tp, b, healthy[0], bad, n); err != nil {
				if ctx.Err() != nil {
					return nil, ctx.Err()
				}
				fmt.Fprintf(os.Stderr, "bomb %-8s %-15s failed: %.3000v\n", b.name, p.Name(), err)
				pr = besidePeer{Name: p.Name(), Error: err.Error()}
			}
			res.Peers = append(res.Peers, pr)
		}
		out = append(out, res)
	}
	return out, nil
}

// unpackForBombs has the tenant of the bombs unpack its base image, which else a bomb would
// still do beside the build.
func unpackForBombs(ctx context.Context, w workload, peers []peer, in *inputs, tmp string) error {
	dir := filepath.Join(tmp, "no-bomb")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM base\nRUN true\n"), 0o644); err != nil {
		return err
	}
	for _, p := range peers {
		if tp, ok := p.(tenantPeer); ok {
			if _, err := tp.BuildAs(ctx, bombUID, request{dir: dir, bases: w.base(in)}); err != nil {
				return fmt.Errorf("unpack the base image for bombs with %s: %w", p.Name(), err)
			}
		}
	}
	return nil
}

// measure takes the figures of one bomb with one peer. The first turn warms up.
func (pr *besidePeer) measure(ctx context.Context, p tenantPeer, b bomb, healthy, bad request, n int) error {
	for turn := range n + 1 {
		alone, err := p.BuildAs(ctx, healthyUID, healthy)
		if err != nil {
			return err
		}
		stop := explode(ctx, p, bad)
		time.Sleep(lead)
		beside, err := p.BuildAs(ctx, healthyUID, healthy)
		again, fault := stop()
		if err = errors.Join(err, fault); err != nil {
			return err
		}
		time.Sleep(rest)
		fmt.Fprintf(os.Stderr, "bomb %-8s %d/%d %-15s alone %5.2f s, beside %5.2f s, %d times\n", b.name, turn, n, p.Name(), alone.elapsed.Seconds(), beside.elapsed.Seconds(), again)
		if turn > 0 {
			pr.Alone, pr.Beside = append(pr.Alone, alone.elapsed.Seconds()), append(pr.Beside, beside.elapsed.Seconds())
		}
	}
	pr.Ratio = ratio(median(pr.Beside), median(pr.Alone))
	return nil
}

// explode builds a bomb, and again whenever a limit has ended it, until the returned
// function is called, which tells how often. That its builds fail is what they are for,
// unless it is before they begin.
func explode(ctx context.Context, p tenantPeer, bad request) (stop func() (int, error)) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	times := 0
	var fault error
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			times++
			begin := time.Now()
			_, err := p.BuildAs(ctx, bombUID, bad)
			if time.Since(begin) < lead/10 && ctx.Err() == nil {
				fault = fmt.Errorf("the bomb does not run: %w", err)
				time.Sleep(lead / 10)
			}
		}
	}()
	return func() (int, error) { cancel(); <-done; return times, fault }
}

// printBeside writes the table of bombs.
func (r *report) printBeside(out io.Writer) error {
	if len(r.Bombs) == 0 {
		return nil
	}
	fmt.Fprint(out, "A build beside another tenant's, compared with the same build alone:\n\n")
	w := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
	head, rule := "| the other build", "| ---"
	for _, p := range r.Bombs[0].Peers {
		head, rule = head+"\t| "+p.Name, rule+"\t| ---"
	}
	fmt.Fprintf(w, "%s\t|\n%s\t|\n", head, rule)
	for _, b := range r.Bombs {
		row := "| " + b.Bomb + ": " + b.About
		for _, p := range b.Peers {
			text := "failed"
			if p.Error == "" {
				text = fmt.Sprintf("%.2f s → %.2f s, %.2f×", median(p.Alone), median(p.Beside), p.Ratio)
			}
			row += "\t| " + text
		}
		fmt.Fprintf(w, "%s\t|\n", row)
	}
	fmt.Fprintln(w)
	return w.Flush()
}

// besideFailures is an error that names the figures that are missing.
func (r *report) besideFailures() error {
	var errs []error
	for _, b := range r.Bombs {
		for _, p := range b.Peers {
			if p.Error != "" {
				errs = append(errs, fmt.Errorf("a build beside bomb %s with %s failed", b.Bomb, p.Name))
			}
		}
	}
	return errors.Join(errs...)
}
