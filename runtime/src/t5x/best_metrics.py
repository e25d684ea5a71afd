"""Metrics that a run wrote for TensorBoard, by step: to tell the best checkpoints."""

from collections.abc import Iterable, Mapping

from etils import epath


def _scalars(folder: epath.Path, tag: str) -> dict[int, float]:
  """All values of a tag in a folder's event files; of one step, the last written."""
  # TensorBoard takes a second to import, and few runs rank their checkpoints.
  from tensorboard.backend.event_processing import event_file_loader
  from tensorboard.util import tensor_util

  values = {}
  for file in sorted(folder.glob('*tfevents*')):
    for event in event_file_loader.EventFileLoader(str(file)).Load():
      for value in event.summary.value:
        if value.tag == tag and value.HasField('tensor'):
          array = tensor_util.make_ndarray(value.tensor)
          if array.size == 1:
            values[event.step] = float(array.item())
  return values


def populate_metrics_for_steps(
    checkpoints_dir: str, metric_name: str, steps: Iterable[int]
) -> Mapping[int, float]:
  """Reads a metric back.

  Args:
    checkpoints_dir: a model's folder; metrics are in its subfolders.
    metric_name: `<subfolder>/<tag>`, for instance 'train/accuracy' or
      'inference_eval/my_task/eval/bleu'; either part may contain slashes, and the
      longest subfolder that exists is taken.
    steps: the steps wanted.

  Returns:
    step -> value, for those of the steps that have one.
  """
  parts = metric_name.split('/')
  wanted = set(steps)
  for cut in range(len(parts) - 1, 0, -1):
    folder = epath.Path(checkpoints_dir).joinpath(*parts[:cut])
    if folder.is_dir():
      found = _scalars(folder, '/'.join(parts[cut:]))
      if found:
        return {step: value for step, value in found.items() if step in wanted}
  return {}
