package scheduler

import (
	"cmp"
	"maps"
	"slices"
	"strconv"

	"google.golang.org/protobuf/proto"

	"github.com/persys-dev/persys/internal/model"
	pb "github.com/persys-dev/persys/proto/persys/v1"
)

// gear is a node's devices and storage pools and what is taken of them; nil
// where there is nothing of the kind.
type gear struct {
	devices []*pb.Device
	pools   []*pb.StoragePool
	// Sorted. As with ports, a device may be in it twice for a moment.
	taken []deviceUse
	used  map[string]int64
}

func (g *gear) clone() *gear {
	if g == nil {
		return nil
	}
	return &gear{g.devices, g.pools, slices.Clone(g.taken), maps.Clone(g.used)}
}

type deviceUse struct{ name, id string }

func (a deviceUse) compare(b deviceUse) int {
	return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.id, b.id))
}

func (g *gear) free(u deviceUse) bool {
	_, taken := slices.BinarySearchFunc(g.taken, u, deviceUse.compare)
	return !taken
}

// equipment is what a replica has of its node's devices and storage pools; nil
// where it has nothing.
type equipment struct {
	devices []*pb.AssignedDevice
	storage []*pb.AssignedStorage
}

func equipmentOf(devices []*pb.AssignedDevice, storage []*pb.AssignedStorage) *equipment {
	if len(devices)+len(storage) == 0 {
		return nil
	}
	return &equipment{devices, storage}
}

func (e *equipment) uses() []deviceUse {
	if e == nil {
		return nil
	}
	var out []deviceUse
	for _, d := range e.devices {
		for _, id := range d.Ids {
			out = append(out, deviceUse{d.Name, id})
		}
	}
	return out
}

func (e *equipment) bytes(pool string) int64 {
	var n int64
	if e != nil {
		for _, s := range e.storage {
			if s.Pool == pool {
				n += s.Bytes
			}
		}
	}
	return n
}

// plus is both.
func (e *equipment) plus(more *equipment) *equipment {
	if e == nil || more == nil {
		return cmp.Or(e, more)
	}
	return &equipment{slices.Concat(e.devices, more.devices), slices.Concat(e.storage, more.storage)}
}

// beyond is what e has more than own.
func (e *equipment) beyond(own *equipment) *equipment {
	if e == nil || own == nil {
		return e
	}
	has := own.uses()
	out := &equipment{}
	for _, d := range e.devices {
		more := &pb.AssignedDevice{Name: d.Name}
		for _, id := range d.Ids {
			if !slices.Contains(has, deviceUse{d.Name, id}) {
				more.Ids = append(more.Ids, id)
			}
		}
		out.devices = append(out.devices, more)
	}
	for _, s := range e.storage {
		if n := s.Bytes - own.bytes(s.Pool); n > 0 {
			out.storage = append(out.storage, &pb.AssignedStorage{Pool: s.Pool, Bytes: n})
		}
	}
	return out
}

func (n *node) equip(e *equipment) {
	if e == nil {
		return
	}
	if n.gear == nil {
		n.gear = &gear{}
	}
	g := n.gear
	for _, u := range e.uses() {
		i, _ := slices.BinarySearchFunc(g.taken, u, deviceUse.compare)
		g.taken = slices.Insert(g.taken, i, u)
	}
	for _, s := range e.storage {
		if g.used == nil {
			g.used = map[string]int64{}
		}
		g.used[s.Pool] += s.Bytes
	}
}

func (n *node) unequip(e *equipment) {
	if e == nil {
		return
	}
	g := n.gear
	for _, u := range e.uses() {
		if i, ok := slices.BinarySearchFunc(g.taken, u, deviceUse.compare); ok {
			g.taken = slices.Delete(g.taken, i, i+1)
		}
	}
	for _, s := range e.storage {
		if g.used[s.Pool] -= s.Bytes; g.used[s.Pool] == 0 {
			delete(g.used, s.Pool)
		}
	}
	g.tidy(n)
}

// regear takes in what the node's record says, and reports whether it is news.
func (n *node) regear(devices []*pb.Device, pools []*pb.StoragePool) bool {
	if n.gear == nil {
		n.gear = &gear{}
	}
	g := n.gear
	news := !slices.EqualFunc(g.devices, devices, func(a, b *pb.Device) bool { return proto.Equal(a, b) }) ||
		!slices.EqualFunc(g.pools, pools, func(a, b *pb.StoragePool) bool { return proto.Equal(a, b) })
	g.devices, g.pools = devices, pools
	g.tidy(n)
	return news
}

func (g *gear) tidy(n *node) {
	if len(g.devices)+len(g.pools)+len(g.taken)+len(g.used) == 0 {
		n.gear = nil
	}
}

// deviceWish and storageWish are what a replica asks for.
type deviceWish struct {
	name        string
	count       int
	constraints []constraint
}

type storageWish struct {
	pool, driver string
	bytes        int64
}

// wishesForGear reads what resources ask for; storage that names its pool or
// driver comes first, since it has the least choice.
func wishesForGear(r *pb.Resources) ([]deviceWish, []storageWish, error) {
	var devices []deviceWish
	for _, d := range r.GetDevices() {
		wish := deviceWish{name: d.Name, count: max(1, int(d.Count))}
		for _, c := range d.Constraints {
			wish.constraints = append(wish.constraints, compile(c))
		}
		devices = append(devices, wish)
	}
	var storage []storageWish
	for _, s := range r.GetStorage() {
		n, err := model.ParseBytes(s.Size)
		if err != nil {
			return nil, nil, err
		}
		storage = append(storage, storageWish{s.Pool, s.Driver, n})
	}
	choice := func(w storageWish) int {
		switch {
		case w.pool != "":
			return 0
		case w.driver != "":
			return 1
		}
		return 2
	}
	slices.SortStableFunc(storage, func(a, b storageWish) int { return cmp.Compare(choice(a), choice(b)) })
	return devices, storage, nil
}

