"""SIGTERM ends a training run between two steps, with a checkpoint.

A machine that is taken back (preemption, a batch system's time limit, `kill`) sends
SIGTERM some seconds before the end. The run then finishes the step it is in, saves, and
exits; started again it goes on from there.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class PreemptionWatch:
  """Tells, between two steps, whether the run has been asked to stop."""

  def __init__(self):
    self._asked = threading.Event()

  def ask(self) -> None:
    """Asks the run to stop after the step it is in."""
    self._asked.set()

  def stop_before(self, step: int) -> bool:
    """Says whether to stop before `step` is taken.

    All processes of a run get the same answer at the same step, though the signal may
    reach one of them only: JAX's coordination service agrees on a step for them.

    Args:
      step: absolute number of the step about to be taken; must rise from call to call.
    """
    if jax.process_count() == 1:
      return self._asked.is_set()
    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def watch_for_preemption() -> Iterator[PreemptionWatch]:
  """Catches SIGTERM inside the `with` block and gives it back afterwards.

  With several processes JAX's own service already listens, so nothing is caught here;
  nor is it outside the main thread, where Python cannot set a handler.
  """
  watch = PreemptionWatch()
  ours = (
    jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
  )
  if not ours:
    yield watch
    return
  before = signal.signal(signal.SIGTERM, lambda signum, frame: watch.ask())
  try:
    yield watch
  finally:
    signal.signal(signal.SIGTERM, before)
