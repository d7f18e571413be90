package strategy

import (
	"os"
	"path"
	"strconv"
	"time"

	"github.com/moby/buildkit/util/staticfs"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
)

const (
	defaultFileMode = 0o644
	inlineDirMode   = os.ModeDir | 0o755
)

// inlineFS returns files as a directory in memory. Everything in it has the time
// epoch, in seconds since 1970.
func inlineFS(list []*agentv1.InlineFile, epoch int64) fsutil.FS {
	fs := staticfs.NewFS()
	modTime := time.Unix(epoch, 0).UnixNano()
	for _, f := range list {
		name, err := cleanRelative(f.GetPath())
		if err != nil || name == "." {
			continue
		}
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			fs.Add(dir, &types.Stat{Mode: uint32(inlineDirMode), ModTime: modTime}, nil)
		}
		mode := f.GetMode()
		if mode == 0 {
			mode = defaultFileMode
		}
		fs.Add(name, &types.Stat{Mode: mode & 0o777, ModTime: modTime}, f.GetContent())
	}
	return fs
}

func isTrue(s string) bool {
	b, err := strconv.ParseBool(s)
	return err == nil && b
}
