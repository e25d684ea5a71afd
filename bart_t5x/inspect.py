"""Shows what a task makes of its data: examples, packed rows, and the noise applied.

    python -m bart_t5x.inspect --task=norwegian_denoising_mini --num_examples=5

Denoising tasks are taken apart: which span each mask stands for, which sentences
changed places, what was inserted. Of other tasks the texts and their ids are shown. A
table at the end sums up: the share that was masked, span lengths beside the Poisson
distribution, padding, tokens that were cut off.
"""

import argparse
import functools
import importlib
import itertools
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_DEFAULT_GIN = os.path.join(_ROOT, 'gin', 'denoising.gin')

_CODES = {'mask': '33', 'new': '31', 'moved': '36', 'infilled': '32', 'faint': '2'}
_BAR_WIDTH = 40


class UsageError(ValueError):
  """An argument that cannot be followed; the message says why."""


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m bart_t5x.inspect',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog='Any --gin.NAME=VALUE is a gin binding, for instance\n'
    '--gin.noise.Recipe.infill_ratio=0.15',
  )
  add = parser.add_argument
  add('--task', required=True, help='a seqio task or mixture')
  add('--split', default='train', help='default: train')
  add('--num_examples', type=int, default=5, help='examples to show (default: 5)')
  add('--num_rows', type=int, default=3, help='packed rows to show (default: 3)')
  add(
    '--num_summed',
    type=int,
    default=1000,
    help='examples of which the table is made (default: 1000)',
  )
  add('--inputs_length', type=int, default=1024, help='default: 1024')
  add('--targets_length', type=int, default=1024, help='default: 1024')
  add('--seed', type=int, default=0, help='of noise and order (default: 0)')
  add(
    '--gin_file',
    action='append',
    default=None,
    help='noise recipe, gin/noise/….gin; may be repeated (default: gin/denoising.gin)',
  )
  add(
    '--module',
    action='append',
    default=[],
    help='module that registers the task, beside `tasks`; may be repeated',
  )
  add(
    '--color',
    choices=('auto', 'always', 'never'),
    default='auto',
    help='auto: in a terminal (default)',
  )
  return parser


class Painter:
  """Marks text by colour, or by brackets where there is none."""

  def __init__(self, color: bool):
    self._color = color

  def __call__(self, kind: str, text: str) -> str:
    if self._color:
      return f'\033[{_CODES[kind]}m{text}\033[0m'
    return {'infilled': f'[{text}]', 'new': f'<{text}>'}.get(kind, text)


# Denoising examples.


