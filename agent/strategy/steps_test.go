package strategy

import (
	"encoding/json"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/kiln-build/kiln/api/agent/v1"
	"github.com/kiln-build/kiln/sandbox"
)

func stepsSpec(src *agentv1.Source, image *agentv1.StepsImage, steps ...*agentv1.BuilderStep) *agentv1.BuildSpec {
	return &agentv1.BuildSpec{Source: src, Strategy: &agentv1.BuildSpec_Steps{Steps: &agentv1.StepsStrategy{Steps: steps, Image: image}}}
}

// shell is a step that runs a script.
func shell(name, image, script string) *agentv1.BuilderStep {
	return &agentv1.BuilderStep{Name: name, Image: image, Command: []string{"/bin/sh", "-euc", script}}
}

// workspaceImage is an image of everything in the workspace.
var workspaceImage = &agentv1.StepsImage{Copies: []*agentv1.WorkspaceCopy{{Source: ".", Destination: "/"}}}

func TestStepsInEachSandbox(t *testing.T) {
	for _, class := range sandbox.Classes {
		t.Run(string(class), func(t *testing.T) {
			c, reg := connect(t, class), newRegistry(t)
			busybox := reg.pushBusybox(nil)
			owned, mine := shell("own", busybox, "chown -R 1001 ."), shell("mine", busybox, "touch mine sub/mine")
			mine.User = "1001"
			spec := stepsSpec(inlineSource(map[string]string{"main.c": "int main;", "sub/x": "x"}), workspaceImage,
				shell("compile", busybox, "mkdir out; cat main.c sub/x > out/app; rm main.c"),
				owned, mine,
				shell("stamp", busybox, "test ! -e main.c; echo ' stamped' >> out/app; id -u > uid"),
			)
			spec.Outputs = pushTo(reg.host + "/steps:1")
			out := mustRun(t, c, Inputs{Spec: spec})
			require.Equal(t, entries{"out/app": "int main;x stamped\n", "sub/x": "x", "uid": "0\n", "mine": "", "sub/mine": ""}, reg.pull(reg.host+"/steps:1").files)
			require.Contains(t, out.names, "[compile] /bin/sh -euc mkdir out; cat main.c")
			require.Contains(t, mustRun(t, c, Inputs{Spec: spec}).names, "[stamp] /bin/sh -euc test ! -e main.c; echo ' stamped' >> out/app; id -u > uid cached=true")
		})
	}
}

func TestStepRunsAsItsImageAndSpecSay(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	busybox := reg.pushBusybox(func(c *v1.Config) { c.User, c.WorkingDir = "builder", "/tmp" })
	spec := stepsSpec(nil, nil,
		&agentv1.BuilderStep{Name: "image command", Image: busybox},
		&agentv1.BuilderStep{Name: "args", Image: busybox, Args: []string{"echo from args $0 $FROM_IMAGE", "zero"}},
		&agentv1.BuilderStep{Name: "command", Image: busybox, Command: []string{"/bin/echo", "a"}, Args: []string{"b  c", "$HOME"}},
		&agentv1.BuilderStep{Name: "user of the image", Image: busybox, Args: []string{"echo $(id -u):$(id -g) $(pwd)"}},
		&agentv1.BuilderStep{Name: "user", Image: busybox, User: "1234:55", WorkingDir: "/tmp/x", Args: []string{"echo $(id -u):$(id -g) $(pwd)"}},
		&agentv1.BuilderStep{Name: "root", Image: busybox, User: "root", WorkingDir: "made/here", Args: []string{"echo $(id -u) $(pwd) && touch x"}},
		&agentv1.BuilderStep{Name: "environment", Image: busybox, Env: map[string]string{"B": "step", "C": "a=b 'c'\nd"}, Args: []string{"echo $A $B $FROM_IMAGE; echo \"$C\""}},
		&agentv1.BuilderStep{Name: "image wins not", Image: busybox, Env: map[string]string{"FROM_IMAGE": "step"}, Args: []string{"echo $FROM_IMAGE"}},
	)
	spec.GetSteps().Env = map[string]string{"A": "strategy", "B": "strategy"}
	out := mustRun(t, c, Inputs{Spec: spec})
	for _, want := range []string{
		"image command\n", "from args zero image\n", "a b  c $HOME\n", "1001:1001 /workspace\n", "1234:55 /tmp/x\n", "0 /workspace/made/here\n",
		"strategy step image\na=b 'c'\nd\n", "step\n",
	} {
		require.Contains(t, out.log, want)
	}
	require.NotContains(t, out.response, "containerimage.digest")

	none := reg.host + "/nothing:1"
	image, err := mutate.Config(empty.Image, v1.Config{})
	require.NoError(t, err)
	require.NoError(t, remote.Write(reg.reference(none), image))
	out = run(t, c, Inputs{Spec: stepsSpec(nil, nil, &agentv1.BuilderStep{Name: "x", Image: none})})
	require.ErrorContains(t, out.err, "spec.steps.steps[0].command")
}

