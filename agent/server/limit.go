package server

import (
	"context"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

// The gRPC server has one limit for all services, which is that of BuildKit's; the
// build API gets its smaller one here.

func limitUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := checkSize(info.FullMethod, req); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func limitStream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	return next(srv, &limitedStream{ss, info.FullMethod})
}

type limitedStream struct {
	grpc.ServerStream
	method string
}

func (s *limitedStream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	return checkSize(s.method, m)
}

func checkSize(fullMethod string, m any) error {
	msg, ok := m.(proto.Message)
	if !ok || !strings.HasPrefix(fullMethod, "/"+agentv1.BuildService_ServiceDesc.ServiceName+"/") {
		return nil
	}
	if n := proto.Size(msg); n > maxBuildMessage {
		return status.Errorf(codes.ResourceExhausted, "the message has %d bytes, and %d is the limit; upload large sources with UploadSource", n, maxBuildMessage)
	}
	return nil
}
