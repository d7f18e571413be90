package upper

import (
	"archive/tar"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Records of a file of which only the parts that hold data follow.
const (
	recordSize  = "KILN.size"
	recordParts = "KILN.parts"
)

// recordSocket marks an entry, which looks like a fifo, as a socket.
const recordSocket = "KILN.socket"

// maxParts bounds the parts of one file.
const maxParts = 1 << 16

// part is a range of a file that the stream has the content of.
type part struct{ offset, length int64 }

// partsOf returns the size of a file and what of it follows in the stream, in
// order and without overlap; together the parts are as long as the entry.
func partsOf(h *tar.Header) (size int64, parts []part, err error) {
	record, sparse := h.PAXRecords[recordSize]
	if !sparse {
		if h.Size == 0 {
			return 0, nil, nil
		}
		return h.Size, []part{{0, h.Size}}, nil
	}
	size, err = strconv.ParseInt(record, 10, 64)
	if err != nil || size < 0 {
		return 0, nil, fmt.Errorf("size %q of a file is not valid", clip(record))
	}
	list, ok := h.PAXRecords[recordParts]
	var end, total int64
	for ok && list != "" {
		var entry string
		entry, list, _ = strings.Cut(list, ",")
		offset, length, _ := strings.Cut(entry, "+")
		p := part{}
		if p.offset, err = strconv.ParseInt(offset, 10, 64); err == nil {
			p.length, err = strconv.ParseInt(length, 10, 64)
		}
		if err != nil || p.offset < end || p.length <= 0 || p.length > size-p.offset {
			return 0, nil, fmt.Errorf("part %q of a file is not valid", clip(entry))
		}
		if len(parts) == maxParts {
			return 0, nil, errors.New("a file has too many parts")
		}
		end, total = p.offset+p.length, total+p.length
		parts = append(parts, p)
	}
	if total != h.Size {
		return 0, nil, errors.New("the parts of a file are not as long as its entry")
	}
	return size, parts, nil
}
