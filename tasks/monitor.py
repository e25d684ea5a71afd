"""The headline metric, which decides on the best checkpoint of a fine-tuning run.

Each text task names its own (`add_text_to_text_task`); a mixture has that of its first
task. gin/finetune.gin binds `headline.task` and `headline.metric` to
MIXTURE_OR_TASK_NAME and METRIC (None for the task's own).
"""

import json
import math
import os
import re

import gin
import seqio
import tensorflow as tf

from bart_t5x import metrics
from bart_t5x.data import find_task

_VALIDATION = 'validation'  # the split that is evaluated while training


@gin.configurable(module='tasks.monitor')
def headline(
  task: str = gin.REQUIRED,
  metric: str | None = None,
  module: str | None = None,
  check_libraries: bool = False,
) -> tuple[str, str]:
  """Returns the task to monitor (of a mixture, one of its tasks) and its metric.

  Args:
    task: a task or mixture.
    metric: None for the one that the task was registered with.
    module: imported first, if given: it registers the task.
    check_libraries: whether to raise an ImportError if a metric needs a library that is
      not installed.
  """
  members = [
    member
    for member in seqio.get_subtasks(find_task(task, module))
    if _VALIDATION in member.splits and member.metric_fns
  ]
  if check_libraries:
    for member in members:
      metrics.check_libraries(member.metric_fns)
  for member in members:
    if found := metric or getattr(member, 'headline', None):
      return member.name, found
  if not members:
    raise ValueError(f'{task!r} has no split {_VALIDATION!r} with metrics')
  raise ValueError(
    f'{task!r} has no headline metric, which decides on the best checkpoint. Name it: '
    '--gin.METRIC="\'accuracy\'"'
  )


def tensorboard_name() -> str:
  """Returns the headline's tag in event files; checks the metrics' libraries."""
  task, metric = headline(check_libraries=True)
  return f'inference_eval/{task}/eval/{metric}'


@gin.configurable(module='tasks.monitor')
def best_checkpoint(path: str) -> str:
  """Returns a fine-tuning run's best checkpoint by its headline metric, first if equal.

  The path of a checkpoint is returned as it is.
  """
  if re.search(r'checkpoint_\d+/*$', path):
    return path
  task, metric = headline()
  results = os.path.join(path, 'inference_eval', f'{task}-metrics.jsonl')
  if not tf.io.gfile.exists(results):
    raise FileNotFoundError(
      f'{path!r} is neither a checkpoint (…/checkpoint_<step>) nor the folder of a run '
      f'that has evaluated {task!r}: {results} does not exist'
    )
  with tf.io.gfile.GFile(results) as f:
    evaluations = [json.loads(line) for line in f if line.strip()]
  values = {
    e['step']: e[metric]
    for e in evaluations
    if metric in e and not math.isnan(e[metric])
  }
  kept = {
    step: folder
    for step in values
    if tf.io.gfile.exists(folder := os.path.join(path, f'checkpoint_{step}'))
  }
  if not kept:
    raise FileNotFoundError(
      f'{path!r} has no checkpoint with a value of {metric!r}. {results} has values at '
      f'the steps {sorted(values)}.'
    )
  return kept[max(kept, key=lambda step: (values[step], -step))]
