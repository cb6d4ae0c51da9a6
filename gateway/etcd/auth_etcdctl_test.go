package etcd

import (
	"os/exec"
	"strings"
	"testing"
)

// What Debian's etcdctl shows to somebody who sets up users, roles and permissions.
func TestEtcdctlAuth(t *testing.T) {
	program, err := exec.LookPath("etcdctl")
	if err != nil {
		t.Skip("there is no etcdctl; hack/setup.sh installs it")
	}
	c := newCluster(t, 3, quick)
	endpoints := strings.Join(c.endpoints(), ",")
	for _, step := range []struct{ command, input, want string }{
		{"user add root --interactive=false", "secret", "User root created"},
		{"user add ann:pw", "", "User ann created"},
		{"user add cert --no-password", "", "User cert created"},
		{"user add ann:pw", "", "etcdserver: user name already exists"},
		{"user grant-role root root", "", "Role root is granted to user root"},
		{"role add readers", "", "Role readers created"},
		{"role grant-permission readers read app/ app0", "", "Role readers updated"},
		{"role grant-permission readers --prefix=true readwrite own/", "", "Role readers updated"},
		{"role grant-permission readers --from-key=true write z", "", "Role readers updated"},
		{"user grant-role ann readers", "", "Role readers is granted to user ann"},
		{"role get readers", "", "Role readers\nKV Read:\n\t[app/, app0) (prefix app/)\n\t[own/, own0) (prefix own/)\nKV Write:\n\t[own/, own0) (prefix own/)\n\t[z, <open ended>"},
		{"put app/x before", "", "OK"},
		{"auth enable", "", "Authentication Enabled"},
		{"get app/x", "", "etcdserver: user name is empty"},
		{"--user ann:wrong get app/x", "", "etcdserver: authentication failed, invalid user ID or password"},
		{"--user ann:pw get app/x", "", "app/x\nbefore"},
		{"--user ann --password pw get app/x", "", "app/x\nbefore"},
		{"--user ann:pw put app/x after", "", "etcdserver: permission denied"},
		{"--user ann:pw put own/x mine", "", "OK"},
		{"--user ann:pw put zz mine", "", "OK"},
		{"--user ann:pw get zz", "", "etcdserver: permission denied"},
		{"--user ann:pw del own/ --prefix", "", "1"},
		{"--user ann:pw user get ann", "", "User: ann\nRoles: readers"},
		{"--user ann:pw user list", "", "etcdserver: permission denied"},
		{"--user ann:pw txn", "ver(\"app/x\") > \"0\"\n\nget app/x\n\nput app/x after\n\n", "etcdserver: permission denied"},
		{"--user root:secret user list", "", "ann\ncert\nroot"},
		{"--user root:secret role list", "", "readers"},
		{"--user root:secret user passwd ann --interactive=false", "new", "Password updated"},
		{"--user ann:pw get app/x", "", "etcdserver: authentication failed, invalid user ID or password"},
		{"--user ann:new get app/x", "", "app/x\nbefore"},
		{"--user root:secret role revoke-permission readers app/ app0", "", "Permission of range [app/, app0) is revoked from role readers"},
		{"--user ann:new get app/x", "", "etcdserver: permission denied"},
		{"--user root:secret user revoke-role ann readers", "", "Role readers is revoked from user ann"},
		{"--user ann:new put own/x mine", "", "etcdserver: permission denied"},
		{"--user root:secret role delete readers", "", "Role readers deleted"},
		{"--user root:secret user delete ann", "", "User ann deleted"},
		{"--user root:secret user delete root", "", "etcdserver: invalid auth management"},
		{"--user root:secret endpoint health", "", "is healthy"},
		{"--user root:secret endpoint status", "", "3.7"},
		{"--user root:secret auth disable", "", "Authentication Disabled"},
		{"get app/x", "", "app/x\nbefore"},
	} {
		cmd := exec.CommandContext(within(t, patience), program, append([]string{"--endpoints", endpoints}, strings.Fields(step.command)...)...)
		cmd.Env = append(cmd.Environ(), "ETCDCTL_API=3")
		cmd.Stdin = strings.NewReader(step.input)
		said, _ := cmd.CombinedOutput()
		if !strings.Contains(string(said), step.want) {
			t.Errorf("%s: want %q, got\n%s", step.command, step.want, said)
		}
	}
}
