package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

func (a *app) exportContext() *cobra.Command {
	return &cobra.Command{
		Use: "export DIR", Short: "Write the certificates of the context as files for etcdctl and curl", Args: takes("DIR"),
		Long: `Writes ca.crt, client.crt and client.key into the directory, readable by you only,
and prints the variables with which etcdctl uses them. They are yours: whoever has
the key is you.`,
		Example: "  eval \"$(persys context export ~/.persys-etcd)\"; etcdctl member list",
		RunE: func(_ *cobra.Command, args []string) error {
			t, err := a.target()
			if err != nil {
				return err
			}
			certificate, key, roots, err := t.creds.PEM()
			if err != nil {
				return err
			}
			dir, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return fmt.Errorf("export: %w", err)
			}
			variables := []string{"ETCDCTL_API=3", "ETCDCTL_ENDPOINTS=" + strings.Join(t.endpoints, ",")}
			for _, file := range []struct {
				name, variable string
				data           []byte
			}{{"ca.crt", "CACERT", roots}, {"client.crt", "CERT", certificate}, {"client.key", "KEY", key}} {
				path := filepath.Join(dir, file.name)
				if err := replaceFile(path, file.data); err != nil {
					return fmt.Errorf("export: %w", err)
				}
				variables = append(variables, fmt.Sprintf("ETCDCTL_%s=%s", file.variable, shellQuoted(path)))
			}
			_, err = fmt.Fprintf(a.Stdout, "export %s\n", strings.Join(variables, "\nexport "))
			return err
		},
	}
}

// shellQuoted is a word for sh.
func shellQuoted(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
