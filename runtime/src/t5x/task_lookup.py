"""Looks seqio tasks up by name, and checks what a configuration wants of them.

A wrong name is answered with the nearest ones. As in `data`, seqio is imported by the
functions that need it.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gin
import numpy as np
from absl import logging

if TYPE_CHECKING:
  import seqio


def import_module(module: str):
  """Imports a module for its side effects (tasks it registers).

  Args:
    module: dotted name.

  Raises:
    ImportError: there is no such module.
  """
  if module not in sys.modules:
    logging.info('Importing module %s for its tasks.', module)
  try:
    # Gin has read its files by now; a module may still bring functions of its own for
    # gin to know, as those files cannot have named them.
    with gin.unlock_config():
      importlib.import_module(module)
  except ModuleNotFoundError as error:
    if not f'{module}.'.startswith(f'{error.name}.'):
      raise  # One that the module itself imports.
    raise ModuleNotFoundError(
      f'MIXTURE_OR_TASK_MODULE names {module!r}, which Python does not find. It looks '
      'in the folder that the command runs in, on PYTHONPATH and among the installed '
      'packages.',
      name=error.name,
    ) from error


def _nearest(name: str, known: Sequence[str], shown: int = 5) -> str:
  """The names closest to `name`, for an error message."""
  close = difflib.get_close_matches(name, known, n=shown, cutoff=0.4)
  if close:
    return 'Nearest: ' + ', '.join(close)
  if not known:
    return 'There are none'
  listed = ', '.join(sorted(known)[:shown])
  return f'There are {len(known)}, among them {listed}'


def _registered() -> list[str]:
  import seqio

  return [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]


def is_known(name: Any) -> bool:
  """Whether `find` finds it."""
  import seqio

  return isinstance(name, seqio.DatasetProviderBase) or name in _registered()


def find(name: Any) -> seqio.Task | seqio.Mixture:
  """Looks a task or mixture up.

  Args:
    name: as registered, or a task or mixture, which is returned as it is.

  Raises:
    ValueError: nothing of that name is registered.
  """
  import seqio

  if isinstance(name, seqio.DatasetProviderBase):
    return name
  if not isinstance(name, str):
    raise ValueError(
      f'mixture_or_task_name is a {type(name).__name__}; it must be the name of a '
      'seqio task or mixture, or such an object.'
    )
  known = _registered()
  if name not in known:
    raise ValueError(
      f"No task or mixture is called '{name}'. {_nearest(name, known)}. Import the "
      'module that registers it in the gin file, or mend the name.'
    )
  return seqio.get_mixture_or_task(name)


def check_lengths(
  provider: seqio.Task | seqio.Mixture,
  lengths: Mapping[str, int] | None,
  feature_converter_cls: Callable[..., seqio.FeatureConverter],
):
  """Checks the lengths of a configuration against a task's features.

  Args:
    provider: the task or mixture.
    lengths: tokens by feature.
    feature_converter_cls: converter whose task features are known names too.

  Raises:
    ValueError: a name is not known, or a value is no length.
  """
  if lengths is None:
    raise ValueError(
      f"task_feature_lengths is None; batches of '{provider.name}' need a length a "
      "feature, for instance {'inputs': 512, 'targets': 512}."
    )
  model_side = getattr(feature_converter_cls, 'TASK_FEATURES', ())
  known = {*provider.output_features, *model_side}
  for key, length in lengths.items():
    if key not in known:
      raise ValueError(
        f"task_feature_lengths has '{key}', no feature of '{provider.name}'. "
        f'{_nearest(key, sorted(known))}.'
      )
    if not isinstance(length, int | np.integer) or length <= 0:
      raise ValueError(
        f"task_feature_lengths['{key}'] is {length!r}; it must be a whole number of "
        'tokens above 0.'
      )


def check_cached(provider: seqio.Task | seqio.Mixture) -> None:
  """Checks that every task of a provider has been cached.

  Raises:
    ValueError: one has not.
  """
  import seqio

  for task in seqio.get_subtasks(provider):
    if not task.cache_dir:
      searched = ', '.join(map(str, seqio.utils.get_global_cache_dirs())) or 'no folder'
      raise ValueError(
        f"USE_CACHED_TASKS is True, and the task '{task.name}' is not cached (looked "
        f'in: {searched}). Set USE_CACHED_TASKS = False, or cache the task with '
        'seqio_cache_tasks and name the folder with --seqio_additional_cache_dirs.'
      )
