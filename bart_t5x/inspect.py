"""Shows what a task makes of its data: examples, packed rows, and statistics.

    python -m bart_t5x.inspect --task=norwegian_denoising_mini --num_examples=5

For denoising tasks it shows what each mask replaces and which sentences moved; for
other tasks the texts and their ids. A table summarizes the share of masked tokens, span
lengths next to the Poisson distribution, padding, and tokens cut off. Of a mixture it
shows each task, with examples in proportion to its rate, and the rows that they share.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bart_t5x import cli
from bart_t5x.cli import UsageError

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_DEFAULT_GIN = os.path.join(_ROOT, 'gin', 'denoising.gin')
_CODES = {'mask': '33', 'new': '31', 'moved': '36', 'infilled': '32', 'faint': '2'}
_BAR_WIDTH = 120


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
    help='examples that the table summarizes (default: 1000)',
  )
  add(
    '--inputs_length',
    type=int,
    default=1024,
    help='default: 1024. Noise can lengthen short texts: targets under about 60 tokens '
    'need longer inputs',
  )
  add('--targets_length', type=int, default=1024, help='default: 1024')
  add(
    '--use_cached',
    action='store_true',
    help='read what seqio_cache_tasks wrote, for tasks over raw text',
  )
  add(
    '--cache_dir',
    action='append',
    default=[],
    help='folder with such caches; may be repeated',
  )
  add('--seed', type=int, default=0, help='of noise and order (default: 0)')
  add(
    '--gin_file',
    action='append',
    help='noise recipe gin/noise/….gin; may be repeated (default: gin/denoising.gin)',
  )
  add(
    '--module',
    action='append',
    default=['tasks'],
    help='module that registers the task, in addition to `tasks`; may be repeated',
  )
  add(
    '--color',
    choices=('auto', 'always', 'never'),
    default='auto',
    help='auto: in a terminal, unless NO_COLOR is set (default)',
  )
  return parser


def wants_color(choice: str, terminal: bool) -> bool:
  """Returns whether to use colour; 'auto' follows https://no-color.org."""
  if choice != 'auto':
    return choice == 'always'
  return terminal and not os.environ.get('NO_COLOR')


