package auth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	"k8s.io/client-go/rest"
	testclock "k8s.io/utils/clock/testing"

	"github.com/kiln-build/kiln/agent/auth/authtest"
)

// account is the user of a token that is in order.
func account(name string) authenticationv1.TokenReviewStatus {
	return authenticationv1.TokenReviewStatus{
		Authenticated: true, Audiences: []string{"kiln-agent"},
		User: authenticationv1.UserInfo{Username: name, UID: "1", Groups: []string{"g"}, Extra: map[string]authenticationv1.ExtraValue{"k": {"v"}}},
	}
}

// faulty answers as a test says.
type faulty struct {
	mu       sync.Mutex
	token    authenticationv1.TokenReviewStatus
	tokenErr error
	allowed  bool
	accErr   error
	asked    int
	access   authorizationv1.SubjectAccessReviewSpec
	block    chan struct{}
}

func (f *faulty) ReviewToken(ctx context.Context, spec authenticationv1.TokenReviewSpec) (authenticationv1.TokenReviewStatus, error) {
	if f.block != nil {
		select {
		case <-f.block:
		case <-ctx.Done():
			return authenticationv1.TokenReviewStatus{}, ctx.Err()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	if f.tokenErr != nil {
		return authenticationv1.TokenReviewStatus{}, fmt.Errorf("%w: %s", f.tokenErr, spec.Token)
	}
	return f.token, nil
}

func (f *faulty) ReviewAccess(_ context.Context, spec authorizationv1.SubjectAccessReviewSpec) (authorizationv1.SubjectAccessReviewStatus, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.access = spec
	return authorizationv1.SubjectAccessReviewStatus{Allowed: f.allowed}, f.accErr
}

func tokens(r Reviewer, clock *testclock.FakePassiveClock) *ServiceAccounts {
	return NewServiceAccounts(TokenConfig{Audiences: []string{"kiln-agent"}, TTL: time.Minute, Entries: 2, Clock: clock}, r)
}

func TestTokenVerdicts(t *testing.T) {
	good := account("system:serviceaccount:team-a:ci")
	otherAudience, noAudience, anonymous := good, good, good
	otherAudience.Audiences, noAudience.Audiences, anonymous.Authenticated = []string{"other"}, nil, false
	tests := []struct {
		name string
		f    *faulty
		want string
		code codes.Code
	}{
		{"allowed", &faulty{token: good, allowed: true}, "team-a", codes.OK},
		{"not authenticated", &faulty{token: anonymous, allowed: true}, "", codes.Unauthenticated},
		{"for another audience", &faulty{token: otherAudience, allowed: true}, "", codes.Unauthenticated},
		{"audience that was not looked at", &faulty{token: noAudience, allowed: true}, "", codes.Unauthenticated},
		{"may not create builds", &faulty{token: good}, "", codes.PermissionDenied},
		{"a person", &faulty{token: account("alice"), allowed: true}, "", codes.PermissionDenied},
		{"a node", &faulty{token: account("system:node:n"), allowed: true}, "", codes.PermissionDenied},
		{"account without a name", &faulty{token: account("system:serviceaccount:team-a:"), allowed: true}, "", codes.PermissionDenied},
		{"account without a namespace", &faulty{token: account("system:serviceaccount::ci"), allowed: true}, "", codes.PermissionDenied},
		{"namespace that is a path", &faulty{token: account("system:serviceaccount:../x:ci"), allowed: true}, "", codes.PermissionDenied},
		{"name with a colon", &faulty{token: account("system:serviceaccount:a:b:c"), allowed: true}, "", codes.PermissionDenied},
		{"no answer about the token", &faulty{tokenErr: errors.New("refused")}, "", codes.Unavailable},
		{"no answer about access", &faulty{token: good, accErr: errors.New("refused")}, "", codes.Unavailable},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			id, err := tokens(tt.f, testclock.NewFakePassiveClock(time.Now())).Identify(context.Background(), "s3cret")
			require.Equal(t, tt.code, status.Code(err), "%v", err)
			require.Equal(t, tt.want, id.Tenant)
			require.NotContains(t, message(err), "s3cret")
			if tt.code == codes.OK {
				require.Equal(t, Identity{Name: "system:serviceaccount:team-a:ci", Role: RoleTenant, Tenant: "team-a"}, id)
				require.Equal(t, authorizationv1.SubjectAccessReviewSpec{
					User: id.Name, UID: "1", Groups: []string{"g"}, Extra: map[string]authorizationv1.ExtraValue{"k": {"v"}},
					ResourceAttributes: &authorizationv1.ResourceAttributes{Namespace: "team-a", Verb: "create", Group: "kiln.build", Resource: "builds"},
				}, tt.f.access)
			}
		})
	}
}

func TestTokenCache(t *testing.T) {
	clock := testclock.NewFakePassiveClock(time.Now())
	f := &faulty{token: account("system:serviceaccount:a:ci"), allowed: true}
	s := tokens(f, clock)
	identify := func(token string, want codes.Code, asked int) {
		t.Helper()
		_, err := s.Identify(context.Background(), token)
		require.Equal(t, want, status.Code(err))
		require.Equal(t, asked, f.asked)
	}
	identify("1", codes.OK, 1)
	identify("1", codes.OK, 1)
	f.token.Authenticated = false
	identify("1", codes.OK, 1)
	clock.SetTime(clock.Now().Add(time.Minute + time.Second))
	identify("1", codes.Unauthenticated, 2)
	identify("1", codes.Unauthenticated, 2)
	f.token.Authenticated = true
	clock.SetTime(clock.Now().Add(11 * time.Second))
	identify("1", codes.OK, 3)
	f.tokenErr = errors.New("down")
	identify("2", codes.Unavailable, 4)
	identify("2", codes.Unavailable, 5)
	identify("1", codes.OK, 5)
	f.tokenErr = nil
	identify("2", codes.OK, 6)
	identify("3", codes.OK, 7)
	identify("1", codes.OK, 8) // only two are kept
}

