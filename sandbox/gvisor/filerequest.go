package gvisor

import (
	"bytes"
	"encoding/binary"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// request is the payload of a request to a fileServer. Its methods take values off
// its front; short is set when there was too little.
type request struct {
	data  []byte
	short bool
}

func (r *request) take(n int) []byte {
	if len(r.data) < n {
		r.short, r.data = true, nil
		return make([]byte, n)
	}
	out := r.data[:n]
	r.data = r.data[n:]
	return out
}

func (r *request) uint16() uint16 { return binary.LittleEndian.Uint16(r.take(2)) }
func (r *request) uint32() uint32 { return binary.LittleEndian.Uint32(r.take(4)) }
func (r *request) uint64() uint64 { return binary.LittleEndian.Uint64(r.take(8)) }
func (r *request) string() string { return string(r.take(int(r.uint16()))) }

// walk gives the file at a path below the root a number.
func (s *fileServer) walk(req *request) ([]byte, error) {
	from, count := req.uint64(), req.uint16()
	var names []string
	if from != rootNumber {
		above, ok := s.names[from]
		if !ok {
			return nil, unix.EBADF
		}
		names = append(names, above)
	}
	for range count {
		name := req.string()
		if req.short || name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
			return nil, unix.EINVAL
		}
		names = append(names, name)
	}
	path := strings.Join(names, "/")
	if count == 0 || len(path) > unix.PathMax {
		return nil, unix.EINVAL
	}
	if s.size+len(path) > maxNames {
		return nil, unix.EMFILE
	}
	f, err := s.open(path)
	if err != nil {
		return nil, err
	}
	f.Close()
	number := s.next
	s.next++
	s.names[number] = path
	s.size += len(path)
	// All went well, and this is what is on the way; only the last has a number.
	reply := binary.LittleEndian.AppendUint16([]byte{0}, count)
	for i := range count {
		if i < count-1 {
			reply = appendInode(reply, 0)
		} else {
			reply = appendInode(reply, number)
		}
	}
	return reply, nil
}

// open opens what is at a path below the root, only to name it. No symlink is
// followed.
func (s *fileServer) open(path string) (*os.File, error) {
	fd, err := unix.Openat2(int(s.root.Fd()), path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "file"), nil
}

// on calls do with a path of the file that has a number.
func (s *fileServer) on(number uint64, do func(path string) error) error {
	if number == rootNumber {
		return do(procPath(s.root))
	}
	name, ok := s.names[number]
	if !ok {
		return unix.EBADF
	}
	f, err := s.open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return do(procPath(f))
}

// hidden tells whether a sandbox may not see an attribute: these are for the node's
// root alone.
func hidden(attr string) bool { return strings.HasPrefix(attr, "trusted.") }

func (s *fileServer) getXattr(req *request) ([]byte, error) {
	number, _, name := req.uint64(), req.uint32(), req.string()
	if req.short || name == "" || strings.Contains(name, "\x00") {
		return nil, unix.EINVAL
	}
	if hidden(name) {
		return nil, unix.EPERM
	}
	value := make([]byte, 1<<16-1) // what fits into the answer
	err := s.on(number, func(path string) error {
		n, err := unix.Getxattr(path, name, value)
		value = value[:max(n, 0)]
		return err
	})
	return appendString(nil, string(value)), err
}

func (s *fileServer) listXattr(req *request) ([]byte, error) {
	number := req.uint64()
	list := make([]byte, 1<<16)
	err := s.on(number, func(path string) error {
		n, err := unix.Listxattr(path, list)
		list = list[:max(n, 0)]
		return err
	})
	if err != nil {
		return nil, err
	}
	var names []byte
	count := uint16(0)
	for name := range bytes.SplitSeq(list, []byte{0}) {
		if len(name) > 0 && !hidden(string(name)) {
			names = appendString(names, string(name))
			count++
		}
	}
	return append(binary.LittleEndian.AppendUint16(nil, count), names...), nil
}

func appendString(to []byte, s string) []byte {
	return append(binary.LittleEndian.AppendUint16(to, uint16(len(s))), s...)
}

// connect connects to a socket of the mount.
func (s *fileServer) connect(req *request) (*os.File, error) {
	number, kind := req.uint64(), req.uint32()
	if !s.sockets || req.short {
		return nil, unix.EOPNOTSUPP
	}
	switch kind {
	case 0:
		kind = unix.SOCK_STREAM
	case unix.SOCK_STREAM, unix.SOCK_DGRAM, unix.SOCK_SEQPACKET:
	default:
		return nil, unix.EINVAL
	}
	fd, err := unix.Socket(unix.AF_UNIX, int(kind)|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	err = s.on(number, func(path string) error { return unix.Connect(fd, &unix.SockaddrUnix{Name: path}) })
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "socket"), nil
}
