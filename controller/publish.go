package controller

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"

	admissionregv1 "k8s.io/api/admissionregistration/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/kiln-build/kiln/controller/config"
)

// publisher returns a function that tells the API server which CAs to accept when it
// calls the controller. An object that is not installed is left alone.
func publisher(c client.Client, cfg *config.Controller) func(ctx context.Context, bundle []byte) error {
	return func(ctx context.Context, bundle []byte) error {
		if err := publishWebhook(ctx, c, cfg.Webhook.Configuration, bundle); err != nil {
			return err
		}
		return publishAPIService(ctx, c, cfg.Subresources.APIService, bundle)
	}
}

func publishWebhook(ctx context.Context, c client.Client, name string, bundle []byte) error {
	w := &admissionregv1.ValidatingWebhookConfiguration{}
	if err := c.Get(ctx, types.NamespacedName{Name: name}, w); err != nil {
		if client.IgnoreNotFound(err) == nil {
			return nil
		}
		return fmt.Errorf("read ValidatingWebhookConfiguration %q: %w", name, err)
	}
	before, changed := w.DeepCopy(), false
	for i := range w.Webhooks {
		if cc := &w.Webhooks[i].ClientConfig; !bytes.Equal(cc.CABundle, bundle) {
			cc.CABundle, changed = bundle, true
		}
	}
	if !changed {
		return nil
	}
	if err := c.Patch(ctx, w, client.MergeFrom(before)); err != nil {
		return fmt.Errorf("write ValidatingWebhookConfiguration %q: %w", name, err)
	}
	return nil
}

func publishAPIService(ctx context.Context, c client.Client, name string, bundle []byte) error {
	s := &unstructured.Unstructured{}
	s.SetGroupVersionKind(schema.GroupVersionKind{Group: "apiregistration.k8s.io", Version: "v1", Kind: "APIService"})
	if err := c.Get(ctx, types.NamespacedName{Name: name}, s); err != nil {
		if client.IgnoreNotFound(err) == nil {
			return nil
		}
		return fmt.Errorf("read APIService %q: %w", name, err)
	}
	encoded := base64.StdEncoding.EncodeToString(bundle)
	if was, _, _ := unstructured.NestedString(s.Object, "spec", "caBundle"); was == encoded {
		return nil
	}
	before := s.DeepCopy()
	if err := unstructured.SetNestedField(s.Object, encoded, "spec", "caBundle"); err != nil {
		return fmt.Errorf("write APIService %q: %w", name, err)
	}
	if err := c.Patch(ctx, s, client.MergeFrom(before)); err != nil {
		return fmt.Errorf("write APIService %q: %w", name, err)
	}
	return nil
}
