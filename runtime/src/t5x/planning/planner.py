"""Plans a step of a run: compiles it for a topology and shows what it would take."""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from t5x import partitioning
from t5x.planning import abstract_steps, refusal, report, step_costs, topologies
from t5x.planning.step_costs import DoesNotFitError

# Compilations that `find_batch` is worth: each may take minutes.
_MOST_TRIES = 10

# Which argument of `train` says what the step's batches are.
_BATCHES = {
  'train': 'train_dataset_cfg',
  'eval': 'train_eval_dataset_cfg',
  'decode': 'infer_eval_dataset_cfg',
}


@contextlib.contextmanager
def devices_in_force(name: str | None) -> Iterator[None]:
  """Lets meshes be made of a topology's devices.

  Args:
    name: of the topology.

  Raises:
    ValueError: it is unknown or None, or libtpu is not installed.
  """
  if not name:
    known = ', '.join(topologies.TOPOLOGIES)
    raise ValueError(f'Say what to compile for: --topology={known} or cpu:8.')
  with partitioning.meshes_of(topologies.devices(name)):
    yield


class Planner:
  """Plans steps of one run on one topology.

  Attributes:
    parts: what a batch is split into over the devices.
    tried: by `largest`: bytes needed by batch size.
  """

  def __init__(self, arguments: Mapping[str, Any], topology: str, kind: str = 'train'):
    """Takes what `train` takes.

    Args:
      arguments: of `train.train`, by name.
      topology: its name.
      kind: train, eval or decode.
    """
    wanted = inspect.signature(abstract_steps.Run.__init__).parameters
    self._run = abstract_steps.Run(
      **{k: v for k, v in arguments.items() if k in wanted}
    )
    self._name, self._topology = topology, topologies.find(topology)
    self._kind = kind
    # A run without such batches is asked about those of training.
    self._cfg = arguments.get(_BATCHES[kind]) or arguments['train_dataset_cfg']
    steps = arguments.get('relative_steps') or arguments.get('total_steps')
    self._steps = steps if kind == 'train' else None
    self.tried: dict[int, float] = {}

  def plan(self, batch_size: int | None = None) -> report.Plan:
    """Compiles the step.

    Args:
      batch_size: rows over all devices; the run's own by default.

    Raises:
      DoesNotFitError: it does not fit.
    """
    size = batch_size or self._cfg.batch_size
    step = self._run.step(self._kind, dataclasses.replace(self._cfg, batch_size=size))
    self.parts, self._unit = step.parts, step.parts * step.microbatches
    logging.info(
      'Compiling the %s step of %d rows for %s.', self._kind, size, self._name
    )
    costs = step_costs.measure(step, self._topology)
    return report.Plan(
      self._name,
      self._topology,
      self._kind,
      size,
      step.target_tokens,
      self._steps,
      costs,
    )

  def largest(self) -> report.Plan:
    """The plan of the largest batch that fits, to 3 % or one row a device.

    Raises:
      DoesNotFitError: not even one row a device fits.
    """
    available = self._topology.chip.hbm_bytes
    tried, best, error = self.tried, None, None
    size = self._cfg.batch_size
    while size is not None and len(tried) < _MOST_TRIES:
      try:
        plan = self.plan(size)
        tried[size] = plan.costs.memory.total
        if best is None or size > best.batch_size:
          best = plan
      except DoesNotFitError as refused:
        error = refused
        tried[size] = max(refused.needed, available + 1)
      fits = 'fits' if tried[size] <= available else 'does not fit'
      logging.info('%d rows: %s (%.2f GiB).', size, fits, tried[size] / topologies.GIB)
      size = report.next_batch(tried, available, self._unit)
    if best is None:
      raise error
    return best


def show(
  arguments: Mapping[str, Any],
  topology: str,
  kind: str = 'train',
  find_batch: bool = False,
  json_path: str | None = None,
) -> report.Plan:
  """Plans a step, prints the plan and writes its figures down.

  Args:
    arguments: of `train.train`, by name.
    topology: name of what to compile for.
    kind: train, eval or decode.
    find_batch: whether to look for the largest batch that fits.
    json_path: file for the figures.

  Raises:
    ValueError: it does not fit; the message says by how much and what to change.
  """
  planner = Planner(arguments, topology, kind)
  try:
    plan = planner.largest() if find_batch else planner.plan()
  except DoesNotFitError as error:
    raise ValueError(refusal.text(error, kind)) from error
  print(report.table(plan), flush=True)
  if find_batch:
    available = plan.topology.chip.hbm_bytes
    print(report.found_batch(planner.tried, available, planner.parts), flush=True)
  if json_path:
    report.write_json(plan, json_path)
  return plan
