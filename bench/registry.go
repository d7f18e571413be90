package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

type registry struct {
	addr   string
	cmd    *exec.Cmd
	exited chan error
}

// startRegistry runs Debian's docker-registry on a free port of loopback.
func startRegistry(ctx context.Context, dir string) (*registry, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &registry{addr: l.Addr().String(), exited: make(chan error, 1)}
	l.Close()
	conf := filepath.Join(dir, "config.yml")
	text := fmt.Sprintf("version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    rootdirectory: %s\nhttp:\n  addr: %s\n",
		filepath.Join(dir, "data"), r.addr)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return nil, err
	}
	r.cmd = exec.Command("docker-registry", "serve", conf)
	var log bytes.Buffer
	r.cmd.Stdout, r.cmd.Stderr = &log, &log
	if err := r.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%w: install docker-registry", err)
	}
	go func() { r.exited <- r.cmd.Wait() }()
	for range 500 {
		resp, err := http.Get("http://" + r.addr + "/v2/")
		if err == nil {
			resp.Body.Close()
			return r, nil
		}
		select {
		case err := <-r.exited:
			return nil, fmt.Errorf("docker-registry ended: %w\n%s", err, log.String())
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), r.Close())
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil, errors.Join(errors.New("docker-registry does not answer"), r.Close())
}

func (r *registry) Close() error {
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop docker-registry: %w", err)
	}
	<-r.exited
	return nil
}
