package engine

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// proxiedServices are what stock clients of BuildKit call.
var proxiedServices = []string{
	"moby.buildkit.v1.Control",
	"moby.buildkit.v1.frontend.LLBBridge",
	"containerd.services.content.v1.Content",
	"opentelemetry.proto.collector.trace.v1.TraceService",
}

// Pick returns the engine that serves a call, by who calls. release is called
// when the call has ended.
type Pick func(ctx context.Context) (e *Engine, release func(), err error)

// Proxy returns options for a gRPC server that make it serve BuildKit's own API
// beside its other services, each call by the engine that pick returns for it.
// The server's stream interceptors run before pick.
func Proxy(pick Pick) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxMessageSize), grpc.MaxSendMsgSize(maxMessageSize),
		grpc.UnknownServiceHandler(func(_ any, in grpc.ServerStream) error {
			method, ok := grpc.MethodFromServerStream(in)
			if !ok || !proxied(method) {
				return status.Errorf(codes.Unimplemented, "unknown method %s", method)
			}
			e, release, err := pick(in.Context())
			if err != nil {
				return err
			}
			defer release()
			return e.forward(method, in)
		}),
	}
}

func proxied(method string) bool {
	for _, s := range proxiedServices {
		if strings.HasPrefix(method, "/"+s+"/") {
			return true
		}
	}
	return false
}

// forward passes one call on to the engine, and what it answers back. Messages
// are passed as they are: those of emptypb.Empty keep all fields as unknown ones.
func (e *Engine) forward(method string, in grpc.ServerStream) error {
	conn, err := e.connection()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(outgoing(in.Context()))
	defer cancel()
	desc := &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
	out, err := conn.NewStream(ctx, desc, method)
	if err != nil {
		return err
	}
	go func() {
		for {
			var m emptypb.Empty
			if err := in.RecvMsg(&m); err != nil {
				if errors.Is(err, io.EOF) {
					_ = out.CloseSend()
				} else {
					cancel()
				}
				return
			}
			if out.SendMsg(&m) != nil {
				return // the answer tells why
			}
		}
	}()
	header, err := out.Header()
	if err == nil && header != nil {
		err = in.SendHeader(header)
	}
	for err == nil {
		var m emptypb.Empty
		if err = out.RecvMsg(&m); err == nil {
			err = in.SendMsg(&m)
		}
	}
	in.SetTrailer(out.Trailer())
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// connection returns the engine's connection to itself, which forwarded calls
// share.
func (e *Engine) connection() (*grpc.ClientConn, error) {
	e.connOnce.Do(func() {
		e.conn, e.connErr = grpc.NewClient("passthrough:engine",
			grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return e.dial(ctx, addr) }),
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageSize), grpc.MaxCallSendMsgSize(maxMessageSize)))
	})
	return e.conn, e.connErr
}

// outgoing returns ctx with the metadata of the incoming call, without what
// concerns its connection and its caller's credentials.
func outgoing(ctx context.Context) context.Context {
	md, _ := metadata.FromIncomingContext(ctx)
	out := metadata.MD{}
	for k, v := range md {
		switch {
		case strings.HasPrefix(k, ":"), strings.HasPrefix(k, "grpc-"), k == "authorization", k == "content-type", k == "user-agent":
		default:
			out[k] = v
		}
	}
	return metadata.NewOutgoingContext(ctx, out)
}