func TestStepSecretsAndCaches(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	busybox := reg.pushBusybox(nil)
	secrets := []*agentv1.StepSecret{{Id: "token"}, {Id: "token", Path: "/etc/npm/token"}, {Id: "token", Env: "TOKEN"}}
	caches := []*agentv1.StepCache{{Id: "deps", Path: "/var/cache/deps"}}
	asRoot := shell("root", busybox, `test "$TOKEN" = hunter2; test "$(cat /run/secrets/token)" = hunter2; test "$(cat /etc/npm/token)" = hunter2
ls -l /run/secrets/token; ls /run/secrets; echo first >> /var/cache/deps/log; cat /var/cache/deps/log > log`)
	asRoot.Secrets, asRoot.Caches = secrets, caches
	asUser := shell("user", busybox, `test "$(cat /run/secrets/token)" = hunter2; touch /var/cache/deps/mine; ls /run/secrets`)
	asUser.User, asUser.Secrets, asUser.Caches = "1001", secrets, caches
	spec := stepsSpec(nil, workspaceImage, asRoot, asUser)
	spec.Secrets = []*agentv1.SecretRef{{Id: "token"}, {Id: "other"}}
	spec.Outputs = pushTo(reg.host + "/secret:1")
	creds := &agentv1.Credentials{Secrets: map[string][]byte{"token": []byte("hunter2"), "other": nil, "undeclared": []byte("x")}}
	out := mustRun(t, c, Inputs{Spec: spec, Credentials: creds})
	require.NotContains(t, out.log, "other", "a step has the secrets that it names")
	got := reg.pull(reg.host + "/secret:1")
	require.Equal(t, entries{"log": "first\n"}, got.files)
	raw, err := json.Marshal(got.config)
	require.NoError(t, err)
	require.NotContains(t, string(raw), "hunter2")

	spec.GetSteps().Env = map[string]string{"RUN_AGAIN": "1"}
	mustRun(t, c, Inputs{Spec: spec, Credentials: creds})
	require.Equal(t, entries{"log": "first\nfirst\n"}, reg.pull(reg.host+"/secret:1").files, "the cache is there")

	t.Run("the same cache in a Dockerfile", func(t *testing.T) {
		mustRun(t, c, Inputs{Spec: &agentv1.BuildSpec{
			Strategy: inlineDockerfile("FROM " + busybox + "\nRUN --mount=type=cache,id=deps,target=/c cp /c/log /log\n"),
			Outputs:  pushTo(reg.host + "/secret:2"),
		}})
		require.Equal(t, "first\nfirst\n", reg.pull(reg.host + "/secret:2").files["log"])
	})
	t.Run("no_cache empties it", func(t *testing.T) {
		spec.NoCache = true
		mustRun(t, c, Inputs{Spec: spec, Credentials: creds})
		require.Equal(t, entries{"log": "first\n"}, reg.pull(reg.host+"/secret:1").files)
	})
	t.Run("undeclared secret in a Dockerfile", func(t *testing.T) {
		out := run(t, c, Inputs{Credentials: creds, Spec: &agentv1.BuildSpec{
			Secrets:  []*agentv1.SecretRef{{Id: "token"}},
			Strategy: inlineDockerfile("FROM " + busybox + "\nRUN --mount=type=secret,id=undeclared,required cat /run/secrets/undeclared\n"),
		}})
		require.Error(t, out.err)
	})
}

func TestStepNetworkTimeoutAndFailure(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	busybox := reg.pushBusybox(nil)
	t.Run("no network", func(t *testing.T) {
		spec := stepsSpec(nil, nil, shell("look", busybox, "ls /sys/class/net"))
		spec.Network = agentv1.NetworkMode_NETWORK_MODE_NONE
		require.Equal(t, "lo\n", mustRun(t, c, Inputs{Spec: spec}).log)
		spec.Strategy = inlineDockerfile("FROM " + busybox + "\nRUN ls /sys/class/net > /net && test \"$(cat /net)\" = lo\n")
		mustRun(t, c, Inputs{Spec: spec})
	})
	t.Run("timeout of a step counts from the end of that before", func(t *testing.T) {
		after := shell("after", busybox, "true")
		after.Timeout = durationpb.New(2 * time.Second)
		mustRun(t, c, Inputs{Spec: stepsSpec(nil, nil, shell("before", busybox, "sleep 3"), after)})
	})
	t.Run("timeout", func(t *testing.T) {
		slow := shell("slow", busybox, "sleep 60")
		slow.Timeout = durationpb.New(time.Second)
		fast := shell("fast", busybox, "true")
		fast.Timeout = durationpb.New(time.Minute)
		start := time.Now()
		out := run(t, c, Inputs{Spec: stepsSpec(nil, nil, fast, slow, shell("never", busybox, "echo never"))})
		require.Less(t, time.Since(start), 30*time.Second)
		var timeout *StepTimeoutError
		require.ErrorAs(t, out.cause, &timeout)
		require.Equal(t, StepTimeoutError{Step: "slow", Limit: time.Second}, *timeout)
		require.ErrorContains(t, out.err, `step "slow" did not end within 1s`)
		require.NotContains(t, out.log, "never")
	})
	t.Run("failure", func(t *testing.T) {
		out := run(t, c, Inputs{Spec: stepsSpec(nil, nil, shell("bad", busybox, "echo no; exit 7"), shell("never", busybox, "echo never"))})
		require.ErrorContains(t, out.err, "exit code: 7")
		require.Contains(t, out.log, "no\n")
		require.NotContains(t, out.log, "never")
	})
}

