package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// pollInterval is how often a wait looks again.
const pollInterval = 100 * time.Millisecond

// retry calls f until it returns no error. It gives up when the context ends, or
// when a component of the cluster does.
func (c *Cluster) retry(ctx context.Context, f func() error) error {
	for {
		last := f()
		if last == nil {
			return nil
		}
		if err := c.checkAlive(); err != nil {
			return err
		}
		if err := sleep(ctx, pollInterval); err != nil {
			return errors.Join(err, last)
		}
	}
}

func (c *Cluster) client() (*kubernetes.Clientset, func(), error) {
	cfg, err := c.RESTConfig()
	if err != nil {
		return nil, nil, err
	}
	cfg.Timeout = 5 * time.Second
	cfg.QPS = -1 // no limit
	hc, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return nil, nil, err
	}
	client, err := kubernetes.NewForConfigAndClient(cfg, hc)
	if err != nil {
		return nil, nil, fmt.Errorf("make client of cluster: %w", err)
	}
	return client, hc.CloseIdleConnections, nil
}

// waitAPI waits until the API server serves.
func (c *Cluster) waitAPI(ctx context.Context) error {
	client, closeClient, err := c.client()
	if err != nil {
		return err
	}
	defer closeClient()
	err = c.retry(ctx, func() error {
		_, err := client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("wait for API server: %w", err)
	}
	return nil
}

// WaitReady waits until every component runs, the API server serves, Pods can be
// created, and every node says that it is ready. A node that was just disturbed
// may still say so from before.
func (c *Cluster) WaitReady(ctx context.Context) error {
	if err := c.waitAPI(ctx); err != nil {
		return err
	}
	client, closeClient, err := c.client()
	if err != nil {
		return err
	}
	defer closeClient()
	for _, n := range c.Nodes() {
		err := c.retry(ctx, func() error {
			node, err := client.CoreV1().Nodes().Get(ctx, n.name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			return nodeReady(node)
		})
		if err != nil {
			k := &Component{n, Kubelet}
			return fmt.Errorf("wait for node %s: %w; the end of kubelet's log:\n%s", n.name, err, k.logTail())
		}
	}
	// Pods of a namespace are refused until it has this account.
	err = c.retry(ctx, func() error {
		_, err := client.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	if err != nil {
		return fmt.Errorf("wait for service account: %w", err)
	}
	return c.checkAlive()
}

// nodeReady returns an error unless Pods are scheduled to the node.
func nodeReady(node *corev1.Node) error {
	if len(node.Spec.Taints) > 0 {
		return fmt.Errorf("it has the taint %s", node.Spec.Taints[0].Key)
	}
	for _, cond := range node.Status.Conditions {
		if cond.Type == corev1.NodeReady && cond.Status != corev1.ConditionTrue {
			return fmt.Errorf("it is not ready: %s", cond.Message)
		}
		if cond.Type == corev1.NodeReady {
			return nil
		}
	}
	return errors.New("it has not said that it is ready")
}
