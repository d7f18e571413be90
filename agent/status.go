package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"

	"github.com/kiln-build/kiln/agent/queue"
	"github.com/kiln-build/kiln/agent/record"
	"github.com/kiln-build/kiln/agent/strategy"
	"github.com/kiln-build/kiln/agent/upload"
)

// errorDomain is the domain of every ErrorInfo.
const errorDomain = "agent.kiln.build"

// detailed returns a status with a detail.
func detailed(code codes.Code, message string, details ...protoadapt.MessageV1) error {
	st := status.New(code, strings.ToValidUTF8(message, "\uFFFD"))
	with, err := st.WithDetails(details...)
	if err != nil {
		return st.Err()
	}
	return with.Err()
}

// invalid is an error in one field.
func invalid(field, format string, args ...any) error {
	message := fmt.Sprintf(format, args...)
	return detailed(codes.InvalidArgument, field+": "+message, &errdetails.BadRequest{
		FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: field, Description: strings.ToValidUTF8(message, "\uFFFD")}},
	})
}

// ruled is an error with a reason that programs can act on, and what it is about.
func ruled(code codes.Code, reason, about, message string) error {
	info := &errdetails.ErrorInfo{Reason: reason, Domain: errorDomain}
	if about != "" {
		info.Metadata = map[string]string{"subject": strings.ToValidUTF8(about, "\uFFFD")}
	}
	return detailed(code, message, info)
}

// quota is an error about a limit that may have room later.
func quota(rule, message string) error {
	return detailed(codes.ResourceExhausted, message,
		&errdetails.QuotaFailure{Violations: []*errdetails.QuotaFailure_Violation{{Subject: rule, Description: message}}},
		&errdetails.ErrorInfo{Reason: strings.ToUpper(strings.ReplaceAll(rule, "-", "_")), Domain: errorDomain},
	)
}

func notFound(id string) error {
	return detailed(codes.NotFound, fmt.Sprintf("build_id: there is no build %q", id),
		&errdetails.ResourceInfo{ResourceType: "kiln.agent.v1.Build", ResourceName: strings.ToValidUTF8(id, "\uFFFD")},
		&errdetails.ErrorInfo{Reason: "BUILD_NOT_FOUND", Domain: errorDomain})
}

func unavailable() error {
	return ruled(codes.Unavailable, "DRAINING", "", "the agent of this node ends and takes no builds; try another node")
}

// statusOf makes a status of an error of the packages below.
func statusOf(err error) error {
	var denied *DeniedError
	var full *queue.FullError
	var large *queue.TooLargeError
	var mismatch *upload.MismatchError
	var limit *upload.LimitError
	var beyond *record.RangeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &denied):
		return deniedStatus(denied)
	case len(strategy.Fields(err)) > 0:
		return fieldsStatus(err)
	case errors.As(err, &full):
		return quota(full.Rule, full.Message)
	case errors.As(err, &large):
		return detailed(codes.FailedPrecondition, "spec.resources."+large.Resource+": "+large.Error(), &errdetails.PreconditionFailure{
			Violations: []*errdetails.PreconditionFailure_Violation{{Type: "NODE_TOO_SMALL", Subject: "spec.resources." + large.Resource, Description: large.Error()}},
		}, &errdetails.ErrorInfo{Reason: "NODE_TOO_SMALL", Domain: errorDomain, Metadata: map[string]string{"subject": "spec.resources." + large.Resource}})
	case errors.As(err, &mismatch):
		return ruled(codes.DataLoss, "UPLOAD_MISMATCH", "", mismatch.Message)
	case errors.Is(err, upload.ErrTakenOver):
		return ruled(codes.Aborted, "UPLOAD_TAKEN_OVER", "", "data: "+err.Error())
	case errors.As(err, &limit):
		return quota(limit.Rule, limit.Message)
	case errors.As(err, &beyond):
		return detailed(codes.OutOfRange, "offset: "+beyond.Error(), &errdetails.BadRequest{
			FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: "offset", Description: beyond.Error()}},
		}, &errdetails.ErrorInfo{Reason: "OFFSET_BEYOND_END", Domain: errorDomain})
	case errors.Is(err, record.ErrPageToken):
		return invalid("page_token", "%v", err)
	case errors.Is(err, record.ErrDamaged):
		return ruled(codes.DataLoss, "RECORD_DAMAGED", "", err.Error())
	case errors.Is(err, record.ErrClosed):
		return ruled(codes.Unavailable, "CLOSED", "", "the agent of this node has ended; ask again when it is back")
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return quota("disk-free", "the node's disk is full: "+err.Error())
	case errors.Is(err, context.Canceled):
		return ruled(codes.Canceled, "CANCELED", "", err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		return ruled(codes.DeadlineExceeded, "DEADLINE_EXCEEDED", "", err.Error())
	}
	if st, ok := status.FromError(err); ok {
		return st.Err()
	}
	return ruled(codes.Internal, "INTERNAL", "", err.Error())
}

func deniedStatus(denied *DeniedError) error {
	details := []protoadapt.MessageV1{}
	bad := &errdetails.BadRequest{}
	for _, r := range denied.Rules {
		details = append(details, &errdetails.ErrorInfo{Reason: "POLICY_DENIED", Domain: errorDomain, Metadata: map[string]string{
			"policy": strings.ToValidUTF8(r.Policy, "\uFFFD"), "field": strings.ToValidUTF8(r.Field, "\uFFFD"), "rule": strings.ToValidUTF8(r.Rule, "\uFFFD"),
		}})
		bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{
			Field: strings.ToValidUTF8(r.Field, "\uFFFD"), Description: strings.ToValidUTF8(r.Rule, "\uFFFD"),
		})
	}
	return detailed(codes.PermissionDenied, denied.Error(), append(details, bad)...)
}

func fieldsStatus(err error) error {
	bad := &errdetails.BadRequest{}
	for _, f := range strategy.Fields(err) {
		bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{
			Field: strings.ToValidUTF8(f.Field, "\uFFFD"), Description: strings.ToValidUTF8(f.Message, "\uFFFD"),
		})
	}
	return detailed(codes.InvalidArgument, err.Error(), bad)
}
