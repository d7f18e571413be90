package failure

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestWithLimit(t *testing.T) {
	late := errors.New("late")
	ctx, cancel := WithLimit(context.Background(), 10*time.Millisecond, late)
	defer cancel()
	_, has := ctx.Deadline()
	require.False(t, has, "it would go along with calls")
	<-ctx.Done()
	require.ErrorIs(t, context.Cause(ctx), late)

	ctx, cancel = WithLimit(context.Background(), time.Hour, late)
	require.NoError(t, ctx.Err())
	cancel()
	require.ErrorIs(t, context.Cause(ctx), context.Canceled)
}
