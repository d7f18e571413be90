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

package kernel

// This file is kiln's addition to runsc: what a step could leave in the kernel of its
// sandbox for another one.

import (
	"fmt"

	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/nsfs"
	"gvisor.dev/gvisor/pkg/sentry/kernel/auth"
)

// StepRenewIPC has containers that are made from now on find no System V objects and
// message queues. Nobody may make one meanwhile.
func (k *Kernel) StepRenewIPC(ctx context.Context) error {
	ns := NewIPCNamespace(k.rootUserNamespace)
	if err := ns.InitPosixQueues(ctx, &k.vfs, auth.CredentialsFromContext(ctx)); err != nil {
		return fmt.Errorf("make message queues: %w", err)
	}
	ns.SetInode(nsfs.NewInode(ctx, k.nsfsMount, ns))
	old := k.rootIPCNamespace
	k.rootIPCNamespace = ns
	old.DecRef(ctx)
	return nil
}

// StepSettings describes everything in the kernel that a process of a container can set
// for those of other containers, by /proc/sys and system calls.
func (k *Kernel) StepSettings() string {
	uts := k.rootUTSNamespace
	out := fmt.Sprint(k.YAMAPtraceScope.Load(), k.MaxFDLimit.Load(), k.vfs.MountMax.Load(), uts.HostName(), uts.DomainName())
	stack := k.rootNetworkNamespace.Stack()
	if stack == nil {
		return out
	}
	receive, _ := stack.TCPReceiveBufferSize()
	send, _ := stack.TCPSendBufferSize()
	sack, _ := stack.TCPSACKEnabled()
	recovery, _ := stack.TCPRecovery()
	first, last := stack.PortRange()
	return out + fmt.Sprint(receive, send, sack, recovery, first, last)
}
