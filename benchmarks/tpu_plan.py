"""Makes benchmarks/tpu_plan.md: the cost of each choice on TPUs, by the compiler.

  python benchmarks/tpu_plan.py                 compiles what is missing, then writes
  python benchmarks/tpu_plan.py --only=base     variants whose name starts so
  python benchmarks/tpu_plan.py --table         only writes

Needs libtpu (requirements-tpu.txt) and no TPU. A variant takes 2 to 10 minutes of a
core and writes benchmarks/tpu_plan/NAME.json; a second run compiles what is missing.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
FIGURES = ROOT / 'benchmarks' / 'tpu_plan'
TABLE = ROOT / 'benchmarks' / 'tpu_plan.md'

CONFIG = 'network.BartConfig.'
BASE = 'gin/bart_base_no.gin'
LARGE = 'gin/bart_large_no.gin'
# Layers as a loop, which is much quicker to compile.
SCAN = {CONFIG + 'scan_layers': True}
LONG_SOURCES = {'TASK_FEATURE_LENGTHS': {'inputs': 1024, 'targets': 1024}}


@dataclasses.dataclass(frozen=True)
class Variant:
  """A configuration to plan."""

  name: str  # Of its file.
  what: str  # In the table.
  bindings: dict  # Changes to the gin file.
  gin_file: str = BASE
  topology: str = 'v3-8'


def _base(name: str, what: str, **fields) -> Variant:
  bindings = {CONFIG + field: value for field, value in fields.items()}
  return Variant(f'base_{name}', f'{what}, in a loop', {**SCAN, **bindings})


def _large(name: str, what: str, bindings: dict) -> Variant:
  return Variant(f'large_{name}', what, bindings, LARGE)


def _meshes(start: str, gin_file: str) -> list[Variant]:
  """Meshes with 2, 4 and 8 devices per model."""
  return [
    Variant(
      f'{start}_mesh_{8 // parts}x{parts}',
      f'mesh of {8 // parts} x {parts}, in a loop',
      {**SCAN, 'partitioning.PjitPartitioner.num_partitions': parts},
      gin_file,
    )
    for parts in (2, 4, 8)
  ]


VARIANTS = (
  Variant('base', 'as the gin file has it', {}),
  _base('scan', 'as the gin file has it'),
  Variant(
    'base_none',
    'sources of 1024, nothing computed again, in a loop',
    {**SCAN, **LONG_SOURCES, CONFIG + 'remat_policy': 'none'},
  ),
  Variant(
    'base_plain_none',
    'plain attention, sources of 1024, nothing computed again',
    {
      **LONG_SOURCES,
      CONFIG + 'attention_impl': 'plain',
      CONFIG + 'remat_policy': 'none',
    },
  ),
  _base(
    'plain_full',
    'plain attention, whole layers computed again',
    attention_impl='plain',
    remat_policy='full',
  ),
  _base('plain_dots', 'plain attention', attention_impl='plain'),
  _base('chunked', 'attention in chunks', attention_impl='chunked'),
  _base('full', 'whole layers computed again', remat_policy='full'),
  Variant(
    'base_dropout_0',
    'no dropout (another recipe), in a loop',
    {**SCAN, 'DROPOUT_RATE': 0.0},
  ),
  Variant(
    'base_1024',
    'sources of 1024 like targets, logits of 64 positions at a time, in a loop',
    {**SCAN, **LONG_SOURCES, 'model.BartModel.loss_chunk_length': 64},
  ),
  Variant(
    'base_loss_all',
    'all logits at once, in a loop',
    {**SCAN, 'model.BartModel.loss_chunk_length': None},
  ),
  Variant(
    'base_loss_128',
    'logits of 128 positions at a time, in a loop',
    {**SCAN, 'model.BartModel.loss_chunk_length': 128},
  ),
  Variant(
    'base_microbatches_2',
    'in two microbatches, in a loop',
    {**SCAN, 'trainer.Trainer.num_microbatches': 2},
  ),
  _base('vocabulary', 'vocabulary not padded', vocab_multiple_of=1),
  Variant(
    'base_moment',
    "AdamW's first moment in bfloat16, in a loop",
    {**SCAN, 'optimizers.adamw.mu_dtype': 'bfloat16'},
  ),
  Variant('base_out_1024', 'sources of 1024', LONG_SOURCES),
  Variant(
    'base_out_plain_dots', 'plain attention', {CONFIG + 'attention_impl': 'plain'}
  ),
  Variant('base_448', '448 rows, the most that fit', {'BATCH_SIZE': 448}),
  *_meshes('base', BASE),
  Variant(
    'base_out_full',
    'whole layers computed again',
    {CONFIG + 'remat_policy': 'full'},
  ),
  Variant(
    'base_undonated',
    'the new state beside the old one',
    {},
    'benchmarks/tpu_undonated.gin',
  ),
  Variant(
    'base_padded_heads',
    'kernels with one head of 64 in 128 lanes',
    {},
    'benchmarks/tpu_padded_heads.gin',
  ),
  Variant('large', 'as the gin file has it', {}, LARGE),
  _large('scan', 'as the gin file has it, in a loop', SCAN),
  _large(
    'dots',
    'only norms, GELU and dropout computed again',
    {CONFIG + 'remat_policy': 'dots'},
  ),
  _large(
    'dots_microbatches',
    'the same in four microbatches',
    {CONFIG + 'remat_policy': 'dots', 'trainer.Trainer.num_microbatches': 4},
  ),
  *_meshes('large', LARGE),
  *(
    Variant(f'base_scan_{name}', f'on {name}, in a loop', SCAN, topology=name)
    for name in ('v4-8', 'v5e-8', 'v5p-8', 'v6e-8')
  ),
)


def plan(variant: Variant) -> None:
  """Compiles a variant and writes its figures, or why it does not fit."""
  path = FIGURES / f'{variant.name}.json'
  command = [
    sys.executable,
    '-m',
    't5x.precompile',
    f'--gin_file={variant.gin_file}',
    f'--topology={variant.topology}',
    f'--json={path}',
    *(f'--gin.{name}={value!r}' for name, value in variant.bindings.items()),
  ]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ
  )
  if done.returncode:
    message = done.stderr[done.stderr.find('ERROR: ') + len('ERROR: ') :]
    if 'GiB too much' not in message:
      raise RuntimeError(f'{" ".join(command)}\n{done.stderr}')
    path.write_text(json.dumps({'refused': message.split('\n')[0]}, indent=2) + '\n')


HEADER = (
  '| variant | HBM GiB | estimate s | XLA | kernels | between devices | cycles s | MFU '
  '| hours |\n|---|---|---|---|---|---|---|---|---|\n'
)


def row(variant: Variant) -> str:
  """Returns a line of the table."""
  found = json.loads((FIGURES / f'{variant.name}.json').read_text())
  if 'refused' in found:
    return f'| {variant.what} | does not fit: {found["refused"]} | | | | | | | |\n'
  return (
    f'| {variant.what} | {found["hbm_gib"]:.2f} of {found["hbm_available_gib"]:.2f} '
    f'| {found["estimate_s"]:.3f} | {found["xla_s"]:.3f} | {found["kernel_s"]:.3f} '
    f'| {found["collective_s"]:.3f} | {found["cycles_s"]:.3f} | {found["mfu"]:.0%} '
    f'| {found["hours"]:.1f} |\n'
  )


def planned(variant: Variant) -> bool:
  return (FIGURES / f'{variant.name}.json').exists()


def write() -> None:
  """Replaces the tables in the text by those of all variants planned."""
  marker = '<!-- made by benchmarks/tpu_plan.py from here on -->\n'
  text = TABLE.read_text().partition(marker)[0] if TABLE.exists() else ''
  sections = (
    ('bart-base, 256 rows, v3-8', 'base', True),
    ('bart-large, 256 rows, v3-8', 'large', True),
    ('bart-base, 256 rows, other devices', 'base', False),
  )
  text += marker
  for title, start, here in sections:
    rows = [
      row(variant)
      for variant in VARIANTS
      if variant.name.startswith(start)
      and (variant.topology == 'v3-8') == here
      and planned(variant)
    ]
    if rows:
      text += f'\n## {title}\n\n{HEADER}{"".join(rows)}'
  TABLE.write_text(text)


def main() -> None:
  """Compiles what is missing and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--only', default='', help='variants whose name starts so')
  parser.add_argument('--table', action='store_true', help='compile nothing')
  options = parser.parse_args()
  FIGURES.mkdir(exist_ok=True)
  for variant in VARIANTS:
    if not options.table and variant.name.startswith(options.only):
      if not planned(variant):
        print(variant.name, flush=True)
        plan(variant)
      write()
  write()


if __name__ == '__main__':
  main()
