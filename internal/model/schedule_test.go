package model

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	pb "github.com/persys-dev/persys/proto/persys/v1"
)

func timetable(t interface {
	Helper()
	Fatal(...any)
}, cron, zone string) *Timetable {
	t.Helper()
	s, err := ParseTimetable(&pb.Schedule{Cron: cron, Timezone: zone})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestTimetable(t *testing.T) {
	for _, tt := range []struct{ cron, zone, from, want string }{
		{"*/5 * * * *", "", "2026-11-02T12:00:00Z", "2026-11-02T12:05:00Z"},
		{"*/5 * * * *", "", "2026-11-02T11:59:59Z", "2026-11-02T12:00:00Z"},
		{"@daily", "UTC", "2026-11-02T12:00:00Z", "2026-11-03T00:00:00Z"},
		{"@weekly", "UTC", "2026-11-02T12:00:00Z", "2026-11-08T00:00:00Z"},
		{"0 9 * * mon-fri", "Europe/Berlin", "2026-10-23T08:00:00Z", "2026-10-26T08:00:00Z"},
		{"0 0 29 2 *", "", "2026-11-02T12:00:00Z", "2028-02-29T00:00:00Z"},
		// The last leap year before 2104 is 2096.
		{"0 0 29 2 *", "", "2097-01-01T00:00:00Z", "2104-02-29T00:00:00Z"},
		{"0 0 13 * 5", "", "2026-11-02T12:00:00Z", "2026-11-06T00:00:00Z"},
		// Berlin has no 02:30 on 2027-03-28, and has it twice on 2026-10-25.
		{"30 2 * * *", "Europe/Berlin", "2027-03-27T12:00:00Z", "2027-03-29T00:30:00Z"},
		{"30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", "2026-10-25T00:30:00Z"},
		{"30 2 * * *", "Europe/Berlin", "2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z"},
		// Where midnight is left out, the rest of that day is not.
		{"0 3 * * *", "Asia/Beirut", "2030-03-30T20:35:00Z", "2030-03-31T00:00:00Z"},
		{"0 0 * * *", "Australia/Lord_Howe", "2031-10-05T00:00:00Z", "2031-10-05T13:00:00Z"},
	} {
		from, _ := time.Parse(time.RFC3339, tt.from)
		if got := timetable(t, tt.cron, tt.zone).Next(from).Format(time.RFC3339); got != tt.want {
			t.Errorf("%s in %s after %s: %s, want %s", tt.cron, tt.zone, tt.from, got, tt.want)
		}
	}
}

// TestTimetableProperty compares with a look at every minute.
func TestTimetableProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := timetable(t,
			rapid.SampledFrom([]string{
				"*/5 * * * *", "0 0 * * *", "30 2 * * *", "30 0 * * *", "45 23 * * 0", "0 * * * *", "7 3 * 3 1-5", "*/7 */3 */2 * *", "1,2,3 0,23 * * *", "0 0 13 * 5",
			}).Draw(t, "cron"),
			rapid.SampledFrom([]string{
				"UTC", "America/Sao_Paulo", "Asia/Beirut", "America/Havana", "Europe/Berlin", "Australia/Lord_Howe", "Africa/Cairo", "Asia/Kathmandu", "Pacific/Apia", "Africa/Casablanca",
			}).Draw(t, "zone"))
		from := time.Unix(rapid.Int64Range(1e9, 2e9).Draw(t, "from"), 0)
		// Most of it is near a change of the clock.
		if _, change := from.In(s.zone).ZoneBounds(); !change.IsZero() && rapid.IntRange(0, 3).Draw(t, "near") > 0 {
			from = change.Add(-time.Duration(rapid.IntRange(0, 30*60).Draw(t, "before")) * time.Minute)
		}
		got := s.Next(from)
		for m := from.Truncate(time.Minute).Add(time.Minute); m.Before(from.Add(60 * time.Hour)); m = m.Add(time.Minute) {
			if s.mismatch(m.In(s.zone)) == 0 {
				if !got.Equal(m) {
					t.Fatalf("after %s: %s, want %s", from.In(s.zone), got.In(s.zone), m.In(s.zone))
				}
				return
			}
		}
		if got.Before(from.Add(60 * time.Hour)) {
			t.Fatalf("after %s: %s, which the schedule does not name", from, got.In(s.zone))
		}
	})
}

func TestDue(t *testing.T) {
	s := timetable(t, "*/10 * * * *", "")
	at := func(clock string) time.Time {
		if clock == "" {
			return time.Time{}
		}
		out, err := time.Parse(time.RFC3339, "2026-11-02T"+clock+"Z")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for _, tt := range []struct {
		first, now string
		deadline   time.Duration
		want       string
	}{
		{"12:10:00", "12:10:00", time.Minute, "12:10:00"},
		{"12:10:00", "12:10:59", time.Minute, "12:10:00"},
		{"12:10:00", "12:11:01", time.Minute, ""},
		{"12:10:00", "12:35:00", time.Hour, "12:30:00"},
		{"12:10:00", "12:35:00", time.Minute, ""},
		{"12:10:00", "12:09:00", time.Hour, ""},
	} {
		if got := s.Due(at(tt.first), at(tt.now), tt.deadline); !got.Equal(at(tt.want)) {
			t.Errorf("from %s at %s within %s: %s", tt.first, tt.now, tt.deadline, got)
		}
	}
}