def spans_of(
  references: Sequence[int], permuted: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
  """The new tokens between kept ones, and the positions that are missing there.

  Args:
    references: of a source, see `noise`.
    permuted: the clean positions as the permutation has put them.

  Yields:
    Pairs (ids of new tokens, clean positions missing at this place). Where spans touch,
    several new tokens stand for all of the positions together.
  """
  place = {position: i for i, position in enumerate(permuted)}
  new, at = [], 0
  for reference in [*_unrotated(references, place), None]:
    if reference is not None and reference < 0:
      new.append(-reference)
      continue
    until = len(permuted) if reference is None else place[reference]
    if new or until > at:
      yield new, list(permuted[at:until])
    new, at = [], until + 1


def _unrotated(references: Sequence[int], place: Mapping[int, int]) -> Sequence[int]:
  """References that begin with the text's beginning, however they were rotated."""
  last = -1
  for i, reference in enumerate(references):
    if reference > 0:
      if place[reference] < last:
        return [*references[i:], *references[:i]]
      last = place[reference]
  return references


def sentence_order(permuted: Sequence[int], starts: Sequence[int]) -> list[int]:
  """Numbers of the sentences, from 0, as the permutation has put them.

  Args:
    permuted: clean positions, from 1.
    starts: token offsets, from 0, at which sentences begin.
  """
  number = {start + 1: i for i, start in enumerate(starts)}
  return [number[position] for position in permuted if position in number]


def denoising_lines(example: Mapping, vocabulary, paint: Painter) -> list[str]:
  """What became of one document's piece."""
  target = example['targets'].tolist()
  references = example['references'].tolist()
  permuted = example['permuted'].tolist()
  sentences = sentence_order(permuted, example['sentence_starts'].tolist())

  def text(positions):
    return vocabulary.decode([target[p] for p in positions])

  source = [_run(*run, vocabulary, paint) for run in _runs(references, target)]
  clean = [
    paint('infilled', text(run)) if code == 2 else text(run)
    for code, run in _grouped(range(1, len(target) - 1), example['targets_noised'])
  ]
  lines = [
    paint(
      'faint',
      f'document {example["example_id"]}, piece {example["piece"]}, epoch '
      f'{example["epoch"]}: {len(target)} tokens, source {len(references) + 2}',
    ),
    '  target  ' + ''.join(clean),
    '  source  ' + ''.join(source),
  ]
  if sentences != sorted(sentences):
    numbers = ' '.join(str(s + 1) for s in sentences)
    lines.append('  order   ' + paint('moved', f'sentences {numbers}'))
  for new, missing in spans_of(references, permuted):
    stands = ''.join(vocabulary.piece(i) for i in new) or 'nothing'
    what = repr(text(missing)) if missing else 'nothing: an insertion'
    lines.append(f'  span    {paint("mask", stands)} for {what}')
  if example['dropped']:
    lines.append(f'  cut off {example["dropped"]} source tokens')
  return lines


def _runs(references, target) -> Iterator[tuple[str, list[int]]]:
  """Source tokens in runs of one kind: kept, mask or another new one."""

  def kind(reference):
    return 'kept' if reference > 0 else 'new'

  for name, group in itertools.groupby(references, kind):
    yield name, [target[r] if r > 0 else -r for r in group]


def _run(kind: str, ids: list[int], vocabulary, paint: Painter) -> str:
  if kind == 'kept':
    return vocabulary.decode(ids)
  mask = vocabulary.mask_id
  return ''.join(
    paint('mask', '<mask>') if i == mask else paint('new', vocabulary.decode([i]))
    for i in ids
  )


def _grouped(positions, codes) -> Iterator[tuple[int, list[int]]]:
  for code, group in itertools.groupby(positions, lambda p: int(codes[p])):
    yield code, list(group)


# Other tasks.


def text_lines(example: Mapping, features: Mapping, number: int) -> list[str]:
  """Texts and ids of an example of any task."""
  lines = [f'example {number}']
  for name, feature in features.items():
    if name not in example:
      continue
    value = example[name]
    plain = example.get(f'{name}_pretokenized')
    if plain is not None:
      lines.append(f'  {name:8}{plain.decode("utf-8", "replace")!r}')
    if value.ndim == 1 and value.dtype.kind in 'iu':
      decoded = feature.vocabulary.decode(value.tolist())
      lines.append(f'  {"":8}{len(value)} ids, as text {decoded!r}')
      lines.append(f'  {"":8}{" ".join(map(str, value.tolist()))}')
    else:
      lines.append(f'  {name:8}{value!r}')
    if example.get(f'{name}_truncated'):
      lines.append(f'  {"":8}{example[f"{name}_truncated"]} tokens cut off')
  return lines


# Rows.


def row_lines(row: Mapping, vocabulary, number: int) -> list[str]:
  """What is packed with what."""
  lines = []
  segments = row['decoder_segment_ids']
  for segment in range(1, int(segments.max()) + 1):
    ids = row['decoder_target_tokens'][segments == segment]
    source = int((row['encoder_segment_ids'] == segment).sum())
    begin = vocabulary.decode(ids[:12].tolist())
    lines.append(f'  {len(ids):5} targets, {source:5} inputs  {begin!r} …')
  slots = segments.size
  full = int((segments > 0).sum())
  head = f'row {number}: {len(lines)} examples, {full} of {slots} target slots'
  return [head, *lines]


# The table.


def summary_lines(examples: Sequence[Mapping], rows: Sequence[Mapping], recipe):
  """The noise actually applied, and how full the rows are.

  Args:
    examples: of a denoising task, traced; or of any other one.
    rows: packed model features.
    recipe: the noise, or None.

  Returns:
    Lines of text.
  """
  lines = [f'{"examples":28} {len(examples):>10,}']

  def add(label, value):
    lines.append(f'{label:28} {value:>10}')

  for name in ('inputs', 'targets'):
    sizes = [len(e[name]) for e in examples if name in e and e[name].ndim == 1]
    if sizes:
      add(f'{name}, mean length', f'{sum(sizes) / len(sizes):.1f}')
      add(f'{name}, longest', f'{max(sizes):,}')
  for side in ('encoder', 'decoder'):
    key = f'{side}_segment_ids'
    slots = sum(row[key].size for row in rows)
    if slots:
      used = sum(int((row[key] > 0).sum()) for row in rows)
      add(f'padding, {side}', f'{1 - used / slots:.2%}')
  if recipe is None:
    cut = [v for e in examples for k, v in e.items() if k.endswith('_truncated')]
    add('tokens cut off', f'{sum(map(int, cut)):,}')
    return lines
  tokens = sum(len(e['targets']) - 2 for e in examples)
  infilled = sum(int((e['targets_noised'] == 2).sum()) for e in examples)
  new = sum(int((e['references'] < 0).sum()) for e in examples)
  masks = sum(int((e['inputs'] == e['mask_id']).sum()) for e in examples)
  source = sum(len(e['inputs']) - 2 for e in examples)
  add('to be infilled', f'{infilled / max(tokens, 1):.2%}')
  add('source shorter by', f'{1 - source / max(tokens, 1):.2%}')
  add('new tokens that are random', f'{1 - masks / max(new, 1):.2%}')
  add('tokens cut off', f'{sum(int(e["dropped"]) for e in examples):,}')
  lengths = [length for e in examples for length in e['span_lengths'].tolist()]
  return [*lines, '', *histogram_lines(lengths, recipe.span_mean)]


def histogram_lines(lengths: Sequence[int], mean: float) -> list[str]:
  """Span lengths beside the Poisson distribution from which they were drawn."""
  if not lengths:
    return []
  unit = 'span length (0: insertion)'
  lines = [f'{unit:28} {"seen":>8} {"Poisson":>8}']
  for k in range(min(max(lengths), math.ceil(3 * mean)) + 1):
    seen = sum(length == k for length in lengths) / len(lengths)
    expected = math.exp(k * math.log(mean) - mean - math.lgamma(k + 1))
    bar = '#' * round(seen * _BAR_WIDTH * 3)
    lines.append(f'{k:28} {seen:8.3f} {expected:8.3f}  {bar}')
  lines.append("An example's last span is cut to its budget, so short ones are more.")
  return lines


# Data.


def load(args: argparse.Namespace):
  """The task's examples (traced if it denoises), packed rows, and its features.

  Args:
    args: as the command line's parser gives them.

  Returns:
    Lists of examples and of rows as dicts of numpy arrays, the output features, and
    the noise recipe (None for other tasks).

  Raises:
    UsageError: there is no such task or split.
    FileNotFoundError: there is no corpus.
    ValueError: lengths and noise do not go together.
  """
  import seqio

  from bart_t5x import noise, preprocessors
  from bart_t5x.features import BartFeatureConverter
  from bart_t5x.sources import EpochTask

  try:
    provider = seqio.get_mixture_or_task(args.task)
  except ValueError as e:
    raise UsageError(str(e)) from e
  if args.split not in provider.splits:
    raise UsageError(
      f'{args.task!r} has no split {args.split!r}. It has: {sorted(provider.splits)}'
    )
  recipe = None
  if isinstance(provider, EpochTask):
    steps = list(provider.preprocessors)
    denoise = steps[-1]
    if getattr(denoise, 'func', denoise) is preprocessors.denoise:
      recipe = getattr(denoise, 'keywords', {}).get('recipe') or noise.Recipe()
      steps[-1] = functools.partial(denoise, trace=True)
      provider = provider.replace(preprocessors=steps)
  lengths = {'inputs': args.inputs_length, 'targets': args.targets_length}
  kwargs = {'shuffle': args.split == 'train', 'seed': args.seed, 'num_epochs': 1}
  examples = provider.get_dataset(lengths, args.split, **kwargs)
  features = provider.output_features
  count = max(args.num_summed, args.num_examples)
  shown = []
  for example in examples.take(count).as_numpy_iterator():
    if recipe:
      example['mask_id'] = features['targets'].vocabulary.mask_id
    shown.append(example)
  rows = BartFeatureConverter(pack=True)(examples.take(count), lengths)
  return shown, list(rows.as_numpy_iterator()), features, recipe


def bind_gin(files: Sequence[str] | None, bindings: Sequence[str]) -> None:
  """Reads gin files (without any, the default recipe), then bindings."""
  import gin

  if files is None:
    files = [_DEFAULT_GIN] if os.path.exists(_DEFAULT_GIN) else []
  gin.add_config_file_search_path(_ROOT)
  gin.parse_config_files_and_bindings(list(files), list(bindings))


def run(args: argparse.Namespace, bindings: Sequence[str]) -> None:
  """Prints everything."""
  # Before gin binds: a module may bring functions that it is to know.
  for module in ['tasks', *args.module]:
    importlib.import_module(module)
  bind_gin(args.gin_file, bindings)
  examples, rows, features, recipe = load(args)
  color = args.color == 'always' or args.color == 'auto' and sys.stdout.isatty()
  paint = Painter(color)
  vocabulary = features['targets'].vocabulary
  for number, example in enumerate(examples[: args.num_examples], 1):
    if recipe:
      lines = denoising_lines(example, vocabulary, paint)
    else:
      lines = text_lines(example, features, number)
    print('\n'.join(lines) + '\n')
  for number, row in enumerate(rows[: args.num_rows], 1):
    print('\n'.join(row_lines(row, vocabulary, number)) + '\n')
  if recipe:
    print(f'noise: {recipe}\n')
  print('\n'.join(summary_lines(examples, rows, recipe)))


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  args, rest = _parser().parse_known_args(argv)
  bindings = [a.removeprefix('--gin.') for a in rest if a.startswith('--gin.')]
  try:
    if len(bindings) < len(rest):
      raise UsageError(f'Unknown arguments: {" ".join(rest)}. See --help.')
    run(args, bindings)
  except (ValueError, FileNotFoundError) as e:
    print(f'inspect: {e}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
