package containerd

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
)

// labelOwner is on every lease of kiln and tells whose it is.
const labelOwner = "kiln.build/owner"

// leaseLimit is how long a lease lasts when nobody deletes it: containerd then
// collects what it held.
const leaseLimit = 24 * time.Hour

// undoTimeout bounds what is undone after a failure, when the operation's own
// context may have ended.
const undoTimeout = 30 * time.Second

// newLease makes a lease that ends with delete. The context is for calls whose
// results the lease is to hold.
func (n *Node) newLease(ctx context.Context) (context.Context, leases.Lease, error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	n.reconnect(ctx)
	n.payDebts(ctx)
	id := make([]byte, 12)
	rand.Read(id) // never fails
	name := "kiln-" + hex.EncodeToString(id)
	lease, err := n.client.LeasesService().Create(ctx,
		leases.WithID(name),
		leases.WithLabel(labelOwner, n.owner),
		leases.WithExpiration(leaseLimit))
	if err != nil {
		n.owe(leases.Lease{ID: name}) // it may be there: only the answer is missing
		return nil, leases.Lease{}, n.failed("make a lease", err)
	}
	return leases.WithLease(ctx, lease.ID), lease, nil
}

// deleteLease ends a lease. With collect it returns when what the lease alone held
// is gone.
func (n *Node) deleteLease(ctx context.Context, lease leases.Lease, collect bool) error {
	ctx = namespaces.WithNamespace(context.WithoutCancel(ctx), namespace)
	ctx, cancel := context.WithTimeout(ctx, undoTimeout)
	defer cancel()
	var opts []leases.DeleteOpt
	if collect {
		opts = append(opts, leases.SynchronousDelete)
	}
	if err := n.client.LeasesService().Delete(ctx, lease, opts...); err != nil && !errdefs.IsNotFound(err) {
		n.owe(lease)
		return n.failed("delete lease "+lease.ID, err)
	}
	return nil
}

// maxDebts bounds the leases that are remembered; those beyond it expire.
const maxDebts = 1024

// owe remembers a lease that could not be deleted, as when containerd is not there.
func (n *Node) owe(lease leases.Lease) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.debts) < maxDebts {
		n.debts = append(n.debts, lease)
	}
}

// payDebts deletes leases that could not be deleted before, and what was made for them.
func (n *Node) payDebts(ctx context.Context) {
	n.mu.Lock()
	debts := n.debts
	n.debts = nil
	n.mu.Unlock()
	for _, lease := range debts {
		if err := n.removeViews(ctx, lease); err != nil {
			n.owe(lease)
			continue
		}
		_ = n.deleteLease(ctx, lease, false) // it is owed again when this fails
	}
}

// removeLeftHolds deletes what an earlier process of the same owner held, and what
// it had made for that.
func (n *Node) removeLeftHolds(ctx context.Context) error {
	ctx = namespaces.WithNamespace(ctx, namespace)
	left, err := n.client.LeasesService().List(ctx, fmt.Sprintf("labels.%q==%q", labelOwner, n.owner))
	if err != nil {
		return n.failed("list leases", err)
	}
	var errs []error
	for _, lease := range left {
		errs = append(errs, n.removeViews(ctx, lease), n.deleteLease(ctx, lease, false))
	}
	return errors.Join(errs...)
}

// removeViews removes the views of snapshots that lease holds, which are those
// that kiln made.
func (n *Node) removeViews(ctx context.Context, lease leases.Lease) error {
	held, err := n.client.LeasesService().ListResources(ctx, lease)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return n.failed("list what lease "+lease.ID+" holds", err)
	}
	var errs []error
	for _, r := range held {
		name, ok := strings.CutPrefix(r.Type, "snapshots/")
		if !ok || !strings.HasPrefix(r.ID, lease.ID) {
			continue
		}
		errs = append(errs, n.removeView(ctx, n.client.SnapshotService(name), r.ID))
	}
	return errors.Join(errs...)
}

func (n *Node) removeView(ctx context.Context, sn snapshots.Snapshotter, key string) error {
	if err := sn.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
		return n.failed("remove view "+key, err)
	}
	return nil
}
