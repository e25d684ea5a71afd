"""Any of the scripts under one name: train, eval, infer, precompile.

  python -m t5x.main --run_mode=train --gin_file=... --gin.MODEL_DIR="'runs/mine'"

The flags are those of the script. `--dry_run` reads and checks the configuration and
stops there.
"""

if __name__ == '__main__':
  from t5x import launch

  launch.prepare(__doc__, multiprocess=True, shard=True, run_mode=True)

import enum
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging


@enum.unique
class RunMode(enum.Enum):
  """What to run."""

  TRAIN = 'train'
  EVAL = 'eval'
  INFER = 'infer'
  PRECOMPILE = 'precompile'
  EXPORT = 'export'


# (module, function to run, further names that gin files look for in `__main__`).
# Run files for precompiling are often included after one that binds `train`.
_SCRIPTS = {
  RunMode.TRAIN: ('t5x.train', 'train', ()),
  RunMode.EVAL: ('t5x.eval', 'evaluate', ()),
  RunMode.INFER: (
    't5x.infer',
    'infer',
    ('create_task_from_tfexample_file', 'write_inferences_to_file'),
  ),
  RunMode.PRECOMPILE: ('t5x.precompile', 'precompile', ('train',)),
}


def find_script(mode: RunMode, namespace: Any) -> Callable[..., Any]:
  """Imports a script and puts its names where gin files look for them.

  Args:
    mode: which script.
    namespace: the module that gets the names, `__main__`.

  Returns:
    The function to run.

  Raises:
    ValueError: the mode has no script here.
  """
  if mode not in _SCRIPTS:
    raise ValueError(
      f'--run_mode={mode.value} is not part of this runtime; it has '
      f'{", ".join(known.value for known in _SCRIPTS)}.'
    )
  module_name, function_name, further = _SCRIPTS[mode]
  module = importlib.import_module(module_name)
  for name in (function_name, *further):
    setattr(namespace, name, getattr(module, name))
  return getattr(module, function_name)


def main(argv: Sequence[str]) -> None:
  """Runs what `--run_mode` names.

  Args:
    argv: the program's name and nothing else.

  Raises:
    ValueError: arguments that are no flags, or no `--run_mode`.
  """
  from t5x import launch

  if argv[1:]:
    raise ValueError(f'Unexpected arguments: {" ".join(argv[1:])}.')
  flags = launch.FLAGS
  if flags.run_mode is None:
    known = ', '.join(mode.value for mode in _SCRIPTS)
    raise ValueError(f'Say what to run: --run_mode={known}.')
  script = launch.configure(
    find_script(RunMode(flags.run_mode), sys.modules['__main__'])
  )
  if flags.dry_run:
    logging.info('The configuration is right; --dry_run stops here.')
    return
  sharded = flags.shard_id is not None and flags.run_mode == RunMode.INFER.value
  script(**({'shard_id': flags.shard_id} if sharded else {}))


if __name__ == '__main__':
  launch.run_main(main)
