//go:build race

package procs

// raceDetector: the tests run with the race detector, and so does the program.
const raceDetector = true
