"""Our TFRecords and Examples are TensorFlow's."""

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies

from bart_t5x import shards


def crc32c_by_bits(content):
  crc = 0xFFFFFFFF
  for byte in content:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def test_crc_of_the_standard():
  assert shards.crc32c(b'123456789') == 0xE3069283  # RFC 3720's check value
  assert shards.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


@pytest.mark.parametrize('size', [0, 1, 2, 3, 4, 5, 1023, 1024, 1025, 1027, 1028, 5000])
def test_crc_by_slow_definition(size):
  content = np.random.default_rng(size).bytes(size)
  assert shards.crc32c(content) == crc32c_by_bits(content)


@hypothesis.given(strategies.lists(strategies.integers(0, 2**63 - 1), max_size=50))
def test_example_is_read_by_tensorflow(values):
  content = shards.example({'b': values, 'a': [7]})
  parsed = tf.train.Example.FromString(content)
  assert list(parsed.features.feature['b'].int64_list.value) == values
  assert list(parsed.features.feature['a'].int64_list.value) == [7]
  # Byte for byte what TensorFlow writes, names sorted.
  assert parsed.SerializeToString(deterministic=True) == content or not values


@pytest.mark.parametrize('value', [0, 1, 127, 128, 16383, 16384, 2**32, 2**63 - 1])
def test_varints_at_their_limits(value):
  values = [value, 0, value]
  parsed = tf.train.Example.FromString(shards.example({'x': np.array(values)}))
  assert list(parsed.features.feature['x'].int64_list.value) == values


def test_shards_are_read_by_tensorflow(tmp_path):
  contents = [shards.example({'tokens': range(i)}) for i in range(10)]
  with shards.ShardWriter(str(tmp_path), 'train', 3) as writer:
    for content in contents:
      writer.write(shards.record(content))
  read = []
  for name in shards.shard_names('train', 3):
    read.append(list(tf.data.TFRecordDataset(str(tmp_path / name)).as_numpy_iterator()))
  assert read == [contents[0::3], contents[1::3], contents[2::3]]


def test_a_flipped_byte_is_noticed(tmp_path):
  framed = bytearray(shards.record(shards.example({'tokens': range(100)})))
  framed[40] ^= 1
  (tmp_path / 'x').write_bytes(framed)
  with pytest.raises(tf.errors.DataLossError):
    list(tf.data.TFRecordDataset(str(tmp_path / 'x')))


def test_writer_closes_on_errors(tmp_path):
  with pytest.raises(KeyError):
    with shards.ShardWriter(str(tmp_path), 'train', 2) as writer:
      raise KeyError
  assert all(f.closed for f in writer._files)
