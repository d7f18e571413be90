package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// domainContent is the content of the build store as one domain may see it: the
// blobs whose bytes it has had itself. All domains share the bytes on disk, but a
// digest alone gets nobody another's: a domain that does not have a blob has to
// bring it, and then the store keeps the one that is there.
//
// Without it a registry of the tenant's own could name any digest in a manifest
// and be given what another tenant pulled, and BuildKit's content service would
// list and read everything.
type domainContent struct {
	content.Store
	// label marks a blob as one that the domain has had.
	label string
	// prefix keeps ingests of two domains apart, so that none waits for, or can hold
	// up, another's.
	prefix string
}

func newDomainContent(store content.Store, d Domain) *domainContent {
	return &domainContent{Store: store, label: "kiln.build/content." + d.key(), prefix: d.key() + "|"}
}

// had is the value of a domain's label; the store keeps no label without one.
const had = "true"

func (s *domainContent) has(info content.Info) bool {
	_, ok := info.Labels[s.label]
	return ok
}

func notFound(d digest.Digest) error { return fmt.Errorf("content %s: %w", d, errdefs.ErrNotFound) }

// Info implements content.Store.
func (s *domainContent) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	info, err := s.Store.Info(ctx, d)
	if err != nil {
		return content.Info{}, err
	}
	if !s.has(info) {
		return content.Info{}, notFound(d)
	}
	return info, nil
}

// Update implements content.Store. What is said of the blob without naming fields
// never takes it from the domain, nor from another.
func (s *domainContent) Update(ctx context.Context, info content.Info, fieldpaths ...string) (content.Info, error) {
	now, err := s.Info(ctx, info.Digest)
	if err != nil {
		return content.Info{}, err
	}
	if len(fieldpaths) == 0 {
		labels := maps.Clone(now.Labels)
		maps.Copy(labels, info.Labels)
		info.Labels = labels
	}
	return s.Store.Update(ctx, info, fieldpaths...)
}

// Walk implements content.Store.
func (s *domainContent) Walk(ctx context.Context, fn content.WalkFunc, filters ...string) error {
	return s.Store.Walk(ctx, func(info content.Info) error {
		if !s.has(info) {
			return nil
		}
		return fn(info)
	}, filters...)
}

// Delete implements content.Store.
func (s *domainContent) Delete(ctx context.Context, d digest.Digest) error {
	if _, err := s.Info(ctx, d); err != nil {
		return err
	}
	return s.Store.Delete(ctx, d)
}

// ReaderAt implements content.Store.
func (s *domainContent) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	if _, err := s.Info(ctx, desc.Digest); err != nil {
		return nil, err
	}
	return s.Store.ReaderAt(ctx, desc)
}

// Status implements content.Store.
func (s *domainContent) Status(ctx context.Context, ref string) (content.Status, error) {
	st, err := s.Store.Status(ctx, s.prefix+ref)
	st.Ref = strings.TrimPrefix(st.Ref, s.prefix)
	return st, err
}

// ListStatuses implements content.Store.
func (s *domainContent) ListStatuses(ctx context.Context, filters ...string) ([]content.Status, error) {
	all, err := s.Store.ListStatuses(ctx)
	if err != nil {
		return nil, err
	}
	var own []content.Status
	for _, st := range all {
		ref, ok := strings.CutPrefix(st.Ref, s.prefix)
		if !ok {
			continue
		}
		st.Ref = ref
		match := len(filters) == 0
		for _, f := range filters {
			re, err := regexp.Compile(f)
			if err != nil {
				return nil, fmt.Errorf("filter %q: %w", f, errdefs.ErrInvalidArgument)
			}
			match = match || re.MatchString(ref)
		}
		if match {
			own = append(own, st)
		}
	}
	return own, nil
}

// Abort implements content.Store.
func (s *domainContent) Abort(ctx context.Context, ref string) error {
	return s.Store.Abort(ctx, s.prefix+ref)
}

// Writer implements content.Store. The store is told the digest only when the
// domain has the blob: it would not ask for the bytes of one that it has.
func (s *domainContent) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	if o.Ref == "" {
		return nil, fmt.Errorf("ref must not be empty: %w", errdefs.ErrInvalidArgument)
	}
	if o.Desc.Digest != "" {
		if _, err := s.Info(ctx, o.Desc.Digest); err == nil {
			return s.Store.Writer(ctx, content.WithRef(s.prefix+o.Ref), content.WithDescriptor(o.Desc))
		} else if !errdefs.IsNotFound(err) {
			return nil, err
		}
	}
	w, err := s.Store.Writer(ctx, content.WithRef(s.prefix+o.Ref))
	if err != nil {
		return nil, err
	}
	return &domainWriter{Writer: w, store: s, expected: o.Desc.Digest}, nil
}

// domainWriter marks what is written as the domain's.
type domainWriter struct {
	content.Writer
	store    *domainContent
	expected digest.Digest
}

// Write implements content.Writer. What a full disk has no room for is not kept to be
// gone on with, as it otherwise is: it would keep the disk full for everybody.
func (w *domainWriter) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	if errors.Is(err, syscall.ENOSPC) {
		if terr := w.Truncate(0); terr != nil {
			err = errors.Join(err, fmt.Errorf("discard what was received: %w", terr))
		}
	}
	return n, err
}

// Commit implements content.Writer.
func (w *domainWriter) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...content.Opt) error {
	if expected == "" {
		expected = w.expected
	}
	mark := func(info *content.Info) error {
		labels := maps.Clone(info.Labels)
		if labels == nil {
			labels = map[string]string{}
		}
		labels[w.store.label] = had
		info.Labels = labels
		return nil
	}
	// Copied, for the caller's slice may have room behind its end.
	err := w.Writer.Commit(ctx, size, expected, append(opts[:len(opts):len(opts)], mark)...)
	if !errdefs.IsAlreadyExists(err) {
		return err
	}
	// The bytes were all there and have this digest; others have had them too.
	d := expected
	if d == "" {
		d = w.Writer.Digest()
	}
	info := content.Info{Digest: d, Labels: map[string]string{w.store.label: had}}
	if _, uerr := w.store.Store.Update(ctx, info, "labels."+w.store.label); uerr != nil {
		return fmt.Errorf("mark content %s: %w", d, uerr)
	}
	return err
}

// Status implements content.Writer.
func (w *domainWriter) Status() (content.Status, error) {
	st, err := w.Writer.Status()
	st.Ref = strings.TrimPrefix(st.Ref, w.store.prefix)
	return st, err
}
