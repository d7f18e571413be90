package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"

	buildv1 "github.com/kiln-build/kiln/api/build/v1alpha1"
)

// A part of an upload is one request, which the API server ends after a minute or what
// its --request-timeout says. So parts are as large as the line takes in a few seconds.
const (
	firstPart = 4 << 20
	minPart   = 64 << 10
	maxPart   = 64 << 20
	// partGoal is how long a part is to take.
	partGoal = 4 * time.Second
	// partTimeout ends a part on a line that is dead and does not say so.
	partTimeout = 2 * time.Minute
)

// uploadPatience is how long an upload goes on of which nothing arrives any more.
const uploadPatience = 5 * time.Minute

// Upload sends the archive that the build's source names, which has size bytes. It
// sends it in parts, and goes on where it was when the connection was lost. It returns
// nil also when the build has its source from elsewhere.
func (c *Client) Upload(ctx context.Context, name string, archive io.ReaderAt, size int64) error {
	u := &uploading{
		client: c, archive: archive, size: size, patience: uploadPatience,
		url: c.streams.Put().Namespace(c.namespace).Resource(buildsResource).Name(name).SubResource("upload").URL().String(),
	}
	if err := u.run(ctx); err != nil {
		if ctx.Err() != nil {
			return err
		}
		if status(err) == http.StatusConflict && c.started(ctx, name) {
			return nil // the answer that said so was lost
		}
		return fmt.Errorf("upload source of build %s: %w", name, err)
	}
	return nil
}

// started tells whether the build has all that it needs.
func (c *Client) started(ctx context.Context, name string) bool {
	b, err := c.Get(ctx, name)
	return err == nil && (b.Status.StartTime != nil || !b.Ended())
}

// uploading is an upload that is under way.
type uploading struct {
	client   *Client
	url      string
	archive  io.ReaderAt
	size     int64
	patience time.Duration
}

// run sends parts until the server has everything.
func (u *uploading) run(ctx context.Context) error {
	var offset, part int64 = 0, firstPart
	var took time.Duration // the last part, also one that failed
	pause, progress := newPause(), time.Now()
	for ask := false; ; {
		n := min(part, u.size-offset)
		if ask {
			n = 0
		}
		began := time.Now()
		next, done, err := u.put(ctx, offset, n)
		if n > 0 {
			took = time.Since(began)
		}
		switch {
		case done:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil && !transient(err):
			return err
		case err == nil && next > offset:
			fitting := fit(part, next-offset, took)
			if ask {
				fitting = min(fitting, part) // the part was cut off
			}
			part = fitting
			pause, progress = newPause(), time.Now()
		case err == nil && ask && next < u.size:
			// It tells where to go on, and that nothing of the last part has arrived.
			part = max(part/4, minPart)
		default:
			if err == nil {
				err = fmt.Errorf("the server does not go on after byte %d", next)
			}
			if time.Since(progress) > u.patience {
				return fmt.Errorf("for %s nothing has arrived after byte %d of %d: %w", u.patience, offset, u.size, err)
			}
			if err := sleep(ctx, pause.Step()); err != nil {
				return err
			}
		}
		if err == nil {
			offset = next
		}
		// Of a part that was cut off, some may have arrived.
		ask = err != nil
	}
}

// newPause is how long to wait after failures.
func newPause() *wait.Backoff {
	return &wait.Backoff{Duration: pollInterval, Factor: 2, Jitter: 0.2, Steps: 10, Cap: 10 * time.Second}
}

// fit returns the size of the next part when n bytes of the last took so long.
func fit(part, n int64, took time.Duration) int64 {
	ideal := int64(float64(n) * float64(partGoal) / float64(max(took, time.Millisecond)))
	return min(max(ideal, part/4, minPart), 4*part, maxPart)
}

// put sends n bytes from an offset, or asks how many have arrived when n is 0, and
// returns that; done says that it is all.
func (u *uploading) put(ctx context.Context, offset, n int64) (next int64, done bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, partTimeout)
	defer cancel()
	// The transport closes a body that can be closed, and asks for another when the
	// server has not taken the first.
	body := func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(u.archive, offset, n)), nil }
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, u.url, http.NoBody)
	if err != nil {
		return 0, false, err
	}
	part := "*"
	if n > 0 {
		part = fmt.Sprintf("%d-%d", offset, offset+n-1)
		req.Body, _ = body()
		req.GetBody, req.ContentLength = body, n
	}
	req.Header.Set("Content-Range", fmt.Sprintf("bytes %s/%d", part, u.size))
	req.Header.Set("Content-Type", "application/octet-stream")
	req.Header.Set("Accept", "application/json")
	resp, err := u.client.http.Do(req)
	if err != nil {
		return 0, false, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return 0, false, err
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return u.size, true, nil
	case http.StatusAccepted, http.StatusRequestedRangeNotSatisfiable:
		next, err = strconv.ParseInt(resp.Header.Get(buildv1.UploadOffsetHeader), 10, 64)
		if err != nil || next < 0 || next > u.size {
			return 0, false, fmt.Errorf("the server answers %d and %s %.40q, which is no place in %d bytes", resp.StatusCode, buildv1.UploadOffsetHeader, resp.Header.Get(buildv1.UploadOffsetHeader), u.size)
		}
		return next, false, nil
	}
	return 0, false, refusal(resp.StatusCode, data)
}

// maxAnswer bounds the answer to an upload, in bytes.
const maxAnswer = 64 << 10

// refusal is the error that an answer says.
func refusal(code int, data []byte) error {
	answer := metav1.Status{}
	if json.Unmarshal(data, &answer) != nil || answer.Message == "" {
		return apierrors.NewGenericServerResponse(code, "put", schema.GroupResource{Group: buildv1.SubresourcesGroup, Resource: buildsResource}, "", string(data), 0, true)
	}
	answer.Code = int32(code)
	return &apierrors.StatusError{ErrStatus: answer}
}
