"""Sends a run's reports to Weights & Biases or Trackio.

In a gin file after the run's own:

  from __gin__ import dynamic_registration
  import __main__ as train_script
  from t5x import trackers

  train_script.train.tracker = @trackers.Tracker()
  trackers.Tracker:
    service = 'wandb'  # or 'trackio'
    project = 'bart'
"""

import importlib
import uuid
from collections.abc import Mapping
from typing import Any

import gin
from etils import epath

SERVICES = ('wandb', 'trackio')


class Tracker:
  """Logs the lines of metrics.jsonl, as `<source>/<metric>`.

  A resumed run continues the service's run, which MODEL_DIR/tracker_run.txt names.
  """

  def __init__(self, project: str, service: str = 'wandb', **settings: Any):
    """Does not contact the service yet.

    Args:
      service: 'wandb' or 'trackio'; the package must be installed.
      **settings: further arguments of its `init`, such as wandb's `entity`.

    Raises:
      ValueError: the service is unknown.
    """
    if service not in SERVICES:
      raise ValueError(f'Tracker.service must be one of {SERVICES}. Got: {service!r}.')
    self._service = service
    self._settings = {'project': project, **settings}
    self.run = None

  def open(self, model_dir: str) -> None:
    """Starts or continues the service's run."""
    try:
      module = importlib.import_module(self._service)
    except ImportError as error:
      raise ImportError(
        f'The tracker needs a package: pip install {self._service}.'
      ) from error
    note = epath.Path(model_dir) / 'tracker_run.txt'
    if not note.exists():
      note.write_text(f'{epath.Path(model_dir).name}-{uuid.uuid4().hex[:8]}')
    name = {'wandb': 'id', 'trackio': 'name'}[self._service]
    self.run = module.init(
      resume='allow',
      config={'gin': gin.config_str()},
      **{name: note.read_text()},
      **self._settings,
    )
    if self._service == 'wandb':
      self.run.define_metric('*', step_metric='step')

  def log(self, step: int, source: str, values: Mapping[str, float]) -> None:
    """Logs the numbers of a report; steps need not rise."""
    named = {f'{source}/{name}': value for name, value in values.items()}
    if self._service == 'wandb':  # Its own steps must rise.
      self.run.log({'step': step, **named})
    else:
      self.run.log(named, step=step)

  def close(self, failed: bool = False) -> None:
    """Waits until all is sent; W&B shows whether the run failed."""
    if self._service == 'wandb':
      self.run.finish(exit_code=int(failed))
    else:
      self.run.finish()
