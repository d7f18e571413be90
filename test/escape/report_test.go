package escape

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

var write = flag.Bool("write", false, "write docs/security-results.md; every entry must have run")

const resultsFile = "../../docs/security-results.md"

// outcomes are the results of entries by ID and class of sandbox, or "off".
type outcomes struct {
	mu sync.Mutex
	of map[string]map[string]bool
}

var results = outcomes{of: map[string]map[string]bool{}}

func (o *outcomes) note(id, where string, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.of[id] == nil {
		o.of[id] = map[string]bool{}
	}
	o.of[id][where] = ok
}

// table is the register as a document, without results when results is nil.
func table(done map[string]map[string]bool) string {
	var b strings.Builder
	b.WriteString(`# Security results

What kiln was attacked with, and what came of it. Written by ` + "`make security-results`" + `, which runs all of it; do not edit. *held*: the attack was
tried in this sandbox and did not succeed. *Fires without*: the same attack succeeds when the control named is taken away, so the test
can tell; "—" means that this was not shown.
`)
	before := ""
	for _, en := range sorted() {
		if c := class(en.ID); c != before {
			fmt.Fprintf(&b, "\n## %s%s\n\n| entry | threat | severity | gvisor | userns | fires without |\n| --- | --- | --- | --- | --- | --- |\n", strings.ToUpper(c[:1]), c[1:])
			before = c
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s | %s |\n", en.ID, en.Threat, en.Severity, en.cell("gvisor", done), en.cell("userns", done), en.offCell(done))
	}
	b.WriteString(elsewhereTable())
	return b.String()
}

func (en entry) cell(sandbox string, done map[string]map[string]bool) string {
	for c, why := range en.Not {
		if string(c) == sandbox {
			return "not applicable: " + why
		}
	}
	if en.Once != "" {
		sandbox = "userns"
	}
	word := "held"
	if done != nil && !done[en.ID][sandbox] {
		word = "**failed**"
	}
	if en.Once != "" {
		return word + " (tried once: " + en.Once + ")"
	}
	return word
}

func (en entry) offCell(done map[string]map[string]bool) string {
	switch {
	case en.Off == nil:
		return "—"
	case done != nil && !done[en.ID]["off"]:
		return en.Without + ": **not shown**"
	}
	return "yes: " + en.Without
}

// TestResultsAreCurrent runs after TestEscape. The committed document lists exactly
// the entries of the register, and has them all held.
func TestResultsAreCurrent(t *testing.T) {
	if *write {
		for _, en := range entries {
			require.Len(t, results.of[en.ID], len(en.runsIn())+count(en.Off != nil), "%s did not run: nothing is written", en.ID)
		}
		require.NoError(t, os.WriteFile(resultsFile, []byte(table(results.of)), 0o644))
		return
	}
	doc, err := os.ReadFile(resultsFile)
	require.NoError(t, err)
	require.Equal(t, rows(table(nil)), rows(string(doc)), "docs/security-results.md is not that of the register: run `make security-results`")
}

func count(is bool) int {
	if is {
		return 1
	}
	return 0
}

// rows are the rows of entries, and of threats that other packages try.
func rows(doc string) []string {
	return regexp.MustCompile("(?m)^\\| .*`.*$").FindAllString(doc, -1)
}
