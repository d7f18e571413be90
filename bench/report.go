package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

type peerInfo struct {
	Name         string  `json:"name"`
	Note         string  `json:"note"`
	StartSeconds float64 `json:"startSeconds,omitempty"` // of its daemon
}

type peerResult struct {
	Name       string    `json:"name"`
	Seconds    []float64 `json:"seconds"`
	PeakBytes  []float64 `json:"peakBytes"`
	Median     float64   `json:"medianSeconds"`
	MedianPeak float64   `json:"medianPeakBytes"`
	Error      string    `json:"error,omitempty"`   // then there are no figures
	Skipped    bool      `json:"skipped,omitempty"` // the peer cannot do this work
}

type workResult struct {
	Name  string       `json:"name"`
	About string       `json:"about"`
	Peers []peerResult `json:"peers"`
}

func (w workResult) of(peer string) peerResult {
	i := slices.IndexFunc(w.Peers, func(p peerResult) bool { return p.Name == peer })
	return w.Peers[i]
}

// seconds writes the median of a peer, or why there is none.
func (w workResult) seconds(peer string) string {
	switch p := w.of(peer); {
	case p.Skipped:
		return ""
	case p.Error != "":
		return "failed"
	default:
		return fmt.Sprintf("%.2f s", p.Median)
	}
}

// compared writes how the medians of two peers relate.
func (w workResult) compared(a, b string) string {
	switch x, y := w.of(a), w.of(b); {
	case x.Skipped || y.Skipped:
		return ""
	case x.Error != "" || y.Error != "":
		return "failed"
	default:
		return fmt.Sprintf("%.2f×", ratio(x.Median, y.Median))
	}
}

type report struct {
	Date      time.Time      `json:"date"`
	Machine   string         `json:"machine"`
	Runs      int            `json:"runs"`
	Peers     []peerInfo     `json:"peers"`
	Workloads []workResult   `json:"workloads"`
	Bombs     []besideResult `json:"bombs,omitempty"`
}

func newReport(n int) *report {
	return &report{Date: time.Now().UTC().Truncate(time.Second), Machine: machine(), Runs: n}
}

func machine() string {
	var name unix.Utsname
	var info unix.Sysinfo_t
	if unix.Uname(&name) != nil || unix.Sysinfo(&info) != nil {
		return "unknown"
	}
	system := "Linux"
	if f, err := os.Open("/etc/os-release"); err == nil {
		defer f.Close()
		for lines := bufio.NewScanner(f); lines.Scan(); {
			if v, ok := strings.CutPrefix(lines.Text(), "PRETTY_NAME="); ok {
				system = strings.Trim(v, `"`)
			}
		}
	}
	memory := info.Totalram * uint64(info.Unit) >> 30
	return fmt.Sprintf("%d cores, %d GiB, Linux %s, %s", runtime.NumCPU(), memory, unix.ByteSliceToString(name.Release[:]), system)
}

// comparisons are the ratios of medians in the table, where both were measured.
var comparisons = [][2]string{
	{"kiln-userns", "buildkit-runc"},
	{"kiln-gvisor", "buildkit-runc"},
	{"kiln-gvisor", "buildkit-runsc"},
	{"agent-buildctl", "buildkit-runc"},
	{"agent-kiln", "buildkit-runc"},
	{"agent-gvisor", "buildkit-runc"},
	{"agent-gvisor", "buildkit-runsc"},
}

// print writes the tables, in Markdown.
func (r *report) print(out io.Writer) error {
	fmt.Fprintf(out, "%s; %d runs each, in turns; medians\n\n", r.Machine, r.Runs)
	if len(r.Workloads) > 0 {
		if err := r.printWork(out); err != nil {
			return err
		}
	}
	if err := r.printBeside(out); err != nil {
		return err
	}
	for _, p := range r.Peers {
		fmt.Fprintf(out, "- %s: %s", p.Name, p.Note)
		if p.StartSeconds > 0 {
			fmt.Fprintf(out, "; its daemon serves %.2f s after its start, which no figure includes", p.StartSeconds)
		}
		fmt.Fprintln(out)
	}
	return nil
}

// printWork writes the table of workloads.
func (r *report) printWork(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
	head, rule := "| work", "| ---"
	var pairs [][2]string
	has := func(name string) bool {
		return slices.ContainsFunc(r.Peers, func(p peerInfo) bool { return p.Name == name })
	}
	for _, p := range r.Peers {
		head, rule = head+"\t| "+p.Name, rule+"\t| ---"
	}
	for _, c := range comparisons {
		if has(c[0]) && has(c[1]) {
			pairs = append(pairs, c)
			head, rule = head+"\t| "+c[0]+" / "+c[1], rule+"\t| ---"
		}
	}
	fmt.Fprintf(w, "%s\t|\n%s\t|\n", head, rule)
	for _, wl := range r.Workloads {
		row := "| " + wl.About
		for _, p := range r.Peers {
			row += "\t| " + wl.seconds(p.Name)
		}
		for _, c := range pairs {
			row += "\t| " + wl.compared(c[0], c[1])
		}
		fmt.Fprintf(w, "%s\t|\n", row)
	}
	row := "| peak memory of the builder, highest median"
	for i := range r.Peers {
		var peak float64
		for _, wl := range r.Workloads {
			peak = max(peak, wl.Peers[i].MedianPeak)
		}
		row += fmt.Sprintf("\t| %.0f MiB", peak/(1<<20))
	}
	fmt.Fprintf(w, "%s%s\t|\n", row, strings.Repeat("\t|", len(pairs)))
	fmt.Fprintln(w)
	return w.Flush()
}

// failures is an error that names the builds without figures.
func (r *report) failures() error {
	var errs []error
	for _, w := range r.Workloads {
		for _, p := range w.Peers {
			if p.Error != "" {
				errs = append(errs, fmt.Errorf("workload %s with %s failed", w.Name, p.Name))
			}
		}
	}
	return errors.Join(append(errs, r.besideFailures())...)
}

func (r *report) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "results.json"), append(raw, '\n'), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "results.svg"), chart(r), 0o644)
}
