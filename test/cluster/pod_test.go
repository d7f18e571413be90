package cluster

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

var podNumber atomic.Int32

// pod describes a Pod that runs one command of busybox on a node, once. It is not
// created yet.
func (b *bench) pod(n *Machine, command ...string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("pod%d", podNumber.Add(1)), Namespace: metav1.NamespaceDefault},
		Spec: corev1.PodSpec{
			NodeName:                      n.Name(),
			RestartPolicy:                 corev1.RestartPolicyNever,
			TerminationGracePeriodSeconds: new(int64),
			Containers:                    []corev1.Container{{Name: "main", Image: b.Image("busybox"), Command: command}},
		},
	}
}

// podsOnAll describes one such Pod for every node.
func (b *bench) podsOnAll(command ...string) []*corev1.Pod {
	var pods []*corev1.Pod
	for _, n := range b.Nodes() {
		pods = append(pods, b.pod(n, command...))
	}
	return pods
}

// create creates Pods, unless they are already.
func (b *bench) create(t *testing.T, pods ...*corev1.Pod) {
	t.Helper()
	for _, pod := range pods {
		_, err := b.client.CoreV1().Pods(pod.Namespace).Create(b.ctx, pod, metav1.CreateOptions{})
		if !apierrors.IsAlreadyExists(err) {
			require.NoError(t, err)
		}
	}
}

// wait waits until the Pod is in a phase.
func (b *bench) wait(t *testing.T, pod *corev1.Pod, phase corev1.PodPhase) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		got, err := b.client.CoreV1().Pods(pod.Namespace).Get(b.ctx, pod.Name, metav1.GetOptions{})
		if err == nil && got.Status.Phase == phase {
			return
		}
		done := err == nil && (got.Status.Phase == corev1.PodSucceeded || got.Status.Phase == corev1.PodFailed)
		if done || time.Now().After(deadline) {
			require.NoError(t, err)
			t.Fatalf("Pod %s is not %s: %+v\n%s", pod.Name, phase, got.Status, b.logs(pod))
		}
		require.NoError(t, sleep(b.ctx, pollInterval))
	}
}

// finish creates the Pod if it is not yet, waits for its success and returns what
// it wrote.
func (b *bench) finish(t *testing.T, pod *corev1.Pod) string {
	t.Helper()
	b.create(t, pod)
	b.wait(t, pod, corev1.PodSucceeded)
	return b.logs(pod)
}

func (b *bench) logs(pod *corev1.Pod) string {
	data, err := b.client.CoreV1().Pods(pod.Namespace).GetLogs(pod.Name, &corev1.PodLogOptions{}).DoRaw(b.ctx)
	if err != nil {
		return err.Error()
	}
	return string(data)
}
