"""What a training run does at which step: one pure function of absolute steps.

Every period counts from step 0 and not from where a run was started, so a run that
stops and goes on saves, evaluates and reports at the steps at which it would have done
so in one go. The periods need not divide each other.
"""

import dataclasses
import numbers
from collections.abc import Iterator, Sequence


def whole_steps(name: str, steps: float) -> int:
  """A number of steps as an int; gin files may say 1e5.

  Args:
    name: what the number is called, for the message.
    steps: the number.

  Raises:
    ValueError: it is negative or not whole, or no number.
  """
  if not isinstance(steps, numbers.Real) or steps < 0 or steps != int(steps):
    raise ValueError(f'{name} must be a whole number of steps. Got: {steps!r}.')
  return int(steps)


@dataclasses.dataclass(frozen=True)
class Stop:
  """A step after which training pauses, and what happens there.

  The metrics since the stop before are reported at every stop.

  Attributes:
    step: absolute number of steps taken so far.
    save: a checkpoint is written.
    evaluate: train-eval and infer-eval run.
    collect: Python's garbage collector runs.
  """

  step: int
  save: bool
  evaluate: bool
  collect: bool


@dataclasses.dataclass(frozen=True)
class RunSchedule:
  """The periods of a run, in steps; None or 0 switches a thing off.

  Attributes:
    total_steps: the absolute step at which the run ends. What has a period also happens
      there, whether or not the period divides it.
    stats_period: between two reports of the metrics.
    checkpoint_period: between two checkpoints.
    checkpoint_steps: further steps to save at.
    eval_period: between two evaluations.
    gc_period: between two runs of the garbage collector.
  """

  total_steps: int
  stats_period: int | None = None
  checkpoint_period: int | None = None
  checkpoint_steps: Sequence[int] = ()
  eval_period: int | None = None
  gc_period: int | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      given = getattr(self, field.name)
      if field.name == 'checkpoint_steps':
        given = tuple(whole_steps(field.name, step) for step in given)
      elif given is not None:
        given = whole_steps(field.name, given)
      object.__setattr__(self, field.name, given)

  @property
  def saves(self) -> bool:
    """Whether any checkpoint is written."""
    return bool(self.checkpoint_period or self.checkpoint_steps)

  def saves_before(self, step: int) -> bool:
    """Whether a run that starts at `step` writes a checkpoint of that very step."""
    return bool(self.checkpoint_period) or step in self.checkpoint_steps

  def at(self, step: int) -> Stop:
    """Says what happens once `step` steps have been taken."""

    def due(period: int | None) -> bool:
      return bool(period) and (step % period == 0 or step == self.total_steps)

    last = step == self.total_steps
    return Stop(
      step=step,
      save=(
        due(self.checkpoint_period)
        or step in self.checkpoint_steps
        or (last and self.saves)
      ),
      evaluate=due(self.eval_period),
      collect=due(self.gc_period),
    )

  def next_stop(self, step: int) -> Stop | None:
    """Finds the first stop after `step`; None once the run is over."""
    if step >= self.total_steps:
      return None
    periods = (
      self.stats_period,
      self.checkpoint_period,
      self.eval_period,
      self.gc_period,
    )
    coming = [(step // period + 1) * period for period in periods if period]
    coming += [one for one in self.checkpoint_steps if one > step]
    return self.at(min([self.total_steps, *coming]))

  def stops_after(self, step: int) -> Iterator[Stop]:
    """Yields every stop of a run that starts at `step`, in order."""
    while (stop := self.next_stop(step)) is not None:
      yield stop
      step = stop.step