func TestImageOfSteps(t *testing.T) {
	c, reg := connect(t, sandbox.Userns), newRegistry(t)
	busybox := reg.pushBusybox(func(c *v1.Config) { c.Labels = map[string]string{"base": "yes", "both": "base"} })
	build := shell("build", busybox, "mkdir -p out/lib other; echo app > out/app; chmod 700 out/app; echo lib > out/lib/l; echo $SOURCE_DATE_EPOCH > out/epoch; ln -s app out/link; echo o > other/o")
	spec := stepsSpec(nil, &agentv1.StepsImage{
		Base: busybox,
		Copies: []*agentv1.WorkspaceCopy{
			{Source: "out", Destination: "/srv/app"}, {Source: "other/o", Destination: "/srv/renamed", Chown: "12:34"}, {Source: "./other/", Destination: "/dir/", Chown: "7"},
		},
		Env: map[string]string{"FROM_IMAGE": "changed", "NEW": "a b"}, Entrypoint: []string{"/srv/app/app"},
		WorkingDir: "/srv", User: "1001", Labels: map[string]string{"both": "spec", "new": "l"},
	}, build)
	spec.SourceDateEpoch = 1700000000
	spec.Outputs = pushTo(reg.host + "/result:1")
	out := mustRun(t, c, Inputs{Spec: spec})
	got := reg.pull(reg.host + "/result:1")
	dgst, err := got.image.Digest()
	require.NoError(t, err)
	require.Equal(t, dgst.String(), out.response["containerimage.digest"])
	for path, want := range map[string]string{"srv/app/app": "app\n", "srv/app/lib/l": "lib\n", "srv/app/link": "-> app", "srv/renamed": "o\n", "dir/o": "o\n", "srv/app/epoch": "1700000000\n"} {
		require.Equal(t, want, got.files[path], path)
	}
	require.NotEmpty(t, got.files["bin/busybox"])
	require.Equal(t, int64(0o700), got.headers["srv/app/app"].Mode&0o777)
	require.Equal(t, [2]int{12, 34}, [2]int{got.headers["srv/renamed"].Uid, got.headers["srv/renamed"].Gid})
	require.Equal(t, [2]int{7, 7}, [2]int{got.headers["dir/o"].Uid, got.headers["dir/o"].Gid})
	require.Equal(t, int64(1700000000), got.headers["srv/app/app"].ModTime.Unix())
	require.Equal(t, int64(1700000000), got.config.Created.Unix())
	cfg := got.config.Config
	require.Equal(t, []string{"PATH=/bin", "FROM_IMAGE=changed", "NEW=a b"}, cfg.Env)
	require.Equal(t, []string{"/srv/app/app"}, cfg.Entrypoint)
	require.Empty(t, cfg.Cmd)
	require.Equal(t, "/srv", cfg.WorkingDir)
	require.Equal(t, "1001", cfg.User)
	require.Equal(t, map[string]string{"base": "yes", "both": "spec", "new": "l"}, cfg.Labels)
	require.Equal(t, "amd64", got.config.Architecture)
	var created []string
	for _, h := range got.config.History {
		if h.CreatedBy != "" && !h.EmptyLayer {
			created = append(created, h.CreatedBy)
		}
	}
	require.Equal(t, []string{"COPY out /srv/app", "COPY --chown=12:34 other/o /srv/renamed", "COPY --chown=7:7 other /dir/"}, created[len(created)-3:])

	again := reg.host + "/result:2"
	spec.NoCache, spec.Outputs = true, pushTo(again)
	require.Equal(t, out.response["containerimage.digest"], mustRun(t, c, Inputs{Spec: spec}).response["containerimage.digest"], "the same image when it is built again")

	t.Run("link out of the workspace", func(t *testing.T) {
		spec := stepsSpec(nil, &agentv1.StepsImage{Copies: []*agentv1.WorkspaceCopy{{Source: "x/passwd", Destination: "/p"}}},
			shell("trick", busybox, "ln -s /etc x"))
		spec.Outputs = pushTo(reg.host + "/trick:1")
		require.Error(t, run(t, c, Inputs{Spec: spec}).err)
	})
	t.Run("no copy", func(t *testing.T) {
		spec := stepsSpec(nil, &agentv1.StepsImage{Base: busybox}, shell("fails", busybox, "exit 3"))
		require.ErrorContains(t, run(t, c, Inputs{Spec: spec}).err, "exit code: 3")
	})
}
