package sessions

import (
	"fmt"
	"io"
	"os"
	"path"

	"github.com/moby/buildkit/session/upload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// chunk is the size of a message in bytes.
const chunk = 1 << 20

// UploadURL returns the URL by which an engine asks the session for an upload.
func UploadURL(name string) string { return "http://buildkit-session/" + name }

// uploads sends files to the engine, as often as it asks.
type uploads struct{ loan *Loan }

// Register implements session.Attachable.
func (u *uploads) Register(s *grpc.Server) { upload.RegisterUploadServer(s, u) }

// Pull implements upload.UploadServer.
func (u *uploads) Pull(stream upload.Upload_PullServer) error {
	md, _ := metadata.FromIncomingContext(stream.Context())
	var name string
	if v := md.Get("urlpath"); len(v) > 0 {
		name = path.Base(v[0])
	}
	file, ok := u.loan.Uploads[name]
	if !ok || !u.loan.open() {
		return status.Error(codes.NotFound, "the build has no such upload")
	}
	f, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("read uploaded source: %w", err)
	}
	defer f.Close()
	buf := make([]byte, chunk)
	for {
		n, err := f.Read(buf)
		if n > 0 {
			if err := stream.SendMsg(&upload.BytesMessage{Data: buf[:n]}); err != nil {
				return fmt.Errorf("send uploaded source: %w", err)
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read uploaded source: %w", err)
		}
	}
}
