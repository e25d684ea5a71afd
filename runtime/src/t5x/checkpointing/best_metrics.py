"""Metrics that a run wrote for TensorBoard, by step: to tell the best checkpoints."""

import struct
from collections.abc import Iterable, Iterator, Mapping

from etils import epath
from tensorboard.compat.proto import event_pb2
from tensorboard.util import tensor_util


def _events(file: epath.Path) -> Iterator[event_pb2.Event]:
  """Events in a file of TFRecords; ends where a writer stopped in mid-record.

  A record is a length of 8 bytes, 4 bytes of checksum, the content, 4 of checksum.
  TensorBoard's own loader would import TensorFlow for it.
  """
  with file.open('rb') as source:
    while len(header := source.read(12)) == 12:
      (length,) = struct.unpack('<Q', header[:8])
      content = source.read(length)
      if len(content) < length or len(source.read(4)) < 4:
        return
      yield event_pb2.Event.FromString(content)


def _scalars(folder: epath.Path, tag: str) -> dict[int, float]:
  """All values of a tag in a folder's event files; of one step, the last written."""
  values = {}
  for file in sorted(folder.glob('*tfevents*')):
    for event in _events(file):
      for value in event.summary.value:
        if value.tag != tag:
          continue
        if value.HasField('simple_value'):
          values[event.step] = value.simple_value
        elif value.HasField('tensor'):
          array = tensor_util.make_ndarray(value.tensor)
          if array.size == 1:
            values[event.step] = float(array.item())
  return values


def recorded(model_dir: str, metric_name: str) -> dict[int, float]:
  """All values of a metric that a run wrote.

  Args:
    model_dir: a model's folder; metrics are in its subfolders.
    metric_name: `<subfolder>/<tag>`, for instance 'train/accuracy' or
      'inference_eval/my_task/eval/bleu'; either part may contain slashes, and the
      longest subfolder that exists is taken.

  Returns:
    step -> value, in single precision; empty where there is none.
  """
  parts = metric_name.split('/')
  for cut in range(len(parts) - 1, 0, -1):
    folder = epath.Path(model_dir).joinpath(*parts[:cut])
    if folder.is_dir():
      found = _scalars(folder, '/'.join(parts[cut:]))
      if found:
        return found
  return {}


def populate_metrics_for_steps(
  checkpoints_dir: str, metric_name: str, steps: Iterable[int]
) -> Mapping[int, float]:
  """Reads a metric back: step -> value, for those of the steps that have one.

  Args:
    checkpoints_dir: a model's folder.
    metric_name: see `recorded`.
    steps: the steps wanted.
  """
  wanted = set(steps)
  found = recorded(checkpoints_dir, metric_name)
  return {step: value for step, value in found.items() if step in wanted}
