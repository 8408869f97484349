package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
)

func TestASumIsRightInWhateverOrderPiecesCome(t *testing.T) {
	content := make([]byte, 1<<20+12345)
	for i := range content {
		content[i] = byte(rand.Uint32())
	}
	const piece = 100_000
	count := (len(content) + piece - 1) / piece
	for round := range 20 {
		arrived := newArrival()
		for _, n := range rand.Perm(count) {
			part := content[n*piece : min(len(content), (n+1)*piece)]
			arrived.add(bytes.NewReader(content), int64(n*piece), part)
			if round%4 == 3 && n%3 == 0 { // sent again
				arrived.add(bytes.NewReader(content), int64(n*piece), part)
			}
		}
		if got, err := arrived.total(bytes.NewReader(content), int64(len(content))); err != nil || got != sum(content) {
			t.Fatalf("round %d: %s %v", round, got, err)
		}
	}
}

func TestASumOfWhatWasNotToldIsOfWhatIsThere(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789"), 100_000)
	arrived := newArrival()
	arrived.add(bytes.NewReader(content), 500_000, content[500_000:600_000])
	if got, err := arrived.total(bytes.NewReader(content), int64(len(content))); err != nil || got != sum(content) {
		t.Fatalf("%s %v", got, err)
	}
}

func TestPiecesInAnyOrderBecomeTheFile(t *testing.T) {
	c := serve(t).dial(1)
	content := bytes.Repeat([]byte("abcdefgh"), 300_000)
	write := func(from int, commit any) object {
		return object{"verb": "write", "path": "big", "transfer_id": "t", "offset": from, "mkdir": true, "commit": commit}
	}
	for _, n := range []int{2, 0, 1, 1} {
		c.do(write(n*800_000, nil), content[n*800_000:(n+1)*800_000])
	}
	wrong := object{"size": len(content), "sha256": fmt.Sprintf("%064d", 0)}
	c.fails(codeChecksum, write(len(content), wrong), nil)
	for _, n := range []int{1, 0, 2} {
		c.do(write(n*800_000, nil), content[n*800_000:(n+1)*800_000])
	}
	c.do(write(len(content), commitOf(content)), nil)
	got := c.do(object{"verb": "read", "path": "big", "offset": 0, "length": 1 << 20}, nil)
	if !bytes.Equal(got.body, content[:1<<20]) {
		t.Error("the file is not what was sent")
	}
}

func TestSumsOfTransfersThatNobodyEndsAreForgotten(t *testing.T) {
	var s arrivals
	first := s.of("0")
	for n := range mostArrivals {
		s.of(fmt.Sprint(n))
	}
	s.of("one more")
	if len(s.known) > mostArrivals || s.of("0") == first {
		t.Errorf("%d are kept", len(s.known))
	}
}
