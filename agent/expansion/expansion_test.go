package expansion

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/moby/buildkit/frontend/dockerfile/shell"
	"github.com/stretchr/testify/require"
)

// lines repeats a line with its number, and the one before it.
func lines(n int, format string) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, format+"\n", i+1, i)
	}
	return b.String()
}

func TestText(t *testing.T) {
	long := strings.Repeat("x", 1000)
	for name, tt := range map[string]struct {
		text string
		args map[string]string
		want string // of the error; "": none
	}{
		"arguments that double":    {text: "FROM scratch\nARG A0=xxxxxxxx\n" + lines(40, "ARG A%d=${A%[2]d}$A%[2]d"), want: "Dockerfile line 18: the value of A16"},
		"before the first stage":   {text: "ARG A0=xxxxxxxx\n" + lines(40, "ARG A%d=${A%[2]d}$A%[2]d") + "FROM scratch", want: "Dockerfile line 17: the value of A16"},
		"one that grows":           {text: "FROM scratch\nENV A=xx\n" + strings.Repeat("ENV A=$A:$A\n", 30), want: "the value of A"},
		"the old form":             {text: "FROM scratch\nENV A xx\n" + strings.Repeat("ENV A $A $A\n", 30), want: "the value of A"},
		"in quotes":                {text: "FROM scratch\nENV A=xx\n" + strings.Repeat(`ENV A="$A'$A'"`+"\n", 30), want: "the value of A"},
		"names from others":        {text: "FROM scratch\nARG N=A\nENV A=xx\n" + strings.Repeat("ENV $N=$A$A\n", 30), want: "the value of $N"},
		"names in quotes":          {text: "FROM scratch\nENV A=xx\n" + strings.Repeat("ENV \"A\"=$A$A\n", 30), want: "the value of"},
		"defaults":                 {text: "FROM scratch\nENV A=xx\n" + strings.Repeat("ENV A=${B:-$A$A}\n", 30), want: "the value of A"},
		"parts replaced":           {text: "FROM scratch\nENV A=xxxx\n" + strings.Repeat("ENV A=${A//x/xxxxxxxx}\n", 10), want: "the value of A"},
		"parts replaced, quoted":   {text: "FROM scratch\nENV A=xxxx\n" + strings.Repeat("ENV A=${A//x/'x}xxxxxxx'}\n", 10), want: "the value of A"},
		"parts replaced, escaped":  {text: "FROM scratch\nENV A=xxxx\n" + strings.Repeat("ENV A=${A//`/x/xxxxxxxxx}\n", 10), want: "the value of A"},
		"replaced by each other":   {text: "FROM scratch\nENV A=xxxxxxxx\n" + strings.Repeat("ENV A=${A//x/$A}\n", 5), want: "the value of A"},
		"deep":                     {text: "FROM scratch\nENV A=x\nENV B=" + strings.Repeat("${A//x/", 20) + strings.Repeat("}", 20), want: "the value of B"},
		"triggers of stages":       {text: "FROM scratch AS s0\nENV A=xx B=xx\n" + lines(30, "ONBUILD ENV A=$B$B\nENV B=$A$A\nFROM s%[2]d AS s%[1]d"), want: "the value of"},
		"an argument of the build": {text: "FROM scratch\nARG A\nENV B=" + strings.Repeat("$A", 20), args: map[string]string{"A": strings.Repeat("x", 60000)}, want: "line 3: the value of B"},
		"many that are long":       {text: "FROM scratch\nENV A=" + long + "\n" + strings.Repeat("LABEL a="+strings.Repeat("$A", 100)+"\n", 700), want: "would have more than 64MiB"},
		"steps with long values":   {text: "FROM scratch\nENV A=" + long + "\n" + lines(900, "ENV A%[1]d="+strings.Repeat("$A", 100)+"\nRUN true"), want: "would have more than 64MiB"},
		"files":                    {text: "FROM scratch\nENV A=" + long + "\n" + lines(70, "COPY <<EOF /a%[1]d\n"+strings.Repeat("$A", 1000)+"\nEOF"), want: "would have more than 64MiB"},
		"files as they are":        {text: "FROM scratch\nENV A=" + long + "\n" + lines(70, "COPY <<'EOF' /a%[1]d\n"+strings.Repeat("$A", 1000)+"\nEOF")},
		"paths":                    {text: lines(100, "FROM base AS s%d\nENV PATH=/opt/%[2]d/bin:$PATH\nRUN PATH=$PATH:/x make -j$(nproc)")},
		"versions":                 {text: "ARG V=1.2.3\nFROM x\nARG V\nENV A=${V//./_} B=${V%.*}\nENV C=${A/_/\\/}\nENV D=${C//_/-}\nENV E=${D//-/.}\nRUN curl https://x/${V%%.*}/$V"},
		"a long script":            {text: "FROM x\nENV V=1.2.3\nRUN " + strings.Repeat(`for i in $PATH; do echo "${i//\"/}" ${V//\./_} $i; done; \`+"\n", 500) + "true"},
		"not a Dockerfile":         {text: "\x00\xff<<\n$"},
		"empty":                    {},
	} {
		t.Run(name, func(t *testing.T) {
			err := New(tt.args).Text([]byte(tt.text))
			if tt.want == "" {
				require.NoError(t, err)
			} else {
				require.ErrorContains(t, err, tt.want)
			}
		})
	}
}

func TestImage(t *testing.T) {
	config := func(env, triggers []string) []byte {
		out, err := json.Marshal(map[string]any{"config": map[string]any{"Env": env, "OnBuild": triggers}})
		require.NoError(t, err)
		return out
	}
	c := New(nil)
	require.NoError(t, c.Image([]byte("{")))
	require.NoError(t, c.Text([]byte("FROM base\nENV B="+strings.Repeat("$A", 20))))
	require.NoError(t, c.Image(config([]string{"PATH=/bin", "A=x"}, []string{"ENV X=$A"})))
	require.ErrorContains(t, c.Image(config([]string{"A=" + strings.Repeat("x", 60000)}, nil)), "Dockerfile line 2: the value of B")
	double := slices.Repeat([]string{"ENV T=$T$T"}, 30)
	triggered := New(nil)
	require.NoError(t, triggered.Text([]byte("FROM base")))
	require.ErrorContains(t, triggered.Image(config([]string{"T=xx"}, double[:30])), "ONBUILD of a base image, line 18: the value of T")
}

// FuzzText wants no length below that of what the front end makes.
func FuzzText(f *testing.F) {
	for _, value := range []string{"a$A$B", "${A//x/y$B}", "${A/`/x/'}$B}$A", `"${A//\x/${B//y/"}$A"}}"`, "${A:-${B//$A/$B}}", "${B#$A}"} {
		f.Add(value, "xx x/x", "yy")
	}
	f.Fuzz(func(t *testing.T, text, a, b string) {
		if len(text)+len(a)+len(b) > 2000 {
			return
		}
		l := &lengths{known: map[string]int64{"A": int64(len(a)), "B": int64(len(b))}}
		most := l.of(text, 0)
		for _, escape := range []rune{'\\', '`'} {
			out, _, err := shell.NewLex(escape).ProcessWord(text, shell.EnvsFromSlice([]string{"A=" + a, "B=" + b}))
			// A byte that is no UTF-8 becomes three.
			if err == nil && int64(len(strings.ToValidUTF8(out, ""))) > 3*most {
				t.Fatalf("%q has %d bytes, of at most %d: %q", text, len(out), most, out)
			}
		}
	})
}
