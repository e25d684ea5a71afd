"""Any of the scripts under one name: train, eval, infer, precompile.

  python -m t5x.main --run_mode=train --gin_file=... --gin.MODEL_DIR="'runs/mine'"

The flags are those of the script. `--dry_run` checks the configuration and stops.
"""

if __name__ == '__main__':
  from t5x import launch

  launch.prepare(__doc__, multiprocess=True, shard=True, run_mode=True)

import importlib
import sys
from collections.abc import Sequence

from absl import logging

from t5x import launch

# {mode: (function to run, more names that gin files look up in `__main__`)}.
# Run files for precompiling are often included after one that binds `train`.
_SCRIPTS = {
  'train': ('train',),
  'eval': ('evaluate',),
  'infer': ('infer', 'create_task_from_tfexample_file', 'write_inferences_to_file'),
  'precompile': ('precompile', 'train'),
}


def main(argv: Sequence[str]) -> None:
  """Runs the script that `--run_mode` names.

  Raises:
    ValueError: no `--run_mode`.
  """
  del argv
  mode = launch.FLAGS.run_mode
  if mode is None:
    raise ValueError(f'Give --run_mode, one of {", ".join(_SCRIPTS)}.')
  module = importlib.import_module(f't5x.{mode}')
  for name in _SCRIPTS[mode]:
    setattr(sys.modules['__main__'], name, getattr(module, name))
  script = launch.configure(getattr(module, _SCRIPTS[mode][0]))
  if launch.FLAGS.dry_run:
    logging.info('The configuration is valid; --dry_run stops here.')
    return
  shard_id = launch.FLAGS.shard_id
  if mode == 'infer' and shard_id is not None:
    script(shard_id=shard_id)
  else:
    script()


if __name__ == '__main__':
  launch.run_main(main)
