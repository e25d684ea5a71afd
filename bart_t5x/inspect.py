"""Shows what a task makes of its data, or what a corpus is like.

    python -m bart_t5x.inspect --task=norwegian_denoising_mini --num_examples=5
    python -m bart_t5x.inspect --corpus=data/mini

For denoising tasks it shows what each mask replaces and which sentences moved; for
other tasks the texts and their ids. A table has lengths, padding, tokens cut off, and
the noise. Of a mixture it shows each task, and the rows that they share. Of a corpus,
the counts that `prepare` took.
"""

import argparse
import functools
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bart_t5x import cli, corpus_format
from bart_t5x.cli import UsageError

_CODES = {'mask': '33', 'new': '31', 'moved': '36', 'infilled': '32', 'faint': '2'}

Paint = Callable[[str, str], str]  # of a kind (a key of _CODES) and a text


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m bart_t5x.inspect',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog='Any --gin.NAME=VALUE is a gin binding, for instance\n'
    '--gin.noise.Recipe.infill_ratio=0.15. Terminals show colours unless NO_COLOR is\n'
    'set, other outputs if FORCE_COLOR is.',
  )
  add = parser.add_argument
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument('--task', help='a seqio task or mixture')
  what.add_argument(
    '--corpus', help='the folder of a corpus; other arguments are ignored'
  )
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
  add('--seed', type=int, default=0, help='of noise and order (default: 0)')
  add(
    '--use_cached',
    action='store_true',
    help='read what seqio_cache_tasks wrote, for tasks over raw text',
  )
  add('--cache_dir', help='folder with such caches')
  add(
    '--gin_file',
    action='append',
    help='noise recipe; may be repeated (default: gin/noise/default.gin)',
  )
  add('--module', help='module that registers the task, in addition to `tasks`')
  return parser


def paint_colour(kind: str, text: str) -> str:
  """Marks text by a terminal's colours."""
  return f'\033[{_CODES[kind]}m{text}\033[0m'


def paint_brackets(kind: str, text: str) -> str:
  """Marks text where there are no colours."""
  return {'infilled': f'[{text}]', 'new': f'<{text}>'}.get(kind, text)


def paint_for_stdout() -> Paint:
  """Returns colours for a terminal, unless NO_COLOR is set, or with FORCE_COLOR."""
  colours = sys.stdout.isatty() and not os.environ.get('NO_COLOR')
  return paint_colour if colours or os.environ.get('FORCE_COLOR') else paint_brackets


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


def denoising_lines(example: Mapping, vocabulary, paint: Paint) -> list[str]:
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


def _table_row(label: str, value: str, note: str = '') -> str:
  return f'{label:28} {value:>10}' + (f'  ({note})' if note else '')


def summary_lines(
  examples: Sequence[Mapping], rows: Sequence[Mapping], recipe, vocabulary
) -> list[str]:
  """Formats the table: lengths, padding, and the noise if there is a recipe."""
  lines = [_table_row('examples', f'{len(examples):,}')]
  for name in ('inputs', 'targets'):
    sizes = [len(e[name]) for e in examples if name in e and e[name].ndim == 1]
    if sizes:
      lines.append(_table_row(f'{name}, mean length', f'{sum(sizes) / len(sizes):.1f}'))
      lines.append(_table_row(f'{name}, longest', f'{max(sizes):,}'))
  for side in ('encoder', 'decoder'):
    masks = [row[f'{side}_segment_ids'] > 0 for row in rows]
    if masks:
      used = sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)
      lines.append(_table_row(f'padding, {side}', f'{1 - used:.2%}'))
  if recipe is None:
    cut = sum(int(v) for e in examples for k, v in e.items() if k.endswith('truncated'))
    return [*lines, _table_row('tokens cut off', f'{cut:,}')]
  return lines + _noise_lines(examples, recipe, vocabulary.mask_id)


def _noise_lines(examples: Sequence[Mapping], recipe, mask_id: int) -> list[str]:
  tokens = sum(len(e['targets']) - 2 for e in examples) or 1
  infilled = sum(int((e['targets_noised'] == 2).sum()) for e in examples)
  new = sum(int((e['references'] < 0).sum()) for e in examples)
  masks = sum(int((e['inputs'] == mask_id).sum()) for e in examples)
  source = sum(len(e['inputs']) - 2 for e in examples)
  moved = sum(bool((e['permuted'][1:] < e['permuted'][:-1]).any()) for e in examples)
  in_tokens = sum(bool(e['in_tokens']) for e in examples)
  dropped = [int(e['dropped']) for e in examples]
  unit = 'words' if recipe.whole_words else 'tokens'
  return [
    _table_row(
      'tokens masked',
      f'{infilled / tokens:.2%}',
      f'infill_ratio {recipe.infill_ratio:.0%} of {unit}',
    ),
    _table_row('tokens per mask', f'{infilled / max(new, 1):.2f}'),
    _table_row('source shorter by', f'{1 - source / tokens:.2%}'),
    _table_row(
      'sentences permuted', f'{moved / max(len(examples), 1):.2%}', 'of the examples'
    ),
    _table_row(
      'masks replaced at random',
      f'{1 - masks / max(new, 1):.2%}',
      f'random_ratio {recipe.random_ratio:.0%}',
    ),
    _table_row(
      'spans of tokens, not words', f'{in_tokens:,}', 'examples with very long words'
    ),
    _table_row(
      'source tokens cut off',
      f'{sum(dropped):,}',
      f'of {sum(map(bool, dropped)):,} examples',
    ),
  ]


