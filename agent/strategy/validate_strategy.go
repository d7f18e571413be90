package strategy

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// workspace is the directory that the steps of a build share.
const workspace = "/workspace"

// secretsDir is where a secret is when a step does not say.
const secretsDir = "/run/secrets"

func (v *validator) dockerfile(field string, d *agentv1.DockerfileStrategy) {
	name, err := cleanRelative(d.GetPath())
	switch {
	case d.GetPath() == "":
	case !v.check(field+".path", err):
	case name == ".":
		v.add(field+".path", "%s is not the name of a file", quote(d.GetPath()))
	case d.GetInline() != "":
		v.add(field+".path", "and inline exclude each other")
	}
	if len(d.GetInline()) > maxInline {
		v.add(field+".inline", "is longer than %d bytes", maxInline)
	}
	if t := d.GetTarget(); t != "" && !stageName.MatchString(t) {
		v.add(field+".target", "%s is not the name of a stage", quote(t))
	}
	v.pairs(field+".build_args", d.GetBuildArgs(), maxBuildArgs, envName)
	for _, key := range slices.Sorted(maps.Keys(d.GetBuildArgs())) {
		if strings.HasPrefix(key, "BUILDKIT_ATTEST_") {
			v.add(entry(field+".build_args", key), "is not for build arguments; use spec.attestations")
		}
	}
	v.pairs(field+".labels", d.GetLabels(), maxImageLabels, nil)
	if !v.count(field+".extra_hosts", len(d.GetExtraHosts()), maxExtraHosts) {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(d.GetExtraHosts())) {
		f := entry(field+".extra_hosts", name)
		if !hostName.MatchString(name) {
			v.add(f, "is not a host name")
		}
		_, err := parseAddress(d.GetExtraHosts()[name])
		v.check(f, err)
	}
}

func (v *validator) steps(field string, s *agentv1.StepsStrategy) {
	if len(s.GetSteps()) == 0 && s.GetImage() == nil {
		v.add(field+".steps", "is empty")
	}
	v.pairs(field+".env", s.GetEnv(), maxEnv, envName)
	if v.count(field+".steps", len(s.GetSteps()), maxSteps) {
		names := map[string]bool{}
		for i, step := range s.GetSteps() {
			f := item(field+".steps", i)
			switch name := step.GetName(); {
			case !stepName.MatchString(name):
				v.add(f+".name", "%s is not a name; want 1 to 63 letters, digits, spaces, '.', '_' and '-'", quote(name))
			case names[name]:
				v.add(f+".name", "%s is the name of another step", quote(name))
			}
			names[step.GetName()] = true
			v.step(f, step)
		}
	}
	if s.GetImage() != nil {
		v.stepsImage(field+".image", s.GetImage())
	}
}

func (v *validator) step(field string, s *agentv1.BuilderStep) {
	_, err := checkImage(s.GetImage())
	v.check(field+".image", err)
	v.values(field+".command", s.GetCommand())
	v.values(field+".args", s.GetArgs())
	if len(s.GetCommand()) > 0 && s.GetCommand()[0] == "" {
		v.add(item(field+".command", 0), "is empty; want a program")
	}
	v.pairs(field+".env", s.GetEnv(), maxEnv, envName)
	v.check(field+".working_dir", checkWorkingDir(s.GetWorkingDir()))
	v.user(field+".user", s.GetUser())
	v.duration(field+".timeout", s.GetTimeout(), maxTimeout)
	mounts := map[string]bool{workspace: true}
	mount := func(field, p string) {
		if err := checkMountPoint(p); !v.check(field, err) {
			return
		}
		if p = path.Clean(p); mounts[p] {
			v.add(field, "something else is mounted at %s", quote(p))
		}
		mounts[p] = true
	}
	if v.count(field+".secrets", len(s.GetSecrets()), maxStepSecrets) {
		envs := map[string]bool{}
		for i, sec := range s.GetSecrets() {
			f := item(field+".secrets", i)
			if !v.declared[sec.GetId()] {
				v.add(f+".id", "%s is not in spec.secrets", quote(sec.GetId()))
			}
			if p := secretPath(sec); p != "" {
				mount(f+".path", p)
			}
			switch name := sec.GetEnv(); {
			case name == "":
			case !envName.MatchString(name) || len(name) > maxName:
				v.add(f+".env", "%s is not the name of a variable", quote(name))
			case envs[name]:
				v.add(f+".env", "%s is given by another secret", quote(name))
			default:
				envs[name] = true
			}
		}
	}
	if v.count(field+".caches", len(s.GetCaches()), maxStepCaches) {
		for i, c := range s.GetCaches() {
			f := item(field+".caches", i)
			if !cacheID.MatchString(c.GetId()) {
				v.add(f+".id", "%s is not the name of a cache; want 1 to 128 letters, digits, '.', '_' and '-'", quote(c.GetId()))
			}
			mount(f+".path", c.GetPath())
		}
	}
}

// secretPath returns where a secret is a file, or nothing.
func secretPath(s *agentv1.StepSecret) string {
	if s.GetPath() == "" && s.GetEnv() == "" {
		return path.Join(secretsDir, s.GetId())
	}
	return s.GetPath()
}

// checkMountPoint reports why nothing of a spec can be mounted at p.
func checkMountPoint(p string) error {
	if err := checkAbsolute(p); err != nil {
		return err
	}
	p = path.Clean(p)
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		if p == dir || strings.HasPrefix(p, dir+"/") {
			return fmt.Errorf("%s is the sandbox's own", quote(p))
		}
	}
	if p == "/" {
		return fmt.Errorf("%s is the root of the step", quote(p))
	}
	return nil
}

func checkWorkingDir(s string) error {
	if path.IsAbs(s) {
		return checkAbsolute(s)
	}
	_, err := cleanRelative(s)
	return err
}

func (v *validator) user(field, s string) {
	if s != "" && !userName.MatchString(s) {
		v.add(field, "%s is not a user; want NAME or UID, with :GROUP if there is one", quote(s))
	}
}

func (v *validator) stepsImage(field string, im *agentv1.StepsImage) {
	if im.GetBase() != "" {
		_, err := checkImage(im.GetBase())
		v.check(field+".base", err)
	}
	if v.count(field+".copies", len(im.GetCopies()), maxCopies) {
		for i, c := range im.GetCopies() {
			f := item(field+".copies", i)
			if c.GetSource() == "" {
				v.add(f+".source", "is empty; want a path below %s, or \".\" for all", workspace)
			} else {
				_, err := cleanRelative(c.GetSource())
				v.check(f+".source", err)
			}
			v.check(f+".destination", checkAbsolute(c.GetDestination()))
			if o := c.GetChown(); o != "" && !owner.MatchString(o) {
				v.add(f+".chown", "%s is not an owner; want UID:GID in digits", quote(o))
			}
		}
	}
	v.pairs(field+".env", im.GetEnv(), maxEnv, envName)
	v.values(field+".entrypoint", im.GetEntrypoint())
	v.values(field+".cmd", im.GetCmd())
	if w := im.GetWorkingDir(); w != "" {
		v.check(field+".working_dir", checkAbsolute(w))
	}
	v.user(field+".user", im.GetUser())
	v.pairs(field+".labels", im.GetLabels(), maxImageLabels, nil)
}
