package gvisor

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// fileServer gives a sandbox one mount of its step. The mount is at no place of any
// mount namespace, so that nothing but what is below it can be reached through it.
// The sandbox gets its root as a descriptor, opens files below that by itself, and
// asks the server for what cannot be done that way: to open the root again, which
// has no parent directory, to connect to sockets, and for the extended attributes of
// symlinks and sockets.
//
// The messages are those of runsc's lisafs client: a length of 4 bytes, a kind of 2,
// and 2 of nothing, then the payload; numbers are little-endian. The sandbox is
// hostile: a message that is not understood ends the connection, and what it asks
// for does not outlive it.
type fileServer struct {
	root *os.File // of the mount, opened with O_PATH
	mode uint32   // of the root
	conn *net.UnixConn
	// theirs is the sandbox's end of the connection.
	theirs *os.File
	// sockets lets the sandbox connect to sockets of the mount.
	sockets bool
	done    chan struct{}

	// names are the paths below the root that the sandbox has walked to, by the
	// number that it knows them by; size is how long they are together.
	names map[uint64]string
	next  uint64
	size  int
}

// Kinds of messages.
const (
	msgError     = 0
	msgMount     = 1
	msgWalk      = 5
	msgOpen      = 7
	msgClose     = 9
	msgConnect   = 21
	msgGetXattr  = 25
	msgListXattr = 27
)

const (
	// rootNumber is the root's number.
	rootNumber = 1
	// inodeSize is the size of what describes a file: its number, and attributes
	// that the sandbox gets from the kernel instead.
	inodeSize = 8 + 144
	// maxRequest bounds a request, maxNames the paths that are kept.
	maxRequest = 1 << 20
	maxNames   = 1 << 20
)

// serveFiles starts a server of the mount whose root is root, which it owns. It ends
// with close.
func serveFiles(root *os.File, sockets bool) (_ *fileServer, err error) {
	s := &fileServer{root: root, sockets: sockets, done: make(chan struct{}), names: map[uint64]string{}, next: rootNumber + 1}
	defer func() {
		if err != nil {
			root.Close()
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(int(root.Fd()), &st); err != nil {
		return nil, err
	}
	s.mode = st.Mode & unix.S_IFMT
	ours, theirs, err := socketPair(unix.SOCK_STREAM)
	if err != nil {
		return nil, err
	}
	s.theirs = theirs
	if s.conn, err = unixConn(ours); err != nil {
		theirs.Close()
		return nil, err
	}
	go func() {
		defer close(s.done)
		defer s.conn.Close()
		_ = s.serve()
	}()
	return s, nil
}

// close ends the server. The sandbox must have ended, or it ends now.
func (s *fileServer) close() error {
	s.theirs.Close()
	s.conn.Close()
	<-s.done
	return s.root.Close()
}

// serve answers requests until the connection ends.
func (s *fileServer) serve() error {
	var head [8]byte
	for {
		if _, err := io.ReadFull(s.conn, head[:]); err != nil {
			return err
		}
		size, kind := binary.LittleEndian.Uint32(head[:]), binary.LittleEndian.Uint16(head[4:])
		if size > maxRequest {
			return errors.New("the request is too large")
		}
		payload := make([]byte, size)
		if _, err := io.ReadFull(s.conn, payload); err != nil {
			return err
		}
		req := &request{data: payload}
		reply, file, err := s.answer(kind, req)
		if req.short {
			return errors.New("the request is too short")
		}
		if err != nil {
			var errno unix.Errno
			if !errors.As(err, &errno) {
				errno = unix.EIO
			}
			kind, reply = msgError, binary.LittleEndian.AppendUint32(nil, uint32(errno))
		}
		err = s.send(kind, reply, file)
		if file != nil && file != s.root {
			file.Close()
		}
		if err != nil {
			return err
		}
	}
}

// send sends a message, with a duplicate of file if there is one.
func (s *fileServer) send(kind uint16, payload []byte, file *os.File) error {
	msg := binary.LittleEndian.AppendUint32(make([]byte, 0, 8+len(payload)), uint32(len(payload)))
	msg = binary.LittleEndian.AppendUint16(msg, kind)
	msg = append(append(msg, 0, 0), payload...)
	var rights []byte
	if file != nil {
		rights = unix.UnixRights(int(file.Fd()))
	}
	n, _, err := s.conn.WriteMsgUnix(msg, rights, nil)
	if err == nil && n < len(msg) {
		_, err = s.conn.Write(msg[n:])
	}
	return err
}

// answer returns the payload of the answer to a request, and a file to send with it.
func (s *fileServer) answer(kind uint16, req *request) ([]byte, *os.File, error) {
	switch kind {
	case msgMount:
		return s.mountReply(), s.root, nil
	case msgOpen:
		number, flags := req.uint64(), req.uint32()
		if number != rootNumber || req.short {
			return nil, nil, unix.EBADF
		}
		f, err := s.openRoot(flags)
		return make([]byte, 8), f, err
	case msgWalk:
		reply, err := s.walk(req)
		return reply, nil, err
	case msgClose:
		for range req.uint16() {
			number := req.uint64()
			s.size -= len(s.names[number])
			delete(s.names, number)
			if req.short {
				break
			}
		}
		return nil, nil, nil
	case msgGetXattr:
		reply, err := s.getXattr(req)
		return reply, nil, err
	case msgListXattr:
		reply, err := s.listXattr(req)
		return reply, nil, err
	case msgConnect:
		f, err := s.connect(req)
		return nil, f, err
	default:
		return nil, nil, unix.EOPNOTSUPP
	}
}

// mountReply describes the root and names the requests that are answered.
func (s *fileServer) mountReply() []byte {
	kinds := []uint16{msgError, msgMount, msgWalk, msgOpen, msgClose, msgGetXattr, msgListXattr}
	if s.sockets {
		kinds = append(kinds, msgConnect)
	}
	reply := appendInode(nil, rootNumber)
	reply = binary.LittleEndian.AppendUint32(reply, maxRequest)
	reply = binary.LittleEndian.AppendUint16(reply, uint16(len(kinds)))
	for _, k := range kinds {
		reply = binary.LittleEndian.AppendUint16(reply, k)
	}
	return reply
}

func appendInode(to []byte, number uint64) []byte {
	return append(binary.LittleEndian.AppendUint64(to, number), make([]byte, inodeSize-8)...)
}

// openRoot opens the root, which must be a directory or a regular file: to open
// anything else could have an effect of its own.
func (s *fileServer) openRoot(flags uint32) (*os.File, error) {
	if s.mode != unix.S_IFDIR && s.mode != unix.S_IFREG {
		return nil, unix.ENXIO
	}
	flags = flags&(unix.O_ACCMODE|unix.O_TRUNC) | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY
	fd, err := unix.Open(procPath(s.root), int(flags), 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "root"), nil
}

func procPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }
