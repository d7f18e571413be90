package server

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
)

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Get(url)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(body)
}

func TestPages(t *testing.T) {
	reg := prometheus.NewRegistry()
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "kiln_test"}, func() float64 { return 7 }))
	var notReady error
	mux := http.NewServeMux()
	log := slog.New(slog.DiscardHandler)
	mux.Handle("/metrics", MetricsHandler(reg, log))
	mux.Handle("/healthz", LivenessHandler())
	mux.Handle("/readyz", ReadinessHandler(func() error { return notReady }))
	l, err := ListenTCP(context.Background(), "127.0.0.1:0")
	require.NoError(t, err)
	url := "http://" + l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- ServeHTTP(ctx, l, mux, log) }()

	code, body := get(t, url+"/metrics")
	require.Equal(t, http.StatusOK, code)
	require.Contains(t, body, "kiln_test 7")
	code, body = get(t, url+"/healthz")
	require.Equal(t, http.StatusOK, code)
	require.Equal(t, "ok\n", body)
	code, _ = get(t, url+"/readyz")
	require.Equal(t, http.StatusOK, code)
	notReady = errors.New("draining")
	code, body = get(t, url+"/readyz")
	require.Equal(t, http.StatusServiceUnavailable, code)
	require.Equal(t, "draining\n", body)
	code, _ = get(t, url+"/debug/pprof/")
	require.Equal(t, http.StatusNotFound, code)

	cancel()
	require.NoError(t, <-served)
	require.ErrorContains(t, ServeHTTP(context.Background(), l, mux, log), "serve 127.0.0.1")
}

func TestListenUnix(t *testing.T) {
	ctx := context.Background()
	path := filepath.Join(t.TempDir(), "a", "s")
	l, err := ListenUnix(ctx, path, 0o622)
	require.NoError(t, err)
	st, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o622), st.Mode().Perm())
	_, err = ListenUnix(ctx, path, 0o600)
	require.ErrorContains(t, err, "another process listens there")

	l.(*net.UnixListener).SetUnlinkOnClose(false)
	require.NoError(t, l.Close())
	l, err = ListenUnix(ctx, path, 0o600)
	require.NoError(t, err, "a socket that was left is replaced")
	require.NoError(t, l.Close())
	require.NoFileExists(t, path)

	require.NoError(t, os.WriteFile(path, []byte("data"), 0o600))
	_, err = ListenUnix(ctx, path, 0o600)
	require.ErrorContains(t, err, "no socket")
	require.FileExists(t, path)
	_, err = ListenUnix(ctx, filepath.Join(t.TempDir(), strings.Repeat("a", 200)), 0o600)
	require.ErrorContains(t, err, "listen on socket")
}
