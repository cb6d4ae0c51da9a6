package cli

import (
	"io"
	"strings"
	"unicode/utf8"
)

// table is rows of text under headings. Headings that begin with "+" are for
// the wide form only.
type table struct {
	head []string
	rows [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

const columnGap = 3

// write aligns the columns. Colours are put around cells after their width is
// known, so that they do not shift anything.
func (t *table) write(w io.Writer, wide, color bool) error {
	var columns []int
	for i, h := range t.head {
		if wide || !strings.HasPrefix(h, "+") {
			columns = append(columns, i)
		}
	}
	widths := make([]int, len(t.head))
	head := make([]string, len(t.head))
	for _, i := range columns {
		head[i] = strings.TrimPrefix(t.head[i], "+")
		widths[i] = utf8.RuneCountInString(head[i])
		for _, row := range t.rows {
			widths[i] = max(widths[i], utf8.RuneCountInString(cellText(row[i])))
		}
	}
	var b strings.Builder
	line := func(row []string, paint func(string) string) {
		for n, i := range columns {
			text := cellText(row[i])
			b.WriteString(paint(text))
			if n < len(columns)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(text)+columnGap))
			}
		}
		b.WriteByte('\n')
	}
	paint := func(s string) string { return s }
	line(head, paint)
	if color {
		paint = colored
	}
	for _, row := range t.rows {
		line(row, paint)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// cellText keeps a cell on its line and every column filled, so that awk and
// people find the fields.
func cellText(s string) string {
	if s == "" {
		return "-"
	}
	return oneLine(s)
}

// oneLine is text from elsewhere without what would break the line or steer
// the terminal.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || r == '\r' {
			return ' '
		}
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return -1
		}
		return r
	}, s)
}

var colors = map[string]string{
	"Running": "32", "Completed": "32", "Ready": "32", "leader": "32",
	"Pending": "33", "Scheduled": "33", "Updating": "33", "RetryPending": "33", "Draining": "33", "Deleting": "33", "Cordoned": "33",
	"Failed": "31", "NotReady": "31", "Unknown": "31", "unreachable": "31",
}

// colored paints a cell whose first word is a state.
func colored(text string) string {
	word, _, _ := strings.Cut(text, ",")
	code, ok := colors[word]
	if !ok {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}
