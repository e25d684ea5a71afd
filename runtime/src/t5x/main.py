"""Runs any of the scripts: train, eval, infer, precompile.

  python -m t5x.main --run_mode=train --gin_file=... --gin.MODEL_DIR="'runs/mine'"

Takes the flags of the script. `--dry_run` only checks the configuration.
"""

if __name__ == '__main__':
  from t5x import launch

  launch.prepare(__doc__, multiprocess=True, shard=True, run_mode=True)

import importlib
import sys
from collections.abc import Sequence

from absl import logging

from t5x import launch

# {mode: (function to run, *other names that gin files look up in `__main__`)}.
# precompile.gin is often given after a file that binds `train`.
_SCRIPTS = {
  'train': ('train',),
  'eval': ('evaluate',),
  'infer': ('infer', 'create_task_from_tfexample_file', 'write_inferences_to_file'),
  'precompile': ('precompile', 'train'),
}


def main(argv: Sequence[str]) -> None:
  """Runs the script named by `--run_mode`."""
  del argv
  mode = launch.FLAGS.run_mode
  if mode is None:
    raise ValueError(f'Set --run_mode to one of {", ".join(_SCRIPTS)}.')
  module = importlib.import_module(f't5x.{mode}')
  for name in _SCRIPTS[mode]:
    setattr(sys.modules['__main__'], name, getattr(module, name))
  script = launch.configure(getattr(module, _SCRIPTS[mode][0]))
  if launch.FLAGS.dry_run:
    logging.info('The configuration is valid; --dry_run stops here.')
    return
  shard_id = launch.FLAGS.shard_id if mode == 'infer' else None
  script(**({} if shard_id is None else {'shard_id': shard_id}))


if __name__ == '__main__':
  launch.run_main(main)
