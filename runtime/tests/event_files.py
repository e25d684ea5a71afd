"""Reads what reached TensorBoard's files."""


def read_events(folder):
  """[(step, tag, value)] of the event files in a folder, oldest file first."""
  import tensorflow as tf

  found = []
  for path in sorted(folder.iterdir()):
    for event in tf.compat.v1.train.summary_iterator(str(path)):
      for value in event.summary.value:
        content = tf.make_ndarray(value.tensor)
        content = content.item() if content.ndim == 0 else content[0]
        found.append((event.step, value.tag, content))
  return found
