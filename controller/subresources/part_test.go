package subresources

import (
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestContentRange(t *testing.T) {
	for _, c := range []struct {
		name   string
		header []string
		length int64
		want   content
		code   int
	}{
		{"no part", nil, 7, content{length: 7, total: 7}, 0},
		{"no length", nil, -1, content{}, http.StatusLengthRequired},
		{"a part", []string{"bytes 3-6/10"}, 4, content{part: true, offset: 3, length: 4, total: 10}, 0},
		{"all as one part", []string{"bytes 0-9/10"}, 10, content{part: true, length: 10, total: 10}, 0},
		{"a question", []string{"bytes */10"}, 0, content{part: true, total: 10}, 0},
		{"a question with data", []string{"bytes */10"}, 1, content{}, http.StatusBadRequest},
		{"a part without length", []string{"bytes 3-6/10"}, -1, content{}, http.StatusLengthRequired},
		{"another length", []string{"bytes 3-6/10"}, 5, content{}, http.StatusBadRequest},
		{"backwards", []string{"bytes 6-3/10"}, 0, content{}, http.StatusBadRequest},
		{"beyond the end", []string{"bytes 3-10/10"}, 8, content{}, http.StatusBadRequest},
		{"no total", []string{"bytes 3-6/*"}, 4, content{}, http.StatusBadRequest},
		{"a negative number", []string{"bytes -3-6/10"}, 4, content{}, http.StatusBadRequest},
		{"a number too large", []string{"bytes 0-9223372036854775807/9223372036854775808"}, 4, content{}, http.StatusBadRequest},
		{"another unit", []string{"lines 3-6/10"}, 4, content{}, http.StatusBadRequest},
		{"two parts", []string{"bytes 3-6/10", "bytes 0-3/10"}, 4, content{}, http.StatusBadRequest},
		{"more behind it", []string{"bytes 3-6/10, 0-3/10"}, 4, content{}, http.StatusBadRequest},
		{"empty", []string{""}, 4, content{}, http.StatusBadRequest},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := contentOf(&http.Request{ContentLength: c.length, Header: http.Header{"Content-Range": c.header}})
			if c.code == 0 {
				require.NoError(t, err)
				require.Equal(t, c.want, got)
				return
			}
			var p *problem
			require.ErrorAs(t, err, &p)
			require.Equal(t, c.code, p.code, p.message)
		})
	}
}
