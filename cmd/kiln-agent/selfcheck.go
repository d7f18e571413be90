package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"

	"github.com/kiln-build/kiln/agent/config"
	"github.com/kiln-build/kiln/cmd/kiln/doctor"
)

// checkTimeout bounds one check of the node.
const checkTimeout = 30 * time.Second

// checkSandboxes tries what the enabled classes of sandbox need of the node, and
// returns how each does, the strongest first. It is an error when none works.
func checkSandboxes(ctx context.Context, cfg *config.Agent, runsc string, log *slog.Logger) ([]*agentv1.SandboxInfo, error) {
	var enabled []sandbox.Class
	for _, c := range sandbox.Classes {
		if slices.Contains(cfg.Sandboxes.Enabled, string(c)) {
			enabled = append(enabled, c)
		}
	}
	problems := map[sandbox.Class][]string{}
	for _, check := range doctor.Checks(doctor.Config{Root: cfg.Root, RunscPath: runsc}) {
		needing := intersect(check.Needs, enabled)
		if len(needing) == 0 {
			continue
		}
		cctx, cancel := context.WithTimeout(ctx, checkTimeout)
		_, err := check.Run(cctx)
		cancel()
		for _, c := range needing {
			if err != nil {
				problems[c] = append(problems[c], explain(check.Name, err))
			}
		}
	}
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	var infos []*agentv1.SandboxInfo
	var refusals []error
	for _, c := range enabled {
		info := &agentv1.SandboxInfo{Class: classNumber(c), Available: len(problems[c]) == 0, Problem: strings.Join(problems[c], "; ")}
		infos = append(infos, info)
		if !info.Available {
			log.Warn("sandbox does not work on this node", "class", string(c), "problem", info.Problem)
			refusals = append(refusals, fmt.Errorf("sandbox %s: %s", c, info.Problem))
		}
	}
	if len(refusals) == len(infos) {
		return nil, fmt.Errorf("no sandbox that is enabled works on this node:\n%w", errors.Join(refusals...))
	}
	return infos, nil
}

func intersect(a, b []sandbox.Class) []sandbox.Class {
	var out []sandbox.Class
	for _, c := range a {
		if slices.Contains(b, c) {
			out = append(out, c)
		}
	}
	return out
}

// explain says what a check found, and what to do.
func explain(name string, err error) string {
	text := name + ": " + strings.Join(strings.Fields(err.Error()), " ")
	var p *doctor.Problem
	if errors.As(err, &p) {
		text += " (" + strings.TrimSuffix(p.Fix, ".") + ")"
	}
	return text
}

// available returns the classes that work.
func available(infos []*agentv1.SandboxInfo) []sandbox.Class {
	var out []sandbox.Class
	for _, c := range sandbox.Classes {
		if slices.ContainsFunc(infos, func(i *agentv1.SandboxInfo) bool { return i.Available && i.Class == classNumber(c) }) {
			out = append(out, c)
		}
	}
	return out
}

func classNumber(c sandbox.Class) agentv1.SandboxClass {
	switch c {
	case sandbox.GVisor:
		return agentv1.SandboxClass_SANDBOX_CLASS_GVISOR
	case sandbox.Userns:
		return agentv1.SandboxClass_SANDBOX_CLASS_USERNS
	}
	return agentv1.SandboxClass_SANDBOX_CLASS_UNSPECIFIED
}