# A corpus.


def corpus_lines(corpus: Mapping[str, Any]) -> list[str]:
  """Formats the content of a corpus.json."""
  dropped, baselines = corpus['dropped'], corpus['baselines']
  lines = [
    _table_row('source', corpus['source'], corpus['license']),
    _table_row('vocabulary', f'{corpus["vocab_size"]:,}', corpus['tokenizer']),
    _table_row('empty documents dropped', f'{dropped["empty"]:,}'),
    _table_row('duplicates dropped', f'{dropped["duplicates"]:,}'),
    _table_row('unigram loss', f'{baselines["unigram_loss"]:.3f}', 'nats per token'),
    _table_row(
      'commonest token',
      repr(baselines['commonest_token']),
      f'{baselines["commonest_token_share"]:.2%} of the tokens',
    ),
  ]
  for name, split in corpus['splits'].items():
    lines += [
      f'\n{name}',
      _table_row('documents', f'{split["documents"]:,}', f'{split["shards"]:,} files'),
      _table_row('tokens', f'{split["tokens"]:,}'),
      _table_row('bytes per token', f'{split["bytes"] / split["tokens"]:.2f}'),
    ]
    if 'words' in split:  # since format 2
      quantiles = [f'{n:,} ({share})' for share, n in split['length_quantiles'].items()]
      lines += [
        _table_row('tokens per word', f'{split["tokens"] / split["words"]:.2f}'),
        f'tokens per document at most    {", ".join(quantiles)}',
      ]
    per_document = split['sentences'] / split['documents']
    lines.append(_table_row('sentences per document', f'{per_document:.1f}'))
  return lines


# Data.


def load(args: argparse.Namespace) -> tuple[list[tuple[Any, Any, list]], list[Mapping]]:
  """Returns each task with its noise recipe (or None) and examples; and packed rows."""
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
  if args.cache_dir:
    seqio.add_global_cache_dirs([args.cache_dir])
  lengths = {'inputs': args.inputs_length, 'targets': args.targets_length}
  count = max(args.num_summed, args.num_examples)

  def examples_of(source):
    return source.get_dataset(
      lengths,
      args.split,
      shuffle=args.split == 'train',
      seed=args.seed,
      use_cached=args.use_cached,
      num_epochs=1,
    ).take(count)

  views = []
  for task in seqio.get_subtasks(provider):
    traced, recipe = _traced(task)
    views.append((task, recipe, list(examples_of(traced).as_numpy_iterator())))
  rows = BartFeatureConverter(pack=True)(examples_of(provider), lengths)
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


def run(args: argparse.Namespace, bindings: Sequence[str]) -> None:
  """Prints the examples, the rows and the table; or the table of a corpus."""
  if args.corpus:
    print('\n'.join(corpus_lines(corpus_format.read_existing(args.corpus))))
    return
  cli.import_tensorflow()
  import tensorflow as tf

  from bart_t5x import data
  from t5x import gin_utils

  cli.quiet_warnings()
  for module in filter(None, ('tasks', args.module)):  # may define gin's configurables
    data.import_tasks(module, '--module')
  files = args.gin_file or ['gin/noise/default.gin']
  logging.disable(logging.ERROR)  # gin reports each folder without the file as an error
  try:
    gin_utils.parse_gin_flags([], files, bindings, finalize_config=False)
  finally:
    logging.disable(logging.NOTSET)
  try:
    views, rows = load(args)
  except tf.errors.DataLossError as e:
    raise OSError(f'a file of the task is damaged: {e.message}') from e
  paint = paint_for_stdout()
  vocabulary = views[0][0].output_features['targets'].vocabulary
  for task, recipe, examples in views:
    if len(views) > 1:
      print(f'task {task.name}\n')
    for number, example in enumerate(examples[: args.num_examples], 1):
      if recipe:
        lines = denoising_lines(example, vocabulary, paint)
      else:
        lines = text_lines(example, task.output_features, number)
      print('\n'.join(lines) + '\n')
  for number, row in enumerate(rows[: args.num_rows], 1):
    print('\n'.join(row_lines(row, vocabulary, number)) + '\n')
  for task, recipe, examples in views:
    if len(views) > 1:
      print(f'task {task.name} (padding: of the mixture)')
    if recipe:
      print(f'noise: {recipe}\n')
    print('\n'.join(summary_lines(examples, rows, recipe, vocabulary)))


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  cli.set_up_libraries()
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
