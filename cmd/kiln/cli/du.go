package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/buildkit/client"
	"github.com/spf13/cobra"
)

func (a *App) duCommand() *cobra.Command {
	var t target
	var filters []string
	var verbose bool
	cmd := &cobra.Command{
		Use: "du", Short: "Show what the build store holds", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkFilters(filters); err != nil {
				return err
			}
			return a.withClient(cmd.Context(), &t, func(ctx context.Context, c *client.Client) error {
				records, err := c.DiskUsage(ctx, client.WithFilter(filters))
				if err != nil {
					return err
				}
				slices.SortFunc(records, func(x, y *client.UsageInfo) int {
					return cmp.Or(cmp.Compare(y.Size, x.Size), cmp.Compare(x.ID, y.ID))
				})
				if verbose {
					return writeVerbose(a.Stdout, records)
				}
				return writeUsage(a.Stdout, records, time.Now())
			})
		},
	}
	cmd.Flags().StringArrayVar(&filters, "filter", nil, "Show only matching records, such as type==exec.cachemount")
	cmd.Flags().BoolVar(&verbose, "verbose", false, "Show every field of every record")
	t.flags(cmd.Flags())
	return cmd
}

// withClient runs fn with a connection to the engine and releases that.
func (a *App) withClient(ctx context.Context, t *target, fn func(context.Context, *client.Client) error) error {
	c, release, err := a.connect(ctx, t)
	if err != nil {
		return err
	}
	return errors.Join(fn(ctx, c), release())
}

// checkFilters reports filters that the engine would misread.
func checkFilters(filters []string) error {
	for _, f := range filters {
		if key, _, ok := strings.Cut(f, "="); ok && strings.Trim(key, "!~ ") == "" {
			return usage(fmt.Errorf("--filter %q: want FIELD==VALUE, FIELD!=VALUE or FIELD~=REGEXP", f))
		}
	}
	return nil
}

// maxDescription bounds the description in the table, in characters.
const maxDescription = 60

func writeUsage(w io.Writer, records []*client.UsageInfo, now time.Time) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "ID\tSIZE\tTYPE\tIN USE\tLAST USED\tDESCRIPTION")
	var total, reclaimable, shared int64
	for _, r := range records {
		total += r.Size
		if !r.InUse {
			reclaimable += r.Size
		}
		if r.Shared {
			shared += r.Size
		}
		used := "never"
		if r.LastUsedAt != nil {
			used = units.HumanDuration(now.Sub(*r.LastUsedAt)) + " ago"
		}
		id := r.ID
		if r.Mutable {
			id += "*"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%t\t%s\t%s\n", id, size(r.Size), r.RecordType, r.InUse, used, shorten(r.Description))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\nTotal: %s in %d records, of which %s can be freed and %s is shared with others\n",
		size(total), len(records), size(reclaimable), size(shared))
	return err
}

func writeVerbose(w io.Writer, records []*client.UsageInfo) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range records {
		last := "never"
		if r.LastUsedAt != nil {
			last = r.LastUsedAt.Format(time.RFC3339)
		}
		for _, kv := range [][2]string{
			{"ID", r.ID}, {"Size", size(r.Size)}, {"Type", string(r.RecordType)}, {"Mutable", strconv.FormatBool(r.Mutable)},
			{"In use", strconv.FormatBool(r.InUse)}, {"Shared", strconv.FormatBool(r.Shared)}, {"Created", r.CreatedAt.Format(time.RFC3339)},
			{"Last used", last}, {"Uses", strconv.Itoa(r.UsageCount)}, {"Parents", strings.Join(r.Parents, ", ")},
			{"Description", printable(r.Description)},
		} {
			fmt.Fprintf(tw, "%s:\t%s\n", kv[0], kv[1])
		}
		fmt.Fprintln(tw)
	}
	return tw.Flush()
}

func size(n int64) string {
	return units.CustomSize("%.4g%s", float64(n), 1000, []string{"B", "kB", "MB", "GB", "TB", "PB"})
}

// printable makes text from a Dockerfile safe for a terminal and for a table.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\t' || r == '\n' {
			return ' '
		}
		if !strconv.IsPrint(r) {
			return -1
		}
		return r
	}, s)
}

func shorten(s string) string {
	r := []rune(printable(s))
	if len(r) > maxDescription {
		return string(r[:maxDescription-1]) + "…"
	}
	return string(r)
}