func (f *filter) appendGear(key []byte) []byte {
	for _, d := range f.devices {
		key = strconv.AppendInt(strconv.AppendQuote(append(key, 0, 3), d.name), int64(d.count), 10)
		for _, c := range d.constraints {
			key = appendConstraint(key, c.Constraint)
		}
	}
	for _, s := range f.storage {
		key = strconv.AppendInt(strconv.AppendQuote(strconv.AppendQuote(append(key, 0, 4), s.pool), s.driver), s.bytes, 10)
	}
	return key
}

// appendGearOf is what of a node's gear its class depends on: all but the names
// of its devices.
func appendGearOf(key []byte, rec *pb.Node) []byte {
	for _, d := range rec.Devices {
		key = strconv.AppendInt(strconv.AppendQuote(append(key, 0, 3), d.Name), int64(len(d.Ids)), 10)
		for _, name := range sortedKeys(d.Attributes) {
			key = strconv.AppendQuote(strconv.AppendQuote(key, name), d.Attributes[name])
		}
	}
	for _, s := range rec.StoragePools {
		key = strconv.AppendInt(strconv.AppendQuote(strconv.AppendQuote(append(key, 0, 4), s.Name), s.Driver), s.CapacityBytes, 10)
	}
	return key
}

func (w *deviceWish) accepts(d *pb.Device) bool {
	return d.Name == w.name && !slices.ContainsFunc(w.constraints, func(c constraint) bool { return !c.holds(d.Attributes) })
}

func (w *storageWish) accepts(s *pb.StoragePool) bool {
	return (w.pool == "" || w.pool == s.Name) && (w.driver == "" || w.driver == s.Driver)
}

func (w *storageWish) text() string {
	switch {
	case w.pool != "":
		return "storage pool " + w.pool
	case w.driver != "":
		return "storage of driver " + w.driver
	}
	return "storage"
}

// gearOfClass says what of the gear a node of the class has not, or not enough
// of, even when nothing of it is taken.
func (f *filter) gearOfClass(c *class) (string, bool) {
	if len(f.devices)+len(f.storage) == 0 {
		return "", false
	}
	all := &gear{devices: c.devices, pools: c.pools}
	if _, lack := f.equip(all, nil, nil); lack != "" {
		return "lacks " + lack, true
	}
	return "", false
}

// equip chooses devices and pools for a replica, or says of what there is not
// enough. What kept has is chosen again where it can be; own is what the caller
// gives back in the same step.
func (f *filter) equip(g *gear, kept, own *equipment) (*equipment, string) {
	if len(f.devices)+len(f.storage) == 0 {
		return nil, ""
	}
	if g == nil {
		g = &gear{}
	}
	out := &equipment{}
	mine, before := own.uses(), kept.uses()
	for i := range f.devices {
		chosen := f.devices[i].choose(g, before, mine)
		if chosen == nil {
			return nil, "device " + f.devices[i].name
		}
		out.devices = append(out.devices, chosen)
	}
	room := make([]int64, len(g.pools))
	for i, p := range g.pools {
		room[i] = p.CapacityBytes - g.used[p.Name] + own.bytes(p.Name)
	}
	picks := make([]int, len(f.storage))
	if lack := f.fillPools(g, kept, room, picks, 0); lack != "" {
		return nil, lack
	}
	for i, at := range picks {
		p := g.pools[at]
		out.storage = append(out.storage, &pb.AssignedStorage{Pool: p.Name, Bytes: f.storage[i].bytes, Path: p.Path})
	}
	return out, ""
}

// choose takes devices in the order of the configuration, those of before first.
func (w *deviceWish) choose(g *gear, before, mine []deviceUse) *pb.AssignedDevice {
	out := &pb.AssignedDevice{Name: w.name}
	for _, again := range []bool{true, false} {
		for _, d := range g.devices {
			if !w.accepts(d) {
				continue
			}
			for i, id := range d.Ids {
				u := deviceUse{d.Name, id}
				if len(out.Ids) == w.count || slices.Contains(before, u) != again || !g.free(u) && !slices.Contains(mine, u) {
					continue
				}
				out.Ids = append(out.Ids, id)
				if i < len(d.Paths) {
					out.Paths = append(out.Paths, d.Paths[i])
				}
			}
		}
	}
	if len(out.Ids) < w.count {
		return nil
	}
	return out
}

// fillPools finds a pool for each wish from i on: the one that the replica has
// already, then the one with the most room. Where the choice for one leaves too
// little for a later one, the next is tried.
func (f *filter) fillPools(g *gear, kept *equipment, room []int64, picks []int, i int) string {
	if i == len(f.storage) {
		return ""
	}
	w := &f.storage[i]
	var order []int
	for at, p := range g.pools {
		if w.accepts(p) && room[at] >= w.bytes {
			order = append(order, at)
		}
	}
	slices.SortStableFunc(order, func(a, b int) int {
		x, y := kept.bytes(g.pools[a].Name) > 0, kept.bytes(g.pools[b].Name) > 0
		if x != y {
			if x {
				return -1
			}
			return 1
		}
		return cmp.Compare(room[b], room[a])
	})
	lack := w.text()
	for _, at := range order {
		room[at] -= w.bytes
		picks[i] = at
		lack = f.fillPools(g, kept, room, picks, i+1)
		room[at] += w.bytes
		if lack == "" {
			return ""
		}
	}
	return lack
}
