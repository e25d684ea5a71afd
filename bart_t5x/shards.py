"""TFRecord shards of tokenized documents, written without TensorFlow.

TensorFlow takes seconds to import and each worker process would have to; the formats
are small. A record is framed as in TensorFlow's `record_writer`: the length (8 bytes),
its masked CRC, the content, its masked CRC, all little-endian. The content is a
`tf.train.Example` whose features are packed int64 lists.
"""

import functools
import os
import struct
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

# The Castagnoli polynomial, its bits reversed.
_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
# Bytes that are folded into the checksum at a time.
_CHUNK = 1024


@functools.cache
def _crc_tables() -> np.ndarray:
  """uint32 [_CHUNK, 256]: row k is a byte's part in the CRC k bytes further on."""
  first = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    first = np.where(first & 1, (first >> 1) ^ np.uint32(_POLYNOMIAL), first >> 1)
  tables = np.empty((_CHUNK, 256), np.uint32)
  tables[0] = first
  for k in range(1, _CHUNK):
    tables[k] = (tables[k - 1] >> 8) ^ first[tables[k - 1] & 0xFF]
  return tables


def crc32c(content: bytes) -> int:
  """The CRC-32C (Castagnoli) checksum.

  A CRC is linear, so each byte's part is looked up by its distance from the end, and
  all of them are combined by exclusive or: no loop over bytes.
  """
  tables = _crc_tables()
  data = np.frombuffer(content, np.uint8)
  state = 0xFFFFFFFF
  for begin in range(0, len(data), _CHUNK):
    chunk = data[begin : begin + _CHUNK]
    size = len(chunk)
    if size < 4:
      for byte in chunk.tolist():
        state = (state >> 8) ^ int(tables[0][(state ^ byte) & 0xFF])
      continue
    chunk = chunk.copy()
    chunk[:4] ^= np.frombuffer(struct.pack('<I', state), np.uint8)
    distances = np.arange(size - 1, -1, -1)
    state = int(np.bitwise_xor.reduce(tables[distances, chunk]))
  return state ^ 0xFFFFFFFF


def _masked_crc(content: bytes) -> bytes:
  crc = crc32c(content)
  rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
  return struct.pack('<I', (rotated + _MASK_DELTA) & 0xFFFFFFFF)


def record(content: bytes) -> bytes:
  """Content framed as one TFRecord."""
  length = struct.pack('<Q', len(content))
  return length + _masked_crc(length) + content + _masked_crc(content)


def _varints(values: Integer[np.ndarray, ' n']) -> bytes:
  """Protocol-buffer varints of non-negative integers, one after the other."""
  values = np.asarray(values, np.uint64)
  largest = int(values.max()) if values.size else 0
  groups = max(1, -(-largest.bit_length() // 7))
  # [n, groups]: seven bits each, lowest first; bit 7 says that more follow.
  rest = values[:, np.newaxis] >> np.arange(0, 7 * groups, 7, dtype=np.uint64)
  octets = (rest & 0x7F).astype(np.uint8) | (rest > 0x7F).astype(np.uint8) << 7
  kept = rest > 0
  kept[:, 0] = True
  return octets[kept].tobytes()


def _varint(value: int) -> bytes:
  """One of them: for a single number, NumPy would take twenty times as long."""
  octets = bytearray()
  while value > 0x7F:
    octets.append(value & 0x7F | 0x80)
    value >>= 7
  octets.append(value)
  return bytes(octets)


def _field(number: int, content: bytes) -> bytes:
  """A length-delimited protocol-buffer field."""
  return _varint(number << 3 | 2) + _varint(len(content)) + content


def example(features: dict[str, Sequence[int]]) -> bytes:
  """A serialized `tf.train.Example`.

  Args:
    features: name -> non-negative integers below 2**63.

  Returns:
    Bytes that depend on nothing but the features (names are sorted).
  """
  entries = b''
  for name in sorted(features):
    int64_list = _field(1, _varints(np.asarray(features[name], np.uint64)))
    entry = _field(1, name.encode()) + _field(2, _field(3, int64_list))
    entries += _field(1, entry)
  return _field(1, entries)


class ShardWriter:
  """Deals records out to the shards of a split, in turn."""

  def __init__(self, folder: str, split: str, num_shards: int):
    """Opens all shards.

    Args:
      folder: where they are written.
      split: its name, with which the files' names begin.
      num_shards: number of files.
    """
    names = shard_names(split, num_shards)
    self._files = [open(os.path.join(folder, name), 'xb') for name in names]
    self._next = 0

  def write(self, framed: bytes) -> None:
    """Writes what `record` made."""
    self._files[self._next].write(framed)
    self._next = (self._next + 1) % len(self._files)

  def close(self) -> None:
    """Makes sure that everything is on the disk."""
    for f in self._files:
      f.flush()
      os.fsync(f.fileno())
      f.close()

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if kind is None:
      self.close()
    else:
      for f in self._files:
        # Its folder is about to be removed; the error that is under way counts.
        try:
          f.close()
        except OSError:
          pass


def shard_names(split: str, num_shards: int) -> list[str]:
  """The names of a split's files, in the order of their numbers."""
  return [f'{split}-{i:05d}-of-{num_shards:05d}.tfrecord' for i in range(num_shards)]
