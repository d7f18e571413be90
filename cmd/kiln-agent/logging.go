package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel"
	"k8s.io/klog/v2"

	"github.com/kiln-build/kiln/agent/config"
)

// newLogger returns the agent's log, and has the libraries write to it too: theirs
// below warnings only when the level is debug, since BuildKit tells every step.
func newLogger(cfg config.Logging, w io.Writer) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.Level)); err != nil {
		panic(fmt.Sprintf("log level %q of a complete configuration: %v", cfg.Level, err))
	}
	opts := &slog.HandlerOptions{Level: level}
	var handler slog.Handler = slog.NewJSONHandler(w, opts)
	if cfg.Format == "text" {
		handler = slog.NewTextHandler(w, opts)
	}
	log := slog.New(handler)
	slog.SetDefault(log)

	logrus.SetOutput(io.Discard)
	logrus.SetLevel(logrus.WarnLevel)
	if level <= slog.LevelDebug {
		logrus.SetLevel(logrus.DebugLevel)
	}
	logrus.AddHook(&logrusHook{log.With("from", "library")})
	klog.SetSlogLogger(log.With("from", "kubernetes client"))
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("tracing", "error", err) }))
	return log
}

// untraced is what BuildKit warns of at the end of every build. Its record of traces is
// not used: the agent sends its own.
const untraced = "no trace recorder found, skipping"

// logrusHook passes records of logrus on.
type logrusHook struct{ log *slog.Logger }

func (h *logrusHook) Levels() []logrus.Level { return logrus.AllLevels }

func (h *logrusHook) Fire(e *logrus.Entry) error {
	if e.Message == untraced {
		return nil
	}
	level := slog.LevelDebug
	switch e.Level {
	case logrus.PanicLevel, logrus.FatalLevel, logrus.ErrorLevel:
		level = slog.LevelError
	case logrus.WarnLevel:
		level = slog.LevelWarn
	case logrus.InfoLevel:
		level = slog.LevelInfo
	}
	attrs := make([]slog.Attr, 0, len(e.Data))
	for k, v := range e.Data {
		if err, ok := v.(error); ok {
			v = err.Error()
		}
		attrs = append(attrs, slog.Any(k, v))
	}
	h.log.LogAttrs(context.Background(), level, e.Message, attrs...)
	return nil
}
