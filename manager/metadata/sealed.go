package metadata

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/containerd/errdefs"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Seal gives a record as it is kept outside of the database: a CRC-32C (Castagnoli) of what follows, 4 bytes, little
// endian, then the record.
func Seal(r Record) ([]byte, error) {
	body, err := r.Marshal()
	if err != nil {
		return nil, err
	}
	return append(binary.LittleEndian.AppendUint32(nil, crc32.Checksum(body, castagnoli)), body...), nil
}

// Unseal reads what Seal made into r, which must be empty. DataLoss when it is cut short or damaged.
func Unseal(data []byte, r Record) error {
	if len(data) < 4 || binary.LittleEndian.Uint32(data) != crc32.Checksum(data[4:], castagnoli) {
		return fmt.Errorf("a record of %d bytes is damaged: %w", len(data), errdefs.ErrDataLoss)
	}
	if err := r.Unmarshal(data[4:]); err != nil {
		return fmt.Errorf("a record of %d bytes is damaged: %w: %w", len(data), err, errdefs.ErrDataLoss)
	}
	return nil
}
