"""Finding the damaged file of a dataset that says only that there is one."""

import re

import pytest
import tensorflow as tf

from t5x import data_damage


def in_turn(paths):
  files = tf.data.Dataset.from_tensor_slices(paths)
  return files.interleave(lambda path: tf.data.TFRecordDataset(path), cycle_length=2)


# The files are named inside of functions, as by a task with epochs, or outside.
READERS = {
  'epochs': lambda paths: tf.data.Dataset.range(2).flat_map(lambda _: in_turn(paths)),
  'once': in_turn,
  'a list': lambda paths: tf.data.TFRecordDataset(paths),
}


@pytest.mark.parametrize('reader', READERS.values(), ids=READERS)
@pytest.mark.parametrize('damage', ['changed', 'cut off'])
def test_the_file_is_found_in_the_graph(tmp_path, damage, reader):
  paths = [tmp_path / f'{i}.tfrecord' for i in range(3)]
  for path in paths:
    with tf.io.TFRecordWriter(str(path)) as writer:
      for _ in range(4):
        writer.write(b'a record')
  content = bytearray(paths[1].read_bytes())
  content[14] ^= 1
  paths[1].write_bytes(content if damage == 'changed' else content[:-3])

  ds = reader(list(map(str, paths)))
  # A vocabulary's words are strings in the graph as well.
  words = tf.constant(['a', 'record', 'a/record'])
  ds = ds.map(
    lambda record: tf.strings.length(record) + tf.cast(words[0] == record, tf.int32)
  )
  with pytest.raises(tf.errors.DataLossError) as raised:
    list(ds)
  assert data_damage.damaged_file(ds, raised.value) == str(paths[1])
  said = data_damage.said(raised.value)
  assert re.fullmatch(r'(corrupted|truncated) record at \d+', said)


def test_a_file_that_can_be_read_by_now_is_not_blamed(tmp_path):
  path = tmp_path / 'whole.tfrecord'
  with tf.io.TFRecordWriter(str(path)) as writer:
    writer.write(b'a record')
  ds = tf.data.TFRecordDataset(str(path))
  error = tf.errors.DataLossError(None, None, 'corrupted record at 0')
  assert data_damage.damaged_file(ds, error) is None
