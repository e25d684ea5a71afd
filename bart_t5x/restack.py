"""Converts a checkpoint between scanned layers and separate layers.

    python -m bart_t5x.restack --checkpoint=runs/a/checkpoint_1000 --output_dir=runs/b

With `BartConfig.scan_layers` a model has one stack `layers`, otherwise `layers_0`,
`layers_1` … Optimizer and dataset state are kept, so a run resumes exactly.
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

from bart_t5x import checkpoints, cli, files


def stack_layers(tree: Any) -> Any:
  """Replaces `layers_0`, `layers_1` … by `layers`, with a leading layer axis."""
  if not isinstance(tree, Mapping):
    return tree
  stacked, layers = {}, {}
  for name, child in tree.items():
    if match := re.fullmatch('layers_([0-9]+)', name):
      layers[int(match[1])] = stack_layers(child)
    else:
      stacked[name] = stack_layers(child)
  if layers:
    in_order = [layers[index] for index in sorted(layers)]
    stacked['layers'] = jax.tree.map(lambda *leaves: np.stack(leaves), *in_order)
  return stacked


def unstack_layers(tree: Any) -> Any:
  """Inverts `stack_layers`; separate layers stay as they are."""
  if not isinstance(tree, Mapping):
    return tree
  unstacked = {name: unstack_layers(child) for name, child in tree.items()}
  if layers := unstacked.pop('layers', None):
    for index in range(len(jax.tree.leaves(layers)[0])):
      unstacked[f'layers_{index}'] = jax.tree.map(lambda leaf, i=index: leaf[i], layers)
  return unstacked


def restack(
  checkpoint: pathlib.Path, output_dir: pathlib.Path
) -> tuple[pathlib.Path, bool]:
  """Writes a checkpoint in the other form; returns its path and if it is stacked.

  Raises:
    FileExistsError: the output exists.
    FileNotFoundError: the checkpoint does not exist.
    ValueError: it cannot be read, or is not a BART's.
  """
  output = output_dir / checkpoint.name
  if output.exists():
    raise FileExistsError(f'{output} exists: choose another --output_dir, or remove it')
  state = checkpoints.read_state(checkpoint)
  if 'encoder' not in state.get('target', {}):
    raise ValueError(f'{checkpoint} is not a BART checkpoint: it has no encoder')
  was_stacked = 'layers' in state['target']['encoder']
  convert = unstack_layers if was_stacked else stack_layers
  with files.whole_folder(output) as folder:
    shutil.copytree(
      checkpoint,
      folder,
      # The digests are those of the other form.
      ignore=shutil.ignore_patterns(checkpoints.STATE, 'SHA256SUMS'),
      dirs_exist_ok=True,
    )
    checkpoints.write_state(folder, convert(state))
  # TRAIN_STEPS_RELATIVE counts from the step in it.
  first_step = checkpoint.parent / 'first_step.txt'
  if first_step.exists():
    shutil.copy2(first_step, output_dir)
  return output, not was_stacked


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  cli.set_up_libraries()
  parser = argparse.ArgumentParser(
    prog='python -m bart_t5x.restack', description=__doc__.split('\n')[0]
  )
  parser.add_argument(
    '--checkpoint', required=True, type=pathlib.Path, help='MODEL_DIR/checkpoint_<step>'
  )
  parser.add_argument(
    '--output_dir',
    required=True,
    type=pathlib.Path,
    help='MODEL_DIR of the run that resumes from the new checkpoint_<step>',
  )
  args = parser.parse_args(argv)
  try:
    output, stacked = restack(args.checkpoint, args.output_dir)
  except (OSError, ValueError) as e:
    return cli.fail(e)
  print(f'{output}: network.BartConfig.scan_layers = {stacked}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
