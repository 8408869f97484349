package main

import "hash/maphash"

const mostDropped = 1 << 16

const droppedCause = "it ran before and its record was dropped: how it ended is not known any more, and it does not run again"

// dropped remembers which op ids had a command whose record is gone, so that none runs a second time.
// Of each it keeps two hashes: 16 bytes of an id and a digest that may have 100 each.
type dropped struct {
	seed    maphash.Seed
	digests map[uint64]uint64 // by op id
	order   []uint64          // oldest first
}

func newDropped() *dropped {
	return &dropped{seed: maphash.MakeSeed(), digests: map[uint64]uint64{}}
}

func (d *dropped) hash(s string) uint64 { return maphash.String(d.seed, s) }

func (d *dropped) add(c *command) {
	id := d.hash(c.id)
	d.digests[id] = d.hash(c.digest)
	d.order = append(d.order, id)
	if len(d.order) > mostDropped {
		delete(d.digests, d.order[0])
		d.order = d.order[1:]
	}
}

func (d *dropped) has(id string) bool {
	_, known := d.digests[d.hash(id)]
	return known
}

// sameDigest is for an id that it has.
func (d *dropped) sameDigest(id, digest string) bool { return d.digests[d.hash(id)] == d.hash(digest) }

// ghost stands for a command whose record was dropped: finished, without output, and nobody knows how.
func (r *registry) ghost(id, digest string) *command {
	c := newCommand(r, id, digest)
	c.result.State, c.result.Status, c.result.Cause = "finished", pointer(statusUnknown), pointer(droppedCause)
	for i := range c.streams {
		c.streams[i] = newStream("", 0, r.rings)
		c.streams[i].end()
	}
	close(c.counts)
	close(c.started)
	close(c.finished)
	return c
}
