package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// workload is one thing to measure.
type workload struct {
	name, about string
	base        func(*inputs) map[string]string
	context     func(*inputs) string // directory that holds the files; nil: nothing
	dockerfile  string
	noCache     bool
	push        bool
	// before is called ahead of every run; its time does not count.
	before func(ctx context.Context, p peer, dir string, run int) error
	// fresh gives every run a repository of its own.
	fresh bool
	// atOnce is how many builds run at once, each with a context and a first step of its
	// own; 0 means one. Only daemons build several.
	atOnce int
	// fill adds files to the context of a build.
	fill func(dir string) error
	// bombs has the build measured beside bombs, instead of on its own.
	bombs bool
}

// requests makes the contexts of a workload, and returns its builds.
func (w *workload) requests(in *inputs, tmp string) ([]request, error) {
	var out []request
	for i := range max(w.atOnce, 1) {
		dir, dockerfile := filepath.Join(tmp, "context-"+w.name), w.dockerfile
		if w.atOnce > 0 {
			dir = fmt.Sprint(dir, "-", i)
			dockerfile = strings.Replace(dockerfile, "FROM base\n", fmt.Sprintf("FROM base\nRUN echo build %d\n", i), 1)
		}
		if w.context != nil {
			dir = w.context(in)
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(dockerfile), 0o644); err != nil {
			return nil, err
		}
		if w.fill != nil {
			if err := w.fill(dir); err != nil {
				return nil, err
			}
		}
		out = append(out, request{dir: dir, bases: w.base(in), noCache: w.noCache})
	}
	return out, nil
}

func busyboxBase(in *inputs) map[string]string { return map[string]string{"base": in.busybox} }
func gccBase(in *inputs) map[string]string     { return map[string]string{"base": in.gcc} }

func workloads() []workload {
	var steps, stages, short, last strings.Builder
	steps.WriteString("FROM base\n")
	for i := range 20 {
		fmt.Fprintf(&steps, "RUN echo step %d\n", i)
	}
	for i := range 8 {
		fmt.Fprintf(&stages, "FROM base AS s%d\nRUN i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo $i > /out%d\n", i, i)
		fmt.Fprintf(&short, "FROM base AS s%d\n", i)
		for j := range 5 {
			fmt.Fprintf(&short, "RUN echo step %d >> /out%d\n", j, i)
		}
		fmt.Fprintf(&last, "COPY --from=s%d /out%d /\n", i, i)
	}
	stages.WriteString("FROM base\n" + last.String())
	short.WriteString("FROM base\n" + last.String())
	copyFiles := "FROM base\nCOPY data /data\nRUN echo done\n"
	files := func(in *inputs) string { return in.files }
	small := "FROM base\n" + strings.Join(strings.SplitAfter(steps.String(), "\n")[1:11], "") + "COPY src /src\nRUN cd /src && make -s -j2\n"
	smallSource := func(dir string) error { return makeCSource(filepath.Join(dir, "src"), smallCFiles) }

	return []workload{
		{name: "start", about: "one cached step: what a build costs before any work", base: busyboxBase, dockerfile: "FROM base\nRUN echo hello\n"},
		{name: "steps", about: "20 RUN steps, no cache", base: busyboxBase, dockerfile: steps.String(), noCache: true},
		{name: "cached", about: "20 RUN steps, all cached", base: busyboxBase, dockerfile: steps.String()},
		{name: "stages", about: "8 parallel stages that compute, no cache", base: busyboxBase, dockerfile: stages.String(), noCache: true},
		{name: "stages-steps", about: "8 parallel stages of 5 RUN steps, no cache", base: busyboxBase, dockerfile: short.String(), noCache: true},
		{name: "compile", about: "120 C files, make -j2, no cache", base: gccBase, dockerfile: "FROM base\nCOPY src /src\nRUN cd /src && make -s -j2\n",
			context: func(in *inputs) string { return in.csource }, noCache: true},
		{name: "four", about: "4 builds at once, each 10 short steps and 12 C files, make -j2, no cache", base: gccBase, dockerfile: small, noCache: true, fill: smallSource, atOnce: 4},
		{name: "bombs", about: "one of these beside bombs of another tenant", base: gccBase, dockerfile: small, noCache: true, fill: smallSource, bombs: true},
		{name: "files", about: "one step: 10,000 small files, cp -a /usr, rm -rf both", base: gccBase, noCache: true,
			dockerfile: "FROM base\nRUN mkdir /d && i=0 && while [ $i -lt 10000 ]; do echo $i > /d/$i; i=$((i+1)); done && cp -a /usr /usr2 && rm -rf /d /usr2\n"},
		{name: "push-cold", about: "20,000 files, 234 MB: COPY, RUN, push, nothing known before", base: busyboxBase, context: files, dockerfile: copyFiles, push: true, fresh: true,
			before: func(ctx context.Context, p peer, _ string, _ int) error { return p.Reset(ctx) }},
		{name: "push-same", about: "the same, nothing changed", base: busyboxBase, context: files, dockerfile: copyFiles, push: true},
		{name: "push-one", about: "the same, one file changed", base: busyboxBase, context: files, dockerfile: copyFiles, push: true,
			before: func(_ context.Context, p peer, dir string, run int) error {
				text := fmt.Sprintf("%s %d %d\n", p.Name(), run, time.Now().UnixNano())
				return os.WriteFile(filepath.Join(dir, "data", "000", "00000.bin"), []byte(text), 0o644)
			}},
	}
}

