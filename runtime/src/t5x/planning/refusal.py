"""Why a step does not fit: what fills the memory, and what to change."""

import re
from collections.abc import Callable, Sequence

from t5x.planning import report
from t5x.planning.live_arrays import LargeArray
from t5x.planning.step_costs import DoesNotFitError

# Arrays that are listed.
_MOST_LINES = 8
# What takes less of all that is held is not worth a change.
_LEAST_SHARE = 0.02

# Scores have two lengths as their last axes; projections have heads there.
_SHORTEST_SCORES = 128


def _is_argument(array: LargeArray) -> bool:
  return not array.where


def _is_scores(array: LargeArray) -> bool:
  attends = 'attention' in array.where or 'attend' in array.where
  return attends and len(array.shape) > 3 and min(array.shape[-2:]) >= _SHORTEST_SCORES


def _is_logits(array: LargeArray) -> bool:
  words = ('logits', 'loss', 'project', '->...v')
  return any(word in array.where for word in words)


def _is_activation(array: LargeArray) -> bool:
  return not _is_argument(array)


# (name, which arrays, what to change, whether for training only) by what it saves most.
_REMEDIES: tuple[tuple[str, Callable[[LargeArray], bool], str, bool], ...] = (
  (
    'attention scores',
    _is_scores,
    'attend without storing them, by a kernel of the platform or in chunks '
    "(bart_t5x: network.BartConfig.attention_impl = 'auto' or 'chunked')",
    False,
  ),
  (
    'logits',
    _is_logits,
    'take the loss of fewer positions at a time (bart_t5x: '
    'model.BartModel.loss_chunk_length)',
    False,
  ),
  (
    'what the backward pass needs',
    lambda array: _is_activation(array) and not _is_logits(array),
    'compute more of it again (bart_t5x: network.BartConfig.remat_policy = '
    "'attention', 'dots' or, least memory, 'full')",
    True,
  ),
  (
    'all that grows with the batch',
    _is_activation,
    'fewer rows a batch (--find_batch finds how many fit), or for training the same '
    'rows in parts: trainer.Trainer.num_microbatches = 2 halves it',
    False,
  ),
  (
    'parameters and optimizer state',
    _is_argument,
    'more devices a copy of the model (partitioning.PjitPartitioner.num_partitions)',
    False,
  ),
)


def text(error: DoesNotFitError, kind: str = 'train') -> str:
  """By how much a step does not fit, what it holds and what to change.

  Args:
    error: what was raised.
    kind: train, eval or decode.
  """
  lines = [str(error)]
  whole = sum(array.total for array in error.held)
  if error.held:
    lines.append(
      'As traced, before the compiler fuses and shares, a device holds '
      f'{report.size_text(whole)} at the fullest moment (shapes over all devices):'
    )
    lines += _listed(error.held)
  lines.append('What to change:')
  for name, belongs, change, training in _REMEDIES:
    share = sum(array.total for array in error.held if belongs(array))
    if (training and kind != 'train') or share < _LEAST_SHARE * whole:
      continue
    size = f' ({report.size_text(share)})' if share else ''
    lines.append(f'  - {name}{size}: {change}')
  return '\n'.join(lines)


def _listed(held: Sequence[LargeArray]) -> list[str]:
  """A line for each of the largest arrays, one for the arguments, one for the rest."""
  made = [array for array in held if not _is_argument(array)]
  lines = [
    (array.total, f'{array.count} x {array.dtype}[{",".join(map(str, array.shape))}], '
     f'the first in {place(array.where)}')
    for array in made[:_MOST_LINES]
  ]  # fmt: skip
  arguments = sum(array.total for array in held if _is_argument(array))
  lines.append((arguments, 'parameters, optimizer state and the batch'))
  others = made[_MOST_LINES:]
  lines.append((sum(array.total for array in others), 'smaller ones'))
  return [f'  {report.size_text(size):>10}  {what}' for size, what in lines if size]


def place(where: str) -> str:
  """A name for readers: without passes, and each module once."""
  parts = where.split('/')
  # 'jvp(Transformer.hidden)' is a pass, 'Decoder.start' a method; 'd,vd->v' stays.
  kept = [p for p in parts if '->' in p or not re.search(r'[().]|^remat', p)]
  return '/'.join(dict.fromkeys(kept))