// TestTokenReviewIsShared has callers wait for one review, and one of them leave.
func TestTokenReviewIsShared(t *testing.T) {
	f := &faulty{token: account("system:serviceaccount:a:ci"), allowed: true, block: make(chan struct{})}
	s := tokens(f, testclock.NewFakePassiveClock(time.Now()))
	ctx, cancel := context.WithCancel(context.Background())
	left := make(chan error)
	go func() {
		_, err := s.Identify(ctx, "t")
		left <- err
	}()
	cancel()
	require.Equal(t, codes.Canceled, status.Code(<-left))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			_, err := s.Identify(context.Background(), "t")
			require.NoError(t, err)
		})
	}
	close(f.block)
	wg.Wait()
	require.Equal(t, 1, f.asked)
}

func TestBearer(t *testing.T) {
	server, clients := authtest.NewCA(t), authtest.NewCA(t)
	f := &faulty{token: account("system:serviceaccount:team-a:ci"), allowed: true}
	tcp, _, _ := tlsServer(t, Config{
		Tokens: tokens(f, testclock.NewFakePassiveClock(time.Now())), Clients: []ClientRule{{CommonName: "c", Role: RoleController}},
	}, false, server, clients)
	with := dial(t, tcp, credentials.NewTLS(server.ClientTLS(t, new(clients.Issue(t, authtest.Leaf{CommonName: "c"})))))
	without := dial(t, tcp, credentials.NewTLS(server.ClientTLS(t, nil)))
	const account = "system:serviceaccount:team-a:ci tenant team-a"

	got, err := ask(t, without, "authorization", "Bearer x")
	require.NoError(t, err)
	require.Equal(t, account, got)
	got, err = ask(t, without, "authorization", "bearer x")
	require.NoError(t, err)
	require.Equal(t, account, got)
	got, err = ask(t, with)
	require.NoError(t, err)
	require.Equal(t, "cn:c controller ", got)
	got, err = ask(t, with, "authorization", "Bearer x")
	require.NoError(t, err)
	require.Equal(t, account, got, "the token is what the call says")

	for _, md := range [][]string{
		nil, {"authorization", ""}, {"authorization", "Bearer"}, {"authorization", "Bearer "}, {"authorization", "Basic x"},
		{"authorization", "Bearer x", "authorization", "Bearer x"}, {"authorization", "Bearer " + strings.Repeat("a", maxToken+1)},
	} {
		_, err := ask(t, without, md...)
		require.Equal(t, codes.Unauthenticated, status.Code(err), "%v", err)
	}
	_, err = ask(t, with, "authorization", "Basic x")
	require.Equal(t, codes.Unauthenticated, status.Code(err), "a certificate does not make up for it")
	other := authtest.NewCA(t)
	_, err = ask(t, dial(t, tcp, credentials.NewTLS(server.ClientTLS(t, new(other.Issue(t, authtest.Leaf{CommonName: "c"}))))), "authorization", "Bearer x")
	require.Equal(t, codes.Unavailable, status.Code(err), "a certificate that is shown must verify")
}

// TestAPIServerRequests looks at what is sent over HTTP.
func TestAPIServerRequests(t *testing.T) {
	var sent []map[string]any
	var paths []string
	answer := `{"kind":"TokenReview","apiVersion":"authentication.k8s.io/v1","status":{"authenticated":true,"audiences":["a"],"user":{"username":"u"}}}`
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body map[string]any
		require.NoError(t, json.NewDecoder(r.Body).Decode(&body))
		sent, paths = append(sent, body), append(paths, r.URL.Path)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write([]byte(answer))
	}))
	defer srv.Close()
	r, err := newAPIServer(&rest.Config{Host: srv.URL})
	require.NoError(t, err)
	st, err := r.ReviewToken(context.Background(), authenticationv1.TokenReviewSpec{Token: "x", Audiences: []string{"a"}})
	require.NoError(t, err)
	require.True(t, st.Authenticated)
	require.Equal(t, "u", st.User.Username)
	answer = `{"kind":"SubjectAccessReview","apiVersion":"authorization.k8s.io/v1","status":{"allowed":true}}`
	acc, err := r.ReviewAccess(context.Background(), authorizationv1.SubjectAccessReviewSpec{User: "u"})
	require.NoError(t, err)
	require.True(t, acc.Allowed)
	answer = `{`
	_, err = r.ReviewAccess(context.Background(), authorizationv1.SubjectAccessReviewSpec{User: "u"})
	require.Error(t, err)

	require.Equal(t, []string{"/apis/authentication.k8s.io/v1/tokenreviews", "/apis/authorization.k8s.io/v1/subjectaccessreviews", "/apis/authorization.k8s.io/v1/subjectaccessreviews"}, paths)
	require.Equal(t, "TokenReview", sent[0]["kind"])
	require.Equal(t, "authentication.k8s.io/v1", sent[0]["apiVersion"])
	require.Equal(t, map[string]any{"token": "x", "audiences": []any{"a"}}, sent[0]["spec"])
	require.Equal(t, "SubjectAccessReview", sent[1]["kind"])
	_, err = NewAPIServer("/does/not/exist")
	require.ErrorContains(t, err, "/does/not/exist")
}
