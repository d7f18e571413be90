package escape

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kiln-build/kiln/sandbox"
)

// severity is how bad it is when an attack succeeds, worst first.
type severity int

const (
	escapesToNode severity = iota
	readsNode
	reachesTenant
	takesNodeDown
	slowsOthers
)

func (s severity) String() string {
	return [...]string{"escape to the node", "reads the node's data", "reaches another tenant", "takes the node down", "slows others down"}[s]
}

// entry is one threat of the register.
type entry struct {
	// ID is CLASS/NAME, such as escape/fd-workdir.
	ID string
	// Threat is a sentence that says what the attacker does and what for.
	Threat   string
	Severity severity
	// Not says for a class of sandbox why the entry does not apply to it.
	Not map[sandbox.Class]string
	// Once says why the class of sandbox makes no difference, for instance that no
	// step runs; the entry then runs once, in userns.
	Once string
	// Test tries the attack, and fails when it succeeds.
	Test func(t *testing.T, e *env)
	// Off, when there is one, tries the same attack with the control Without taken
	// away, and tells whether it succeeded. It runs once, in userns. It
	// must take the control away for itself only.
	Off     func(t *testing.T, e *env) (fires bool)
	Without string
}

// classes are the first parts of IDs, in the order of the register.
var classes = []string{"escape", "archive", "git", "http", "registry", "tenancy", "secrets", "exhaustion", "fault"}

var validID = regexp.MustCompile(`^([a-z]+)/[a-z0-9]+(-[a-z0-9]+)*$`)

var entries []entry

// register adds entries. Call it where a package variable is set:
//
//	var _ = register(entry{...}, entry{...})
func register(list ...entry) bool {
	entries = append(entries, list...)
	return true
}

// sorted returns all entries in the order of the register.
func sorted() []entry {
	all := slices.Clone(entries)
	slices.SortFunc(all, func(a, b entry) int {
		ca, cb := class(a.ID), class(b.ID)
		if ca != cb {
			return slices.Index(classes, ca) - slices.Index(classes, cb)
		}
		return strings.Compare(a.ID, b.ID)
	})
	return all
}

func class(id string) string {
	c, _, _ := strings.Cut(id, "/")
	return c
}

// runsIn are the classes of sandbox that the entry is tried in.
func (en entry) runsIn() []sandbox.Class {
	if en.Once != "" {
		return []sandbox.Class{sandbox.Userns}
	}
	var out []sandbox.Class
	for _, c := range sandbox.Classes {
		if en.Not[c] == "" {
			out = append(out, c)
		}
	}
	return out
}

func TestRegister(t *testing.T) {
	seen := map[string]bool{}
	for _, en := range entries {
		require.Regexp(t, validID, en.ID)
		require.Contains(t, classes, class(en.ID), en.ID)
		require.False(t, seen[en.ID], "%s is there twice", en.ID)
		seen[en.ID] = true
		require.True(t, strings.HasSuffix(en.Threat, ".") && !strings.ContainsAny(en.Threat, "|\n"), "%s: the threat is one sentence, without the mark of a table's column", en.ID)
		require.NotNil(t, en.Test, en.ID)
		require.NotEmpty(t, en.runsIn(), "%s is never tried", en.ID)
		require.False(t, en.Once != "" && len(en.Not) > 0, "%s: Once says it all", en.ID)
		require.Equal(t, en.Off != nil, en.Without != "", "%s: Off and Without go together", en.ID)
	}
}

// TestEscape runs the register. One entry in one sandbox is
// TestEscape/escape/fd-workdir/gvisor, and its attack without the control
// TestEscape/escape/fd-workdir/off.
func TestEscape(t *testing.T) {
	takeCensus(t)
	w := newWorld(t)
	for _, en := range sorted() {
		// Go makes the names of nested tests out of the slash.
		t.Run(en.ID, func(t *testing.T) {
			for _, c := range en.runsIn() {
				t.Run(string(c), func(t *testing.T) {
					defer func() { results.note(en.ID, string(c), !t.Failed()) }()
					en.Test(t, &env{world: w, Class: c})
				})
			}
			if en.Off != nil {
				t.Run("off", func(t *testing.T) {
					defer func() { results.note(en.ID, "off", !t.Failed()) }()
					require.True(t, en.Off(t, &env{world: w, Class: sandbox.Userns}), "the attack does not succeed without %s: it proves nothing", en.Without)
				})
			}
		})
	}
}
