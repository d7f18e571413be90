package cli

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/kiln-build/kiln/cmd/kiln/doctor"
)

func (a *App) doctorCommand() *cobra.Command {
	var root string
	cmd := &cobra.Command{
		Use: "doctor", Short: "Say what this machine can and cannot do, and how to fix it", Args: noArgs,
		Long: "Check what kiln needs of this machine. Exit code 0 when at least one class of sandbox works, 1 when none does.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if root == "" {
				root = DefaultRoot()
			}
			// What a probe mounts goes with this process. A user who may not have a
			// mount namespace still gets the report, which says so.
			if os.Geteuid() == 0 {
				_ = a.isolate(&target{})
			}
			report := doctor.Run(cmd.Context(), doctor.Config{Root: root, RunscPath: findTool("runsc")})
			if err := report.Write(a.Stdout); err != nil {
				return fmt.Errorf("write report: %w", err)
			}
			if !report.Usable() {
				return silentError{}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&root, "root", "", "State directory (default "+DefaultRoot()+")")
	return cmd
}
