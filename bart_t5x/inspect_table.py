"""The table of `bart_t5x.inspect`: the noise applied, and how full the rows are."""

import math
from collections.abc import Mapping, Sequence

_BAR_WIDTH = 40


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
  return lines + noise_lines(examples, recipe)


def noise_lines(examples: Sequence[Mapping], recipe) -> list[str]:
  """The rows of the table that tell of the noise, and the histogram of its spans."""
  lines = []

  def add(label, value, wanted=''):
    lines.append(f'{label:28} {value:>10}{wanted and f"  ({wanted})"}')

  tokens = sum(len(e['targets']) - 2 for e in examples)
  infilled = sum(int((e['targets_noised'] == 2).sum()) for e in examples)
  new = sum(int((e['references'] < 0).sum()) for e in examples)
  masks = sum(int((e['inputs'] == e['mask_id']).sum()) for e in examples)
  source = sum(len(e['inputs']) - 2 for e in examples)
  moved = sum(bool((e['permuted'][1:] < e['permuted'][:-1]).any()) for e in examples)
  lengths = [length for e in examples for length in e['span_lengths'].tolist()]
  unit = 'words' if recipe.whole_words else 'tokens'
  add(
    'tokens masked',
    f'{infilled / max(tokens, 1):.2%}',
    f'infill_ratio {recipe.infill_ratio:.0%} of {unit}',
  )
  add('source shorter by', f'{1 - source / max(tokens, 1):.2%}')
  add('sentences permuted', f'{moved / max(len(examples), 1):.2%}', 'of the examples')
  add('spans', f'{len(lengths):,}')
  add('insertions', f'{lengths.count(0):,}')
  add(
    'masks replaced at random',
    f'{1 - masks / max(new, 1):.2%}',
    f'random_ratio {recipe.random_ratio:.0%}',
  )
  if recipe.whole_words:
    by_tokens = sum(bool(e['in_tokens']) for e in examples)
    add('spans of tokens, not words', f'{by_tokens:,}', 'examples with too long words')
  dropped = [int(e['dropped']) for e in examples]
  cut = sum(count > 0 for count in dropped)
  add('source tokens cut off', f'{sum(dropped):,}', f'of {cut:,} examples')
  return [*lines, '', *histogram_lines(lengths, recipe.span_mean)]


def histogram_lines(lengths: Sequence[int], mean: float) -> list[str]:
  """Span lengths beside the Poisson distribution from which they were drawn."""
  if not lengths:
    return []
  unit = 'span length (0: insertion)'
  lines = [f'{unit:28} {"seen":>8} {"Poisson":>8}  # seen, | Poisson']
  for k in range(min(max(lengths), math.ceil(3 * mean)) + 1):
    seen = sum(length == k for length in lengths) / len(lengths)
    expected = math.exp(k * math.log(mean) - mean - math.lgamma(k + 1))
    seen_at, expected_at = (round(share * _BAR_WIDTH * 3) for share in (seen, expected))
    bar = ('#' * seen_at).ljust(expected_at + 1)
    bar = f'{bar[:expected_at]}|{bar[expected_at + 1 :]}'
    lines.append(f'{k:28} {seen:8.3f} {expected:8.3f}  {bar}')
  lines.append("An example's last span is cut to its budget, so short ones are more.")
  return lines