// measure runs a workload n times with each peer, in turns.
func measure(ctx context.Context, w workload, peers []peer, in *inputs, registryAddr, tmp string, n int) (workResult, error) {
	res := workResult{Name: w.name, About: w.about}
	requests, err := w.requests(in, tmp)
	if err != nil {
		return res, err
	}
	res.Peers = make([]peerResult, len(peers))
	for run := range n + 1 { // run 0 warms up
		for i, p := range peers {
			if res.Peers[i].Name = p.Name(); res.Peers[i].Error != "" {
				continue
			}
			if _, several := p.(tenantPeer); w.atOnce > 0 && !several {
				res.Peers[i].Skipped = true
				continue
			}
			if w.before != nil {
				if err := w.before(ctx, p, requests[0].dir, run); err != nil {
					return res, fmt.Errorf("prepare %s: %w", p.Name(), err)
				}
			}
			if w.push {
				repo := "push-" + p.Name()
				if w.fresh {
					repo = fmt.Sprintf("%s-%d-%s", w.name, run, p.Name())
				}
				requests[0].push = registryAddr + "/" + repo + ":latest"
			}
			u, err := buildAll(ctx, p, requests)
			if ctx.Err() != nil {
				return res, ctx.Err()
			}
			if err != nil { // the others still count
				fmt.Fprintf(os.Stderr, "%-10s %d/%d %-15s failed: %v\n", w.name, run, n, p.Name(), err)
				res.Peers[i].Error = err.Error()
				continue
			}
			fmt.Fprintf(os.Stderr, "%-10s %d/%d %-15s %7.2f s %5d MiB\n", w.name, run, n, p.Name(), u.elapsed.Seconds(), u.peak>>20)
			if pr := &res.Peers[i]; run > 0 {
				pr.Seconds = append(pr.Seconds, u.elapsed.Seconds())
				pr.PeakBytes = append(pr.PeakBytes, float64(u.peak))
			}
		}
	}
	for i := range res.Peers {
		if res.Peers[i].Error != "" || res.Peers[i].Skipped {
			res.Peers[i].Seconds, res.Peers[i].PeakBytes = nil, nil
			continue
		}
		res.Peers[i].Median = median(res.Peers[i].Seconds)
		res.Peers[i].MedianPeak = median(res.Peers[i].PeakBytes)
	}
	return res, nil
}

// buildAll has a peer do builds at once. Its memory is the most that one of them saw.
func buildAll(ctx context.Context, p peer, requests []request) (usage, error) {
	used, errs := make([]usage, len(requests)), make([]error, len(requests))
	begin := time.Now()
	var all sync.WaitGroup
	for i, r := range requests {
		all.Go(func() { used[i], errs[i] = p.Build(ctx, r) })
	}
	all.Wait()
	u := usage{elapsed: time.Since(begin)}
	for _, one := range used {
		u.peak = max(u.peak, one.peak)
	}
	return u, errors.Join(errs...)
}
