package admission

import (
	"context"
	"errors"
	"net/http"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/kiln-build/kiln/api/build/v1alpha1"
	"github.com/kiln-build/kiln/controller/inputs"
	"github.com/kiln-build/kiln/controller/translate"
)

// Path of the webhook for Builds.
const Path = "/validate-builds"

// Webhook answers the API server's questions about new Builds. A Build that names a
// RuntimeClass which does not exist is let in: it may appear, and the controller asks again.
type Webhook struct {
	evaluator *Evaluator
	decoder   admission.Decoder
}

// NewWebhook returns a handler for Path.
func NewWebhook(e *Evaluator, scheme *runtime.Scheme) *Webhook {
	return &Webhook{evaluator: e, decoder: admission.NewDecoder(scheme)}
}

// Handle answers one question. What cannot be answered is refused.
func (w *Webhook) Handle(ctx context.Context, req admission.Request) admission.Response {
	if req.Operation != admissionv1.Create {
		return admission.Allowed("") // The spec cannot change.
	}
	b := &v1alpha1.Build{}
	if err := w.decoder.Decode(req, b); err != nil {
		return admission.Errored(http.StatusBadRequest, err)
	}
	b.Namespace = req.Namespace
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := translate.Validate(b); err != nil {
		return refuse(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, err)
	}
	_, err := w.evaluator.Evaluate(ctx, b)
	var missing *inputs.Missing
	var invalid *inputs.Invalid
	var refused Refusals
	switch {
	case err == nil:
		return admission.Allowed("")
	case errors.As(err, &missing):
		return admission.Allowed("").WithWarnings(missing.Error())
	case errors.As(err, &invalid):
		return refuse(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, err)
	case errors.As(err, &refused):
		return refuse(http.StatusForbidden, metav1.StatusReasonForbidden, err)
	}
	return admission.Errored(http.StatusInternalServerError, err)
}

func refuse(code int32, reason metav1.StatusReason, err error) admission.Response {
	return admission.Response{AdmissionResponse: admissionv1.AdmissionResponse{
		Result: &metav1.Status{Code: code, Reason: reason, Message: err.Error()},
	}}
}
