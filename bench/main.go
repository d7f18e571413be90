package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

type config struct {
	kiln, agent                      string
	buildkitd, buildctl, runc, runsc string
	out, cache                       string
	work, peers, bombs               string
	n                                int
}

func env(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}

func main() {
	var c config
	flag.StringVar(&c.kiln, "kiln", env("BENCH_KILN", "bin/kiln"), "kiln `program`")
	flag.StringVar(&c.agent, "agent", env("BENCH_AGENT", "bin/kiln-agent"), "kiln-agent `program`")
	flag.StringVar(&c.buildkitd, "buildkitd", env("BENCH_BUILDKITD", "bin/buildkitd"), "BuildKit's daemon")
	flag.StringVar(&c.buildctl, "buildctl", env("BENCH_BUILDCTL", "bin/buildctl"), "BuildKit's client")
	flag.StringVar(&c.runc, "runc", env("BENCH_RUNC", "bin/runc"), "runc for BuildKit")
	flag.StringVar(&c.runsc, "runsc", env("BENCH_RUNSC", "bin/runsc"), "runsc for BuildKit")
	flag.StringVar(&c.out, "out", env("BENCH_OUT", "bench/results"), "`directory` of results")
	flag.StringVar(&c.cache, "cache", env("BENCH_CACHE", "/var/cache/kiln-bench"), "`directory` where inputs are kept")
	flag.StringVar(&c.work, "work", "", "comma-separated `names` of workloads (default all)")
	flag.StringVar(&c.peers, "peers", "", "comma-separated `names` of peers (default all)")
	flag.StringVar(&c.bombs, "bombs", "", "comma-separated `names` of what the workload bombs has (default all)")
	flag.IntVar(&c.n, "n", 5, "timed `runs` of each workload with each peer")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, c)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, c config) (err error) {
	if flag.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	if c.n < 1 {
		return errors.New("-n: give at least 1")
	}
	for _, p := range []*string{&c.kiln, &c.agent, &c.buildkitd, &c.buildctl, &c.runc, &c.runsc, &c.out, &c.cache} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	works, err := pick("-work", workloads(), func(w workload) string { return w.name }, c.work)
	if err != nil {
		return err
	}
	kinds, err := pick("-peers", peerKinds(), func(k peerKind) string { return k.name }, c.peers)
	if err != nil {
		return err
	}
	list, err := pick("-bombs", bombs(), func(b bomb) string { return b.name }, c.bombs)
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "kiln-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	if err := os.Chmod(tmp, 0o711); err != nil { // as the usual places of state directories are
		return err
	}

	fmt.Fprintln(os.Stderr, "preparing inputs in", c.cache)
	in, err := prepareInputs(ctx, c.cache, tmp, slices.ContainsFunc(works, func(w workload) bool { return w.push }))
	if err != nil {
		return fmt.Errorf("prepare inputs: %w", err)
	}
	reg, err := startRegistry(ctx, filepath.Join(tmp, "registry"))
	if err != nil {
		return fmt.Errorf("start registry: %w", err)
	}
	defer func() { err = errors.Join(err, reg.Close()) }()

	rep := newReport(c.n)
	var peers []peer
	defer func() {
		for _, p := range peers {
			err = errors.Join(err, p.Close())
		}
	}()
	for _, k := range kinds {
		p, err := k.start(ctx, c, filepath.Join(tmp, k.name))
		if err != nil {
			return fmt.Errorf("start %s: %w", k.name, err)
		}
		peers = append(peers, p)
		rep.Peers = append(rep.Peers, peerInfo{Name: k.name, Note: k.note, StartSeconds: p.StartTime().Seconds()})
	}
	for _, w := range works {
		if w.bombs {
			if rep.Bombs, err = measureBombs(ctx, w, list, peers, in, tmp, c.n); err != nil {
				return fmt.Errorf("workload %s: %w", w.name, err)
			}
			continue
		}
		res, err := measure(ctx, w, peers, in, reg.addr, tmp, c.n)
		if err != nil {
			return fmt.Errorf("workload %s: %w", w.name, err)
		}
		rep.Workloads = append(rep.Workloads, res)
	}
	if err := rep.write(c.out); err != nil {
		return fmt.Errorf("write results: %w", err)
	}
	return errors.Join(rep.print(os.Stdout), rep.failures())
}

// pick selects from all by a comma-separated list; an empty list selects all.
func pick[T any](what string, all []T, name func(T) string, list string) ([]T, error) {
	if list == "" {
		return all, nil
	}
	var out []T
	for want := range strings.SplitSeq(list, ",") {
		i := slices.IndexFunc(all, func(t T) bool { return name(t) == want })
		if i < 0 {
			var names []string
			for _, t := range all {
				names = append(names, name(t))
			}
			return nil, fmt.Errorf("%s: no %q; there are %s", what, want, strings.Join(names, ", "))
		}
		out = append(out, all[i])
	}
	return out, nil
}
