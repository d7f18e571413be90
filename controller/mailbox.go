package controller

import (
	"context"
	"sync"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// mailbox carries names from many goroutines to the reconciler's queue. Putting a name
// never blocks, and a name that is waiting is not put twice.
type mailbox struct {
	events chan event.TypedGenericEvent[types.NamespacedName]
	wake   chan struct{}

	// mu guards waiting.
	mu      sync.Mutex
	waiting map[types.NamespacedName]struct{}
}

func newMailbox() *mailbox {
	return &mailbox{events: make(chan event.TypedGenericEvent[types.NamespacedName]), wake: make(chan struct{}, 1), waiting: map[types.NamespacedName]struct{}{}}
}

func (m *mailbox) put(name types.NamespacedName) {
	m.mu.Lock()
	m.waiting[name] = struct{}{}
	m.mu.Unlock()
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Start delivers until ctx ends.
func (m *mailbox) Start(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.wake:
		}
		m.mu.Lock()
		names := m.waiting
		m.waiting = map[types.NamespacedName]struct{}{}
		m.mu.Unlock()
		for name := range names {
			select {
			case <-ctx.Done():
				return nil
			case m.events <- event.TypedGenericEvent[types.NamespacedName]{Object: name}:
			}
		}
	}
}

func enqueueName(_ context.Context, e event.TypedGenericEvent[types.NamespacedName], q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
	q.Add(reconcile.Request{NamespacedName: e.Object})
}
