package escape

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// borrowing serves a repository as plain files, as old servers do, without its objects,
// and says that those are at other places.
func borrowing(t *testing.T, e *env, places ...string) string {
	t.Helper()
	repo := newRepository(t, map[string]string{"file": "x"})
	repo.git(nil, "update-server-info")
	info := filepath.Join(repo.dir, ".git/objects/info")
	require.NoError(t, os.MkdirAll(info, 0o755))
	for _, name := range []string{"http-alternates", "alternates"} {
		require.NoError(t, os.WriteFile(filepath.Join(info, name), []byte(strings.Join(places, "\n")+"\n"), 0o644))
	}
	files := http.StripPrefix("/repo.git/", http.FileServer(http.Dir(filepath.Join(repo.dir, ".git"))))
	return e.oracle(t, allowedLoopback+":0", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if path, ok := strings.CutPrefix(r.URL.Path, "/repo.git/objects/"); ok && !strings.HasPrefix(path, "info/") {
			http.Error(w, "not here", http.StatusNotFound)
			return
		}
		files.ServeHTTP(w, r)
	})).URL + "/repo.git"
}

func gitAlternates(t *testing.T, e *env) {
	private := newRepository(t, map[string]string{"canary": e.Canary})
	inside := internal(t, e)
	places := []string{"file://" + private.dir + "/.git/objects", private.dir + "/.git/objects", "../../../../../../../.." + private.dir + "/.git/objects"}
	for _, o := range inside {
		places = append(places, o.URL+"/objects")
	}
	url := borrowing(t, e, places...)
	for _, r := range []result{e.buildState(t, source(url, "#main")), e.Build(t, build{Dockerfile: "FROM scratch\nADD " + url + "#main /src\n"})} {
		require.Error(t, r.Err)
		e.CheckNode(t, r)
	}
	for _, o := range inside {
		require.Empty(t, o.Requests(), o.URL)
	}
}

func gitAlternatesPlain(t *testing.T, e *env) bool {
	o := e.oracle(t, "127.0.0.1:0", nil)
	_ = plainGit(t, t.TempDir(), "-c", "http.followRedirects=true", "clone", "-q", borrowing(t, e, o.URL+"/objects"), "out").Run()
	return len(o.Requests()) > 0
}
