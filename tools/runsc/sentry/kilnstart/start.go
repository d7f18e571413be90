// Copyright The kiln Authors.
//
// Licensed under the Apache License, Version 2.0 (the "License");
// you may not use this file except in compliance with the License.
// You may obtain a copy of the License at
//
//     http://www.apache.org/licenses/LICENSE-2.0
//
// Unless required by applicable law or agreed to in writing, software
// distributed under the License is distributed on an "AS IS" BASIS,
// WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
// See the License for the specific language governing permissions and
// limitations under the License.

// Package kilnstart is initialised before the packages of gVisor. It keeps what those
// cost out of where they are not needed.
package kilnstart

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func init() {
	if len(os.Args) > 0 && os.Args[0] == "runsc-sandbox" {
		// A start makes little garbage, and a step often ends before a collection
		// would be worth its time.
		Hold(10 * time.Second)
		afterCollections()
	}
	if len(os.Args) == 4 && os.Args[1] == "umount" {
		if name, ok := strings.CutPrefix(os.Args[2], "--sync-fd="); ok {
			if err := unmount(name, os.Args[3]); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(128)
			}
			os.Exit(0)
		}
	}
}

// unmount is what `runsc umount` does: every sandbox runs it once.
func unmount(fdName, dir string) error {
	fd, err := strconv.Atoi(fdName)
	if err != nil {
		return fmt.Errorf("umount: %w", err)
	}
	if n, err := syscall.Read(fd, make([]byte, 1)); n != 1 || err != nil {
		return fmt.Errorf("umount: read from descriptor %d: %d bytes, %v", fd, n, err)
	}
	if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
		return fmt.Errorf("umount %s: %w", dir, err)
	}
	return nil
}