class Painter:
  """Marks text by colour or by brackets."""

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
  """Pairs new tokens with the clean positions that they replace.

  Args:
    references: of a source, see `noise`.
    permuted: clean positions in the order after permutation.

  Yields:
    (ids of new tokens, missing clean positions). Adjacent spans are one pair.
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
  last = -1
  for i, reference in enumerate(references):
    if reference > 0:
      if place[reference] < last:
        return [*references[i:], *references[:i]]
      last = place[reference]
  return references


def sentence_order(permuted: Sequence[int], starts: Sequence[int]) -> list[int]:
  """Returns the numbers of the sentences, from 0, in the order after permutation."""
  number = {start + 1: i for i, start in enumerate(starts)}
  return [number[position] for position in permuted if position in number]


def denoising_lines(example: Mapping, vocabulary, paint: Painter) -> list[str]:
  """Formats a traced denoising example."""
  target = example['targets'].tolist()
  references = example['references'].tolist()
  permuted = example['permuted'].tolist()
  sentences = sentence_order(permuted, example['sentence_starts'].tolist())

  def text(positions):
    return vocabulary.decode([target[p] for p in positions])

  def new_token(token):
    if token == vocabulary.mask_id:
      return paint('mask', '<mask>')
    return paint('new', vocabulary.decode([token]))

  clean = ''
  codes = example['targets_noised']
  for code, run in itertools.groupby(range(1, len(target) - 1), lambda p: codes[p]):
    clean += paint('infilled', text(run)) if code == 2 else text(run)
  source = ''
  for kept, run in itertools.groupby(references, lambda reference: reference > 0):
    source += text(run) if kept else ''.join(new_token(-r) for r in run)
  title = (
    f'document {example["example_id"]}, piece {example["piece"]}, epoch '
    f'{example["epoch"]}: {len(target)} tokens, source {len(references) + 2}'
  )
  lines = [paint('faint', title), f'  target  {clean}', f'  source  {source}']
  if sentences != sorted(sentences):
    numbers = ' '.join(str(s + 1) for s in sentences)
    lines.append('  order   ' + paint('moved', f'sentences {numbers}'))
  for new, missing in spans_of(references, permuted):
    stands = vocabulary.decode(new) if new else 'nothing'
    what = repr(text(missing)) if missing else 'nothing: an insertion'
    lines.append(f'  span    {paint("mask", stands)} for {what}')
  if example['in_tokens']:
    lines.append('  units   tokens: spans of words would have left the source too long')
  if example['dropped']:
    lines.append(f'  cut off {example["dropped"]} source tokens')
  return lines


# Other tasks, and rows.


def text_lines(example: Mapping, features: Mapping, number: int) -> list[str]:
  """Formats the texts and ids of any example."""
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


def row_lines(row: Mapping, vocabulary, number: int) -> list[str]:
  """Lists the examples that share a packed row."""
  lines = []
  segments = row['decoder_segment_ids']
  for segment in range(1, int(segments.max()) + 1):
    ids = row['decoder_target_tokens'][segments == segment]
    source = int((row['encoder_segment_ids'] == segment).sum())
    begin = vocabulary.decode(ids[:12].tolist())
    lines.append(f'  {len(ids):5} targets, {source:5} inputs  {begin!r} …')
  full = int((segments > 0).sum())
  head = f'row {number}: {len(lines)} examples, {full:,} of {segments.size:,} '
  return [head + 'target slots', *lines]


# The table.


@dataclasses.dataclass
class View:
  """A task and its examples as numpy arrays, traced if it denoises."""

  task: Any
  examples: list[Mapping]
  shown: int  # number of examples to show
  recipe: Any = None  # the noise, if it denoises


def _table_row(label: str, value: str, note: str = '') -> str:
  return f'{label:28} {value:>10}' + (f'  ({note})' if note else '')


def summary_lines(view: View, rows: Sequence[Mapping]) -> list[str]:
  """Formats the table: lengths, padding, and the noise."""
  examples = view.examples
  lines = [_table_row('examples', f'{len(examples):,}')]
  for name in ('inputs', 'targets'):
    sizes = [len(e[name]) for e in examples if name in e and e[name].ndim == 1]
    if sizes:
      lines.append(_table_row(f'{name}, mean length', f'{sum(sizes) / len(sizes):.1f}'))
      lines.append(_table_row(f'{name}, longest', f'{max(sizes):,}'))
  for side in ('encoder', 'decoder'):
    key = f'{side}_segment_ids'
    slots = sum(row[key].size for row in rows)
    if slots:
      used = sum(int((row[key] > 0).sum()) for row in rows)
      lines.append(_table_row(f'padding, {side}', f'{1 - used / slots:.2%}'))
  if view.recipe is None:
    cut = sum(int(v) for e in examples for k, v in e.items() if k.endswith('truncated'))
    return [*lines, _table_row('tokens cut off', f'{cut:,}')]
  mask_id = view.task.output_features['targets'].vocabulary.mask_id
  return lines + _noise_lines(examples, view.recipe, mask_id)


def _noise_lines(examples: Sequence[Mapping], recipe, mask_id: int) -> list[str]:
  tokens = sum(len(e['targets']) - 2 for e in examples)
  infilled = sum(int((e['targets_noised'] == 2).sum()) for e in examples)
  new = sum(int((e['references'] < 0).sum()) for e in examples)
  masks = sum(int((e['inputs'] == mask_id).sum()) for e in examples)
  source = sum(len(e['inputs']) - 2 for e in examples)
  moved = sum(bool((e['permuted'][1:] < e['permuted'][:-1]).any()) for e in examples)
  lengths = [length for e in examples for length in e['span_lengths'].tolist()]
  dropped = [int(e['dropped']) for e in examples]
  unit = 'words' if recipe.whole_words else 'tokens'
  lines = [
    _table_row(
      'tokens masked',
      f'{infilled / max(tokens, 1):.2%}',
      f'infill_ratio {recipe.infill_ratio:.0%} of {unit}',
    ),
    _table_row('source shorter by', f'{1 - source / max(tokens, 1):.2%}'),
    _table_row(
      'sentences permuted', f'{moved / max(len(examples), 1):.2%}', 'of the examples'
    ),
    _table_row('spans', f'{len(lengths):,}'),
    _table_row('insertions', f'{lengths.count(0):,}'),
    _table_row(
      'masks replaced at random',
      f'{1 - masks / max(new, 1):.2%}',
      f'random_ratio {recipe.random_ratio:.0%}',
    ),
  ]
  if recipe.whole_words:
    in_tokens = sum(bool(e['in_tokens']) for e in examples)
    note = 'examples with very long words'
    lines.append(_table_row('spans of tokens, not words', f'{in_tokens:,}', note))
  cut = sum(count > 0 for count in dropped)
  lines.append(
    _table_row('source tokens cut off', f'{sum(dropped):,}', f'of {cut:,} examples')
  )
  return [*lines, '', *_histogram_lines(lengths, recipe.span_mean)]


def _histogram_lines(lengths: Sequence[int], mean: float) -> list[str]:
  if not lengths:
    return []
  unit = 'span length (0: insertion)'
  lines = [f'{unit:28} {"seen":>8} {"Poisson":>8}  # seen, | Poisson']
  for k in range(min(max(lengths), math.ceil(3 * mean)) + 1):
    seen = lengths.count(k) / len(lengths)
    expected = math.exp(k * math.log(mean) - mean - math.lgamma(k + 1))
    at = round(expected * _BAR_WIDTH)
    bar = ('#' * round(seen * _BAR_WIDTH)).ljust(at + 1)
    lines.append(f'{k:28} {seen:8.3f} {expected:8.3f}  {bar[:at]}|{bar[at + 1 :]}')
  lines.append('The last span of each example is clipped, which adds short ones.')
  return lines


# Data.


def load(args: argparse.Namespace) -> tuple[list[View], list[Mapping]]:
  """Returns the view of each task and the packed rows."""
  import seqio

  from bart_t5x import data
  from bart_t5x.features import BartFeatureConverter

  provider = data.find_task(
    args.task, hint='Check --task, and name the module that registers it by --module.'
  )
  if args.split not in provider.splits:
    raise UsageError(
      f'{args.task!r} has no split {args.split!r}. It has: {sorted(provider.splits)}'
    )
  lengths = {'inputs': args.inputs_length, 'targets': args.targets_length}
  kwargs = {'shuffle': args.split == 'train', 'seed': args.seed, 'num_epochs': 1}
  kwargs['use_cached'] = args.use_cached
  tasks = seqio.get_subtasks(provider)
  rates = [1.0]
  if isinstance(provider, seqio.Mixture):
    rates = [provider.get_rate(task) for task in tasks]
  count = max(args.num_summed, args.num_examples)
  views = []
  for task, rate in zip(tasks, rates, strict=True):
    share = rate / sum(rates)
    traced, recipe = _traced(task)
    examples = traced.get_dataset(lengths, args.split, **kwargs)
    examples = list(examples.take(math.ceil(count * share)).as_numpy_iterator())
    views.append(View(task, examples, math.ceil(args.num_examples * share), recipe))
  packed = provider.get_dataset(lengths, args.split, **kwargs).take(count)
  rows = BartFeatureConverter(pack=True)(packed, lengths)
  return views, list(rows.as_numpy_iterator())


def _traced(task) -> tuple[Any, Any]:
  """Returns a denoising task with `trace` and its recipe; other tasks with None."""
  from bart_t5x import data, noise, preprocessors

  if not isinstance(task, data.EpochTask):
    return task, None
  *steps, denoise = task.preprocessors
  if getattr(denoise, 'func', denoise) is not preprocessors.denoise:
    return task, None
  recipe = getattr(denoise, 'keywords', {}).get('recipe') or noise.Recipe()
  steps.append(functools.partial(denoise, trace=True))
  return task.replace(preprocessors=steps), recipe


def _bind_gin(files: Sequence[str] | None, bindings: Sequence[str]) -> None:
  from t5x import gin_utils

  if files is None:
    files = [_DEFAULT_GIN] if os.path.exists(_DEFAULT_GIN) else []
  for name in files:
    if not any(os.path.exists(os.path.join(root, name)) for root in ('.', _ROOT)):
      raise UsageError(f'--gin_file={name} was not found in . or {_ROOT}')
  gin_utils.parse_gin_flags([_ROOT], files, bindings, finalize_config=False)


def run(args: argparse.Namespace, bindings: Sequence[str]) -> None:
  """Prints the examples, the rows and the table."""
  cli.import_tensorflow()
  import tensorflow as tf

  from bart_t5x import data

  cli.quiet_warnings()
  for module in args.module:  # before gin's files are read, for its configurables
    data.import_tasks(module, '--module')
  _bind_gin(args.gin_file, bindings)
  if args.cache_dir:
    import seqio

    seqio.add_global_cache_dirs(args.cache_dir)
  try:
    views, rows = load(args)
  except tf.errors.DataLossError as e:
    raise OSError(f'a file of the task is damaged: {e.message}') from e
  paint = Painter(wants_color(args.color, sys.stdout.isatty()))
  for view in views:
    if len(views) > 1:
      print(f'task {view.task.name}\n')
    features = view.task.output_features
    for number, example in enumerate(view.examples[: view.shown], 1):
      if view.recipe:
        lines = denoising_lines(example, features['targets'].vocabulary, paint)
      else:
        lines = text_lines(example, features, number)
      print('\n'.join(lines) + '\n')
  vocabulary = views[0].task.output_features['targets'].vocabulary
  for number, row in enumerate(rows[: args.num_rows], 1):
    print('\n'.join(row_lines(row, vocabulary, number)) + '\n')
  for view in views:
    if len(views) > 1:
      print(f'task {view.task.name} (padding: of the mixture)')
    if view.recipe:
      print(f'noise: {view.recipe}\n')
    print('\n'.join(summary_lines(view, rows)))


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  cli.quiet_libraries()
  args, rest = _parser().parse_known_args(argv)
  bindings = [a.removeprefix('--gin.') for a in rest if a.startswith('--gin.')]
  try:
    if len(bindings) < len(rest):
      raise UsageError(f'Unknown arguments: {" ".join(rest)}. See --help.')
    run(args, bindings)
  except (ValueError, OSError, ImportError) as e:
    return cli.fail(e)
  return 0


if __name__ == '__main__':
  sys.exit(main())
