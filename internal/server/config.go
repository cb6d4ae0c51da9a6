package server

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/persys-dev/persys/agent/docker"
	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// Default ports; see docs/architecture.md.
const (
	DefaultHTTPSPort  = 7480
	DefaultGRPCPort   = 7481
	DefaultGossipPort = 7482
)

// noDocker is the DockerHost that leaves Docker out.
const noDocker = "none"

// Config is what a process is started with. The zero value of a field means its
// default, which WithDefaults fills in. The yaml names are those of
// /etc/persys/*.yaml.
type Config struct {
	// DataDir holds everything the process must find again.
	DataDir string `yaml:"data_dir"`
	// Role that the machine is run as; unspecified: what the data directory says.
	Role pb.Role `yaml:"-"`
	// Name of this machine in the cluster, a DNS label; default: what it has
	// joined under, or the host name.
	Name string `yaml:"name"`
	// Bind is the IP address to listen on; default: Advertise, or all.
	Bind string `yaml:"bind"`
	// Advertise is the IP address that others reach this machine by.
	Advertise  string `yaml:"advertise"`
	HTTPSPort  int    `yaml:"https_port"`
	GRPCPort   int    `yaml:"grpc_port"`
	GossipPort int    `yaml:"gossip_port"`

	// Agent makes a server run workloads too.
	Agent bool `yaml:"agent"`
	// Labels of the node, beside those of its token.
	Labels map[string]string `yaml:"labels"`
	// Pool that the node is in; default: "default".
	Pool string `yaml:"pool"`
	// Taints of the node, KEY[=VALUE]:EFFECT.
	Taints []string `yaml:"taints"`
	// Devices that work may be given, one entry for each group of equal ones.
	Devices []DeviceConfig `yaml:"devices"`
	// StoragePools in which work may have room.
	StoragePools []StoragePoolConfig `yaml:"storage_pools"`
	// DockerHost is the engine's address; default: DOCKER_HOST, or the usual
	// socket. "none" leaves Docker out.
	DockerHost string `yaml:"docker_host"`
	// AllowBindRoots are the directories below which bind mounts are allowed.
	AllowBindRoots []string `yaml:"allow_bind_roots"`
	// AllowPrivileged lets containers ask for it.
	AllowPrivileged bool `yaml:"allow_privileged"`
	// CPU, Memory and Disk override what the node offers to workloads, written
	// as in a workload's resources.
	CPU    string `yaml:"cpu"`
	Memory string `yaml:"memory"`
	Disk   string `yaml:"disk"`

	// LeaseTTL is how long a silent node is kept; at least 2 s, default 10 s.
	LeaseTTL time.Duration `yaml:"lease_ttl"`

	Etcd EtcdConfig `yaml:",inline"`

	// LogLevel is debug, info, warn or error; LogFormat is text or json.
	LogLevel  string `yaml:"log_level"`
	LogFormat string `yaml:"log_format"`
}

// DeviceConfig is a group of equal devices.
type DeviceConfig struct {
	Name string   `yaml:"name"`
	IDs  []string `yaml:"ids"`
	// Device files, in the order of the ids; may be left out.
	Paths      []string          `yaml:"paths,omitempty"`
	Attributes map[string]string `yaml:"attributes,omitempty"`
}

// StoragePoolConfig is a directory in which work may have room.
type StoragePoolConfig struct {
	Name string `yaml:"name"`
	// Default: local.
	Driver   string `yaml:"driver,omitempty"`
	Capacity string `yaml:"capacity"`
	Path     string `yaml:"path"`
}

