// Command program is what the tests of runtimes run: it does what its first
// argument says.
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"syscall"
	"time"
)

func main() {
	mode, args := os.Args[1], os.Args[2:]
	switch mode {
	case "wait": // until it is told to stop
		wait()
	case "exit":
		os.Exit(number(args[0]))
	case "exit-after": // milliseconds, code
		time.Sleep(time.Duration(number(args[0])) * time.Millisecond)
		os.Exit(number(args[1]))
	case "stubborn": // does not stop
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("ready")
		time.Sleep(time.Hour)
	case "lines": // so many on each output, and ends
		for i := range number(args[0]) {
			fmt.Fprintf(os.Stdout, "out %d\n", i)
			fmt.Fprintf(os.Stderr, "err %d\n", i)
		}
	case "drip": // a line every ten milliseconds, so many
		for i := range number(args[0]) {
			fmt.Printf("drip %d\n", i)
			time.Sleep(10 * time.Millisecond)
		}
	case "env":
		env := os.Environ()
		slices.Sort(env)
		for _, pair := range env {
			fmt.Println(pair)
		}
	case "where":
		dir, _ := os.Getwd()
		fmt.Printf("%d %d %s\n", os.Getuid(), os.Getgid(), dir)
	case "eat": // so many MiB, and waits
		var eaten [][]byte
		for range number(args[0]) {
			b := make([]byte, 1<<20)
			for i := range b {
				b[i] = 1
			}
			eaten = append(eaten, b)
		}
		fmt.Println("ready", len(eaten))
		wait()
	case "burn":
		go func() {
			for {
				strconv.Itoa(len(os.Args))
			}
		}()
		wait()
	case "leave": // a child in a session of its own that does not stop
		child := exec.Command("/proc/self/exe", "stubborn")
		child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := child.Start(); err != nil {
			panic(err)
		}
		fmt.Println("child", child.Process.Pid)
		if len(args) > 0 {
			return
		}
		wait()
	case "serve": // HTTP on $PORT
		listener, err := net.Listen("tcp", ":"+os.Getenv("PORT"))
		if err != nil {
			panic(err)
		}
		err = http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintln(w, os.Getenv("PERSYS_WORKLOAD"), os.Getenv("PERSYS_REPLICA"))
		}))
		panic(err)
	case "cat":
		data, err := os.ReadFile(args[0])
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Stdout.Write(data)
	case "write":
		if err := os.WriteFile(args[0], []byte("written\n"), 0o644); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	default:
		os.Exit(99)
	}
}

func wait() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	fmt.Println("ready")
	<-stop
	fmt.Println("stopping")
}

func number(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		panic(err)
	}
	return n
}
