"""Stopping at the step whose loss is not finite, with its batch kept for a look."""

import io

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import PyTree

from t5x.training.trainer_types import BatchType, MetricMapType

# A loss may be fine while its gradients are not: the next loss would tell, and the
# batch at fault would be gone.
_WATCHED = ('loss', 'weight_gradient_norm')


class NonFiniteLossError(FloatingPointError):
  """The loss or its gradients were infinite or not a number.

  Attributes:
    step: number of the step at fault: it began from the state of that step.
    batch_path: the file with its batch; None where it was not kept.
  """

  def __init__(self, step: int, batch_path: str | None):
    self.step, self.batch_path = step, batch_path
    kept = f'in {batch_path}' if batch_path else 'not kept, for want of a folder'
    super().__init__(
      f'The loss or the gradient of step {step} is not finite; its batch is {kept}. '
      'The parameters after it are useless, so training stops and they are not '
      'saved. Start again from the last checkpoint with a lower learning rate, a '
      'longer warm-up or gradient clipping, or look at the batch.'
    )


class HealthGuard:
  """Checks steps in their order, and raises at the first bad one."""

  def __init__(self, folder: str | None):
    """Says where a bad batch goes.

    Args:
      folder: gets `nonfinite_step_<step>[_process_<n>].npz`; None keeps nothing.
    """
    self._folder = folder
    self._raised = False

  def check(self, step: int, batch: BatchType, metrics: MetricMapType) -> None:
    """Checks a step that is done. Behind a bad one all are bad, and pass.

    Args:
      step: its number.
      batch: what it was given.
      metrics: what came out; `loss` and `weight_gradient_norm` are looked at.

    Raises:
      NonFiniteLossError: the step was bad.
    """
    if self._raised:
      return
    watched = jax.device_get([metrics[name] for name in _WATCHED if name in metrics])
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(watched)):
      self._raised = True
      path = _keep(batch, step, self._folder) if self._folder else None
      raise NonFiniteLossError(step, path)


def _own_rows(array: jax.Array) -> np.ndarray:
  """The rows of an array that lie on this process's devices, each once, in order."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  pieces = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


def _keep(batch: PyTree, step: int, folder: str) -> str | None:
  """Writes a batch as NumPy arrays under the names of its features."""
  suffix = f'_process_{jax.process_index()}' if jax.process_count() > 1 else ''
  path = epath.Path(folder) / f'nonfinite_step_{step}{suffix}.npz'
  flat, _ = jax.tree_util.tree_flatten_with_path(batch)
  named = {
    jax.tree_util.keystr(where, simple=True, separator='/') or 'batch': _own_rows(x)
    for where, x in flat
  }
  content = io.BytesIO()
  np.savez(content, **named)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.getvalue())
  except OSError as e:
    # The bad loss is the news: a full disk must not stand in its place.
    logging.error('The batch of step %d could not be kept in %s: %s', step, path, e)
    return None
  return str(path)
