package netns

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/sandbox"
)

// noWait is a context that is over.
var noWait = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// keep fills the pool and removes what was released, until stop. Filling comes
// first: a step waits for it, and for a removal only a slot does.
func (m *Manager) keep() {
	defer close(m.done)
	for {
		select {
		case <-m.stop:
			return
		case <-m.wake:
		}
		for m.turn() {
			select {
			case <-m.stop:
				return
			default:
			}
		}
	}
}

// turn does one thing, and reports whether there may be more to do.
func (m *Manager) turn() bool {
	m.mu.Lock()
	for _, mode := range []sandbox.NetworkMode{sandbox.NetworkNone, sandbox.NetworkEgress} {
		if !m.used[mode] || len(m.ready[mode]) >= ahead {
			continue
		}
		if mode == sandbox.NetworkEgress && len(m.slots) == 0 {
			continue
		}
		m.mu.Unlock()
		// No wait for a slot here: only a later turn could end it.
		n, err := m.create(noWait, mode)
		m.mu.Lock()
		if err != nil {
			// The next Acquire meets the error itself, and asks again.
			m.used[mode] = false
		} else {
			m.ready[mode] = append(m.ready[mode], n)
		}
		m.mu.Unlock()
		return true
	}
	if len(m.released) == 0 {
		m.mu.Unlock()
		return false
	}
	n := m.released[0]
	m.released = m.released[1:]
	m.mu.Unlock()
	if err := m.remove(n); err != nil {
		m.mu.Lock()
		m.failed = errors.Join(m.failed, err)
		m.mu.Unlock()
	}
	return true
}

func (m *Manager) remove(n *network) error {
	err := n.close()
	if n.slot < 0 {
		return err
	}
	gone := removeLink(m.host, m.claim.link(n.slot))
	if gone == nil {
		gone = m.filter.reset(n.slot)
	}
	if gone != nil {
		return errors.Join(err, gone) // the slot stays taken
	}
	m.slots <- n.slot
	return err
}

// Close implements sandbox.Networks. Namespaces that are still acquired lose
// their connection to the node, and end with their last process.
func (m *Manager) Close() error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		<-m.done
		return nil
	}
	m.closed = true
	m.mu.Unlock()
	close(m.stop)
	<-m.done
	m.making.Wait()

	// From here on this is the only goroutine that makes or removes anything.
	m.mu.Lock()
	all := m.released
	for _, pool := range m.ready {
		all = append(all, pool...)
	}
	for n := range m.open {
		all = append(all, n)
	}
	m.released, m.ready, m.open = nil, nil, map[*network]struct{}{}
	errs := []error{m.failed}
	m.mu.Unlock()
	for _, n := range all {
		errs = append(errs, n.close())
	}
	if len(m.slots) < slots {
		errs = append(errs, removeGroup(m.claim.group()))
	}
	m.host.Close()
	if m.egressReady {
		errs = append(errs,
			restoreForwarding(m.cfg.StateDir, claimPath(m.cfg.StateDir, m.claim.prefix)),
			m.filter.close())
	}
	errs = append(errs, m.claim.lock.Close())
	return errors.Join(errs...)
}

// removeGroup removes all devices of a link group at once.
func removeGroup(group uint32) error {
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(group)))
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove network devices: %w", err)
	}
	return nil
}
