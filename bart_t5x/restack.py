"""Turns a checkpoint of layers written out into one of scanned layers, or back.

    python -m bart_t5x.restack --checkpoint=runs/a/checkpoint_1000 --output_dir=runs/b

`BartConfig.scan_layers` decides which of the two a model has: `layers_0`, `layers_1` …
or one stack `layers`. The whole state is turned, the optimizer's moments included,
and the position in the data is kept, so that a run goes on from it with the other
setting as it would have gone on without. Nothing is computed: turned twice, it is the
same bytes.
"""

import argparse
import pathlib
import re
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bart_t5x import cli
from bart_t5x.hf import checkpoints

_NUMBERED = re.compile('layers_([0-9]+)')


def stacked(tree: Any) -> Any:
  """Joins the subtrees `layers_0`, `layers_1` … of every node into one, `layers`.

  Args:
    tree: nested mappings of arrays, of parameters or of a whole state.

  Returns:
    The same with a leading axis on what was joined.
  """
  if not isinstance(tree, Mapping):
    return tree
  found, layers = {}, {}
  for name, child in tree.items():
    match = _NUMBERED.fullmatch(name)
    if match:
      layers[int(match[1])] = stacked(child)
    else:
      found[name] = stacked(child)
  if layers:
    ordered = [layers[index] for index in sorted(layers)]
    found['layers'] = jax.tree.map(lambda *leaves: np.stack(leaves), *ordered)
  return found


def separate(tree: Any) -> Any:
  """The inverse of `stacked`."""
  if not isinstance(tree, Mapping):
    return tree
  found = {}
  for name, child in tree.items():
    child = separate(child)
    if name != 'layers':
      found[name] = child
      continue
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(child)}
    if len(counts) != 1:
      raise ValueError(
        'The arrays under "layers" must begin with one axis of layers, of one length. '
        f'Got lengths: {sorted(counts)}.'
      )
    for index in range(counts.pop()):
      found[f'layers_{index}'] = jax.tree.map(lambda leaf, i=index: leaf[i], child)
  return found


def is_stacked(tree: Mapping[str, Any]) -> bool:
  """Whether a state is that of scanned layers."""
  return 'layers' in tree['target']['encoder']


def restack(checkpoint: pathlib.Path, output_dir: pathlib.Path) -> pathlib.Path:
  """Writes a checkpoint with the other kind of layers.

  Args:
    checkpoint: MODEL_DIR/checkpoint_<step>, which is only read.
    output_dir: the folder for `checkpoint_<step>`, which must not be there yet.

  Returns:
    The new checkpoint.

  Raises:
    FileExistsError: the new checkpoint is there already.
    FileNotFoundError: the old one is not.
    ValueError: it cannot be read, or is not of a BART.
  """
  output = output_dir / checkpoint.name
  if output.exists():
    raise FileExistsError(
      f'{output} is there already: choose another --output_dir, or remove it.'
    )
  state = checkpoints.read_state(checkpoint)
  if 'encoder' not in state.get('target', {}):
    raise ValueError(f'{checkpoint} has no encoder: it is no checkpoint of a BART.')
  turned = separate(state) if is_stacked(state) else stacked(state)
  # The folder appears under its name when it is whole, as in a run.
  partial = output_dir / f'{checkpoint.name}.partial'
  shutil.rmtree(partial, ignore_errors=True)
  shutil.copytree(checkpoint, partial, ignore=_only_the_state(checkpoint))
  checkpoints.write_state(partial, turned)
  partial.rename(output)
  # From where the run counts TRAIN_STEPS_RELATIVE.
  first_step = checkpoint.parent / 'first_step.txt'
  if first_step.exists():
    shutil.copy2(first_step, output_dir / first_step.name)
  return output


def _only_the_state(checkpoint):
  """For `copytree`: leaves out the state's folder, keeps what lies beside it."""
  return lambda folder, names: (
    [checkpoints.STATE] if pathlib.Path(folder) == checkpoint else []
  )


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit status."""
  cli.quiet_libraries()
  parser = argparse.ArgumentParser(
    prog='python -m bart_t5x.restack',
    description='Turns a checkpoint of layers written out into one of scanned layers, '
    'or back, for runs that change BartConfig.scan_layers.',
  )
  parser.add_argument(
    '--checkpoint', required=True, type=pathlib.Path, help='MODEL_DIR/checkpoint_<step>'
  )
  parser.add_argument(
    '--output_dir',
    required=True,
    type=pathlib.Path,
    help='where checkpoint_<step> goes: the MODEL_DIR of the run that continues',
  )
  args = parser.parse_args(argv)
  try:
    output = restack(args.checkpoint, args.output_dir)
  except (OSError, ValueError) as e:
    return cli.fail(e)
  kind = 'True' if is_stacked(checkpoints.read_state(output)) else 'False'
  print(f'{output}: for network.BartConfig.scan_layers = {kind}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
