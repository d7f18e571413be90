package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
)

// Sizes in the chart, in pixels.
const (
	chartWidth = 820
	chartLeft  = 130
	barsWidth  = 560
	barHeight  = 16
	groupGap   = 34
	chartTop   = 64
)

var palette = []string{"#0f766e", "#5eead4", "#b45309", "#fcd34d", "#4338ca", "#a5b4fc"}

// chart draws a group of bars for each workload. The longest bar of a group has
// the full width, so that fast and slow work can be read alike.
func chart(r *report) []byte {
	var body bytes.Buffer
	text := func(x, y int, class, s string) {
		fmt.Fprintf(&body, `<text x="%d" y="%d" class="%s">`, x, y, class)
		xml.EscapeText(&body, []byte(s)) // a buffer takes everything
		body.WriteString("</text>\n")
	}
	text(10, 22, "title", "Median build time (shorter is better)")
	x := 10
	for i, p := range r.Peers {
		fmt.Fprintf(&body, `<rect x="%d" y="34" width="12" height="12" fill="%s"/>`+"\n", x, palette[i%len(palette)])
		text(x+17, 45, "label", p.Name)
		x += 40 + 8*len(p.Name)
	}
	y := chartTop
	for _, w := range r.Workloads {
		var longest float64
		for _, p := range w.Peers {
			longest = max(longest, p.Median)
		}
		text(10, y+12, "label", w.About)
		y += 18
		for i, p := range w.Peers {
			width := int(barsWidth * ratio(p.Median, longest))
			if longest == 0 {
				width = 0
			}
			if p.Skipped {
				continue
			}
			text(10, y+12, "small", p.Name)
			label := fmt.Sprintf("%.2f s", p.Median)
			if p.Error != "" {
				label = "failed"
			}
			fmt.Fprintf(&body, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`+"\n", chartLeft, y, width, barHeight-2, palette[i%len(palette)])
			text(chartLeft+width+6, y+12, "small", label)
			y += barHeight
		}
		y += groupGap - 18
	}
	text(10, y+4, "small", fmt.Sprintf("%s; %d runs each, in turns", r.Machine, r.Runs))
	y += 16

	var out bytes.Buffer
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d">`+"\n", chartWidth, y, chartWidth, y)
	out.WriteString("<style>text{font-family:sans-serif;fill:#1f2937}.title{font-size:16px;font-weight:bold}.label{font-size:13px}.small{font-size:11px}</style>\n")
	out.WriteString(`<rect width="100%" height="100%" fill="white"/>` + "\n")
	body.WriteTo(&out)
	out.WriteString("</svg>\n")
	return out.Bytes()
}
