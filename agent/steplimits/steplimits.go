// Package steplimits writes and reads the limits of a build's steps that BuildKit has no
// words for: as an option of its Dockerfile front end, and in the description of the
// operation that is a step.
//
// It promises that what it cannot understand is an error and never no limit. A step's
// place in the cache is the same with all limits: neither form is part of what a step is.
package steplimits

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/kiln-build/kiln/sandbox/policy"
)

// Key names the front end's option and the entry of a description.
const Key = "kiln.limits"

// errShort is what is wrong with a time.
var errShort = errors.New("want 1s or more")

// field is a limit in a text.
type field struct {
	name string
	of   func(*policy.Limits) *int64
}

// fields are all limits that BuildKit has no words for, in the order in which they are
// written.
var fields = []field{
	{"pids", func(l *policy.Limits) *int64 { return &l.PIDs }},
	{"disk", func(l *policy.Limits) *int64 { return &l.DiskBytes }},
	{"inodes", func(l *policy.Limits) *int64 { return &l.Inodes }},
	{"open-files", func(l *policy.Limits) *int64 { return &l.OpenFiles }},
	{"log-bytes", func(l *policy.Limits) *int64 { return &l.LogBytes }},
	{"log-rate", func(l *policy.Limits) *int64 { return &l.LogRate }},
	{"shm", func(l *policy.Limits) *int64 { return &l.ShmBytes }},
	{"timeout", func(l *policy.Limits) *int64 { return (*int64)(&l.StepTimeout) }},
}

// Encode returns l without what BuildKit has words for (CPU and memory), such as
// "pids=100,timeout=1m0s"; "" when nothing is limited.
func Encode(l policy.Limits) string {
	var parts []string
	for _, f := range fields {
		v := *f.of(&l)
		switch {
		case v == 0:
		case f.name == "timeout":
			parts = append(parts, f.name+"="+time.Duration(v).String())
		default:
			parts = append(parts, f.name+"="+strconv.FormatInt(v, 10))
		}
	}
	return strings.Join(parts, ",")
}

// Decode reads what Encode writes. A limit that is not known, is there twice or is not
// above 0 is an error.
func Decode(s string) (policy.Limits, error) {
	var l policy.Limits
	if s == "" {
		return l, nil
	}
	for part := range strings.SplitSeq(s, ",") {
		name, value, _ := strings.Cut(part, "=")
		if err := set(&l, name, value); err != nil {
			return policy.Limits{}, fmt.Errorf("%s %.80q: %w", Key, part, err)
		}
	}
	return l, nil
}

func set(l *policy.Limits, name, value string) error {
	for _, f := range fields {
		if f.name != name {
			continue
		}
		v, err := parse(name, value)
		if err != nil {
			return err
		}
		if p := f.of(l); *p == 0 {
			*p = v
			return nil
		}
		return errors.New("is given twice")
	}
	return errors.New("is no limit")
}

func parse(name, value string) (int64, error) {
	var v int64
	var err error
	if name == "timeout" {
		var d time.Duration
		d, err = time.ParseDuration(value)
		v = int64(d)
	} else {
		v, err = strconv.ParseInt(value, 10, 64)
	}
	if err != nil || v <= 0 {
		return 0, errors.New("want a value above 0")
	}
	return v, nil
}
