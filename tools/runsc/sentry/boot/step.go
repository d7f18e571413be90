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

package boot

// This file is kiln's addition to runsc. The build puts it beside the files of
// this package; nothing of gVisor is changed. It adds methods to the control
// server of a sandbox: a container whose root file system outlives its processes,
// so that what a step wrote can be taken out after the step has ended.

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"gvisor.dev/gvisor/kilnstart"
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/tmpfs"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
	"gvisor.dev/gvisor/pkg/urpc"
)

// stepRoots holds the mount namespaces of the containers that StepStart started,
// by container ID, and the settings of the kernel before the first of them.
var stepRoots struct {
	mu       sync.Mutex
	byCID    map[string]*vfs.MountNamespace
	settings string
}

// StepVersion is what the caller checks before it relies on these methods. It
// changes with their arguments.
const StepVersion = 4

// StepProbe tells StepVersion.
func (cm *containerManager) StepProbe(_ *struct{}, version *int) error {
	*version = StepVersion
	return nil
}

// StepStartArgs are the arguments of StepStart: those of StartSubcontainer, whose
// Conf is taken from the sandbox. With a terminal, its file is the first.
type StepStartArgs struct {
	StartArgs
}

// StepStart creates and starts a container and keeps its file systems until
// StepLayer or the end of the sandbox.
func (cm *containerManager) StepStart(args *StepStartArgs, _ *struct{}) error {
	if args.Spec == nil || args.Spec.Process == nil {
		return errors.New("step has no spec")
	}
	// The garbage of a short step is worth no collection.
	kilnstart.Hold(time.Second)
	create := CreateArgs{CID: args.CID}
	if args.Spec.Process.Terminal {
		if len(args.Files) == 0 {
			return errors.New("step has no terminal")
		}
		create.FilePayload = urpc.FilePayload{Files: args.Files[:1]}
		args.Files = args.Files[1:]
	}
	stepRoots.mu.Lock()
	if stepRoots.byCID == nil {
		stepRoots.byCID = map[string]*vfs.MountNamespace{}
		stepRoots.settings = cm.l.k.StepSettings()
	}
	stepRoots.mu.Unlock()
	if err := cm.CreateSubcontainer(&create, nil); err != nil {
		return err
	}
	// The process must not end before its file systems are held.
	cm.l.k.Pause()
	defer cm.l.k.Unpause()
	args.Conf = cm.l.root.conf
	if err := cm.StartSubcontainer(&args.StartArgs, nil); err != nil {
		return err
	}
	tg, err := cm.l.threadGroupFromID(execID{cid: args.CID})
	if err != nil {
		return err
	}
	mntns := tg.Leader().MountNamespace()
	if mntns == nil || !mntns.TryIncRef() {
		return fmt.Errorf("file systems of container %q are gone", args.CID)
	}
	stepRoots.mu.Lock()
	defer stepRoots.mu.Unlock()
	stepRoots.byCID[args.CID] = mntns
	return nil
}

// StepLayerArgs are the arguments of StepLayer.
type StepLayerArgs struct {
	CID string
	// Keep asks for a sandbox that can have another container.
	Keep bool
	// FilePayload has the file to write to.
	urpc.FilePayload
}

// StepLayerReply is what StepLayer returns.
type StepLayerReply struct {
	// Kept tells that nothing of the container is left, and that another one may be
	// started. Otherwise nothing runs in the sandbox any more.
	Kept bool
}

// StepLayer ends everything that runs in a container and writes what that changed in
// its root file system.
func (cm *containerManager) StepLayer(args *StepLayerArgs, reply *StepLayerReply) error {
	if len(args.Files) != 1 {
		return errors.New("want one file to write to")
	}
	stepRoots.mu.Lock()
	mntns := stepRoots.byCID[args.CID]
	delete(stepRoots.byCID, args.CID)
	stepRoots.mu.Unlock()
	if mntns == nil {
		return fmt.Errorf("container %q was not started with StepStart", args.CID)
	}
	kept := args.Keep && cm.stepDestroy(args.CID)
	if !kept {
		cm.l.k.Pause() // for good
	}
	ctx := cm.l.k.SupervisorContext()
	overlay, err := stepLayer(ctx, mntns, args.Files[0])
	if err != nil {
		return err
	}
	if kept {
		mntns.DecRef(ctx)
		overlay.StepForget(ctx)
		reply.Kept = cm.stepForget(ctx)
		cm.l.k.MemoryFile().StepRelease()
	}
	return nil
}

// stepOverlay is what kiln adds to gVisor's overlay.
type stepOverlay interface {
	StepUpper() *vfs.Filesystem
	StepForget(ctx context.Context)
}

func stepLayer(ctx context.Context, mntns *vfs.MountNamespace, to *os.File) (stepOverlay, error) {
	root := mntns.Root(ctx)
	defer root.DecRef(ctx)
	overlay, ok := root.Mount().Filesystem().Impl().(stepOverlay)
	if !ok {
		return nil, errors.New("root file system is not an overlay")
	}
	upper := overlay.StepUpper()
	if upper == nil {
		return nil, errors.New("root file system is not writable")
	}
	return overlay, tmpfs.StepLayer(ctx, upper, to)
}

// stepPatience is how long the processes of a container may take to end.
const stepPatience = 2 * time.Second

// stepDestroy ends a container, and tells whether all its processes have gone.
func (cm *containerManager) stepDestroy(cid string) bool {
	done := make(chan error, 1)
	go func() { done <- cm.l.destroySubcontainer(cid) }()
	select {
	case err := <-done:
		if err != nil {
			return false
		}
	case <-time.After(stepPatience):
		return false
	}
	for _, t := range cm.l.k.TaskSet().Root.Tasks() {
		if t.ContainerID() == cid {
			return false
		}
	}
	return true
}

// stepForget has the kernel forget what a container left in it, and tells whether it
// could.
func (cm *containerManager) stepForget(ctx context.Context) bool {
	cm.l.mu.Lock()
	defer cm.l.mu.Unlock()
	return cm.l.k.StepSettings() == stepRoots.settings && cm.l.k.StepRenewIPC(ctx) == nil
}
