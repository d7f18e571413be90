package subresources

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/api/build/v1alpha1"
)

// partGrace is how long the agent may take to store what has arrived of a part whose
// client has gone.
const partGrace = 5 * time.Second

// content is what a request brings of an archive: all of it, or a part.
type content struct {
	part   bool
	offset int64 // of the part
	length int64 // of the body
	total  int64 // of the archive
}

// contentRange is the header of a part: "bytes FIRST-LAST/TOTAL", or "bytes */TOTAL" of a
// request that only asks how much has arrived. The numbers fit into 63 bits.
var contentRange = regexp.MustCompile(`^bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18})$`)

// contentOf tells what a request brings. The error is a *problem.
func contentOf(r *http.Request) (content, error) {
	c := content{length: r.ContentLength, total: r.ContentLength}
	if c.length < 0 {
		return c, &problem{http.StatusLengthRequired, metav1.StatusReasonBadRequest, "the upload must say its length"}
	}
	header := r.Header.Values("Content-Range")
	if len(header) == 0 {
		return c, nil
	}
	m := contentRange.FindStringSubmatch(header[0])
	if len(header) > 1 || m == nil {
		return c, badRange("want \"bytes FIRST-LAST/TOTAL\" or \"bytes */TOTAL\", not %.80q", header)
	}
	c.part, c.total = true, number(m[3])
	if m[1] == "" {
		if c.length > 0 {
			return c, badRange("%q asks how much has arrived, and comes with %d bytes", header[0], c.length)
		}
		return c, nil
	}
	first, last := number(m[1]), number(m[2])
	if last < first || last >= c.total || last-first+1 != c.length {
		return c, badRange("%q does not fit to itself or to the %d bytes that come", header[0], c.length)
	}
	c.offset = first
	return c, nil
}

// number is that of at most 18 digits.
func number(digits string) int64 {
	n, _ := strconv.ParseInt(digits, 10, 64)
	return n
}

func badRange(format string, args ...any) error {
	return &problem{http.StatusBadRequest, metav1.StatusReasonBadRequest, "Content-Range: " + fmt.Sprintf(format, args...)}
}

// sendPart is send for a part, of which the agent keeps what has arrived also when the
// client is cut off.
func (s *Server) sendPart(ctx context.Context, node string, head *agentv1.UploadHeader, body io.Reader) (*agentv1.UploadSourceResponse, error) {
	sending, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(partGrace, cancel) })
	defer stop()
	up, _, err := s.pour(sending, node, head, body)
	if err != nil {
		return nil, err
	}
	taken, err := up.CloseAndRecv()
	if err != nil {
		return nil, fromGRPC(err)
	}
	return taken, nil
}

// answerPart says how much of the archive has arrived.
func answerPart(w http.ResponseWriter, c content, received int64) {
	w.Header().Set(v1alpha1.UploadOffsetHeader, strconv.FormatInt(received, 10))
	if c.length > 0 && received != c.offset+c.length {
		writeStatus(w, http.StatusRequestedRangeNotSatisfiable, metav1.StatusReason("RangeNotSatisfiable"),
			fmt.Sprintf("the part begins at %d; %d of %d bytes have arrived", c.offset, received, c.total))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusAccepted)
	writeJSON(&metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess, Code: http.StatusAccepted,
		Message: fmt.Sprintf("%d of %d bytes have arrived", received, c.total)})(w, nil)
}
