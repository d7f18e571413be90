package escape

import (
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"testing"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox/mountns"
)

// netnsEnv holds the ID of the process that has its network namespace already.
const netnsEnv = "KILN_ESCAPE_NETNS_OF"

func TestMain(m *testing.M) {
	if err := enterNode(); err != nil {
		fmt.Fprintln(os.Stderr, "make a node for the tests (needs root):", err)
		os.Exit(1)
	}
	flag.Parse()
	if !testing.Verbose() {
		logrus.SetOutput(io.Discard) // what the libraries say of the attacks
	}
	os.Exit(m.Run())
}

// enterNode gives the process network, IPC and mount namespaces of its own. It
// executes itself again, see mountns.Enter.
func enterNode() error {
	self := strconv.Itoa(os.Getpid())
	if os.Getenv(netnsEnv) != self {
		runtime.LockOSThread() // Enter executes on this thread
		if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWIPC); err != nil {
			return err
		}
		if err := os.Setenv(netnsEnv, self); err != nil {
			return err
		}
	}
	return mountns.Enter()
}