// WithDefaults fills in what was left out, and refuses what can't be.
func (c Config) WithDefaults() (Config, error) {
	if c.DataDir == "" {
		return c, fmt.Errorf("data_dir: missing; say where the process keeps its data")
	}
	dir, err := filepath.Abs(c.DataDir)
	if err != nil {
		return c, fmt.Errorf("data_dir: %w", err)
	}
	c.DataDir = dir
	if c.Name == "" {
		// A machine keeps the name that it has joined under.
		if id, err := loadIdentity(dir); err == nil {
			c.Name = id.Name
		}
	}
	if c.Name == "" {
		host, err := os.Hostname()
		if err != nil {
			return c, fmt.Errorf("name: not given, and the host name is unknown: %w", err)
		}
		c.Name, _, _ = strings.Cut(strings.ToLower(host), ".")
	}
	if !model.IsDNSLabel(c.Name) {
		return c, fmt.Errorf("name: %q is not a DNS label; allowed: lower case letters, digits and inner hyphens, at most 63", c.Name)
	}
	if c.Advertise == "" {
		if c.Advertise, err = ownAddress(c.Bind); err != nil {
			return c, err
		}
	}
	if c.Bind == "" {
		c.Bind = c.Advertise
	}
	for field, ip := range map[string]string{"bind": c.Bind, "advertise": c.Advertise} {
		if net.ParseIP(ip) == nil {
			return c, fmt.Errorf("%s: %q is not an IP address", field, ip)
		}
	}
	if net.ParseIP(c.Advertise).IsUnspecified() {
		return c, fmt.Errorf("advertise: %s can't be reached by others; give this machine's own address", c.Advertise)
	}
	for _, p := range []struct {
		field    string
		port     *int
		standard int
	}{
		{"https_port", &c.HTTPSPort, DefaultHTTPSPort},
		{"grpc_port", &c.GRPCPort, DefaultGRPCPort},
		{"gossip_port", &c.GossipPort, DefaultGossipPort},
	} {
		if *p.port == 0 {
			*p.port = p.standard
		}
		if *p.port < 1 || *p.port > 65535 {
			return c, fmt.Errorf("%s: %d is not a port; allowed: 1 to 65535", p.field, *p.port)
		}
	}
	if c.Etcd, err = c.Etcd.withDefaults(); err != nil {
		return c, err
	}
	if c.LeaseTTL == 0 {
		c.LeaseTTL = 10 * time.Second
	}
	if c.LeaseTTL < 2*time.Second || c.LeaseTTL > time.Hour || c.LeaseTTL%time.Second != 0 {
		return c, fmt.Errorf("lease_ttl: %s; allowed: whole seconds from 2s to 1h", c.LeaseTTL)
	}
	return c, c.check()
}

// check refuses what only the start would find out otherwise: by then a cluster
// has been founded, or a token used.
func (c Config) check() error {
	for _, p := range []struct {
		field, other string
		same         bool
		port         int
	}{
		{"https_port", "grpc_port", c.HTTPSPort == c.GRPCPort, c.GRPCPort},
		{"gossip_port", "grpc_port", c.GossipPort == c.GRPCPort, c.GRPCPort},
		{"gossip_port", "https_port", c.GossipPort == c.HTTPSPort, c.HTTPSPort},
	} {
		if p.same {
			return fmt.Errorf("%s: %d is the %s already; allowed: a port of its own", p.field, p.port, p.other)
		}
	}
	if _, err := newLogger(c); err != nil {
		return err
	}
	if _, err := c.capacity(); err != nil {
		return err
	}
	if err := model.ValidateLabels("labels", c.Labels); err != nil {
		return err
	}
	if err := model.ValidatePool("pool", c.Pool); err != nil {
		return err
	}
	if _, err := c.taints(); err != nil {
		return err
	}
	if _, _, err := c.gear(); err != nil {
		return err
	}
	for _, root := range c.AllowBindRoots {
		if !filepath.IsAbs(root) {
			return fmt.Errorf("allow_bind_roots: %q is relative; allowed: absolute directories", root)
		}
	}
	if c.DockerHost == "" || c.DockerHost == noDocker {
		return nil
	}
	if err := docker.CheckHost(c.DockerHost); err != nil {
		return fmt.Errorf("docker_host: %w, or %s", err, noDocker)
	}
	return nil
}

// ownAddress is the address to advertise where none was given: the bound one,
// or that of the interface which leads to the rest of the network, or loopback.
func ownAddress(bind string) (string, error) {
	if ip := net.ParseIP(bind); ip != nil && !ip.IsUnspecified() {
		return bind, nil
	}
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return "", fmt.Errorf("advertise: not given, and this machine's addresses are unknown: %w", err)
	}
	for _, a := range addresses {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
			return n.IP.String(), nil
		}
	}
	return "127.0.0.1", nil
}

func (c Config) grpcAddress() string   { return hostPort(c.Advertise, c.GRPCPort) }
func (c Config) httpsAddress() string  { return hostPort(c.Advertise, c.HTTPSPort) }
func (c Config) gossipAddress() string { return hostPort(c.Advertise, c.GossipPort) }

func hostPort(ip string, port int) string { return net.JoinHostPort(ip, strconv.Itoa(port)) }
