package etcd

import (
	"errors"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// Clients know an error by its whole message, whatever it was wrapped in here.
func TestStatusesReachClientsWhole(t *testing.T) {
	for _, known := range []error{rpctypes.ErrGRPCNoLeader, rpctypes.ErrGRPCNoSpace} {
		for _, err := range []error{known, storeError{known}, errors.Join(known)} {
			if got := rpctypes.Error(statusOf(err)); got != rpctypes.Error(known) {
				t.Errorf("%T of %v: %v", err, known, got)
			}
		}
	}
}
