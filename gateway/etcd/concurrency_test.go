package etcd

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"testing"

	"go.etcd.io/etcd/client/v3/concurrency"
	"golang.org/x/sync/errgroup"
)

// Money is moved between accounts by clients at all replicas; none is made and none
// is lost, but where nothing is compared.
func TestTransfersKeepTheSum(t *testing.T) {
	c := newCluster(t, 3, nil)
	for name, isolation := range map[string]concurrency.Isolation{
		"serializable snapshot": concurrency.SerializableSnapshot,
		"serializable":          concurrency.Serializable,
		"repeatable reads":      concurrency.RepeatableReads,
		"read committed":        concurrency.ReadCommitted,
	} {
		t.Run(name, func(t *testing.T) {
			const accounts, each, clients, transfers = 5, 100, 6, 20
			ctx := within(t, 2*patience)
			client := c.client()
			account := func(i int) string { return fmt.Sprint(name, "/account/", i) }
			for i := range accounts {
				if _, err := client.Put(ctx, account(i), strconv.Itoa(each)); err != nil {
					t.Fatal(err)
				}
			}
			var g errgroup.Group
			for i := range clients {
				client := c.client(c.replicas[i%len(c.replicas)].endpoint)
				random := rand.New(rand.NewPCG(1, uint64(i)))
				g.Go(func() error {
					for range transfers {
						from, to := account(random.IntN(accounts)), account(random.IntN(accounts))
						_, err := concurrency.NewSTM(client, func(stm concurrency.STM) error {
							if from == to {
								return nil
							}
							has, err := strconv.Atoi(stm.Get(from))
							if err != nil {
								return err
							}
							gets, err := strconv.Atoi(stm.Get(to))
							if err != nil {
								return err
							}
							stm.Put(from, strconv.Itoa(has-1))
							stm.Put(to, strconv.Itoa(gets+1))
							return nil
						}, concurrency.WithIsolation(isolation), concurrency.WithAbortContext(ctx))
						if err != nil {
							return err
						}
					}
					return nil
				})
			}
			if err := g.Wait(); err != nil {
				t.Fatal(err)
			}
			sum := 0
			for i := range accounts {
				got, err := client.Get(ctx, account(i))
				if err != nil || len(got.Kvs) != 1 {
					t.Fatalf("%v, %v", got, err)
				}
				n, err := strconv.Atoi(string(got.Kvs[0].Value))
				if err != nil {
					t.Fatal(err)
				}
				sum += n
			}
			if isolation != concurrency.ReadCommitted && sum != accounts*each {
				t.Errorf("the sum is %d, want %d", sum, accounts*each)
			}
		})
	}
}
