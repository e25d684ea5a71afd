"""Shows what a pre-training run learned: held-out metrics, baselines, filled masks.

    python -m bart_t5x.report --model_dir=runs/bart_mini_no --corpus_dir=data/mini

Reads the run's metrics.jsonl and the baselines in corpus.json. `--html` also writes a
page with curves, one file without references to others.
"""

import argparse
import functools
import html
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bart_t5x import cli, corpus_format, inspect

Curve = list[tuple[int, float]]  # (step, value), steps rising

_BLOCKS = '▁▂▃▄▅▆▇█'
_EVALUATION = 'training_eval/'
_LABELS = {
  'loss': 'loss (nats per token)',
  'accuracy': 'accuracy',
  'infilled_accuracy': 'accuracy, infilled tokens',
  'copied_accuracy': 'accuracy, copied tokens',
  'end_accuracy': 'accuracy, end tokens',
  'hf_compat_loss': 'loss, without <s> and </s>',
  'hf_compat_accuracy': 'accuracy, without <s>, </s>',
}


def read_curves(model_dir: pathlib.Path) -> dict[str, dict[str, Curve]]:
  """Returns {source: {metric: curve}} of a run's metrics.jsonl, finite values only."""
  path = model_dir / 'metrics.jsonl'
  curves = {}

  def add(report):
    source = curves.setdefault(report['source'], {})
    for name, value in report['values'].items():
      if math.isfinite(value):
        source.setdefault(name, []).append((int(report['step']), value))

  if path.exists():
    _for_lines(path, 't5x.train', add)
  return curves


def _for_lines(path: pathlib.Path, writer: str, use: Callable[[Any], None]) -> None:
  number = 0
  # Not splitlines(), which also splits at a U+2028 inside a text.
  with path.open(encoding='utf-8') as lines:
    try:
      for number, line in enumerate(lines, 1):
        if line.endswith('\n'):  # else a run is writing it
          use(json.loads(line))
    except (ValueError, LookupError, TypeError, AttributeError) as e:
      raise ValueError(f'{path}, line {number}, is not as {writer} writes it.') from e


def evaluations(curves: Mapping[str, Mapping[str, Curve]]) -> dict:
  """Returns {task: {metric: curve}} of the evaluations on held-out data."""
  return {
    source.removeprefix(_EVALUATION): metrics
    for source, metrics in curves.items()
    if source.startswith(_EVALUATION)
  }


# The terminal.


def sparkline(curve: Curve, width: int = 40) -> str:
  """Draws a non-empty curve with at most `width` block characters."""
  step = max(1, math.ceil(len(curve) / width))
  values = [value for _, value in curve[::step]]
  low, high = min(values), max(values)
  scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0
  return ''.join(_BLOCKS[round((value - low) * scale)] for value in values)


def held_out_lines(curves: Mapping[str, Curve], baselines: Mapping) -> Iterator[str]:
  """Formats the table of held-out metrics and the curve of the loss."""
  for row in _table(curves, baselines):
    yield '{:27} {:>8} {:>8}   {}'.format(*row).rstrip()
  if len(curves.get('loss', ())) > 1:
    yield f'{"loss by step":27} {sparkline(curves["loss"])}'


def _table(curves, baselines):
  comparisons = {
    'loss': f'{baselines["unigram_loss"]:.3f}  a unigram model',
    'infilled_accuracy': f'{baselines["commonest_token_share"]:.3f}  always guessing '
    f'{baselines["commonest_token"]!r}',
  }
  yield '', 'start', 'end', 'to compare with'
  for name, label in _LABELS.items():
    if name in curves:
      first, last = (f'{curves[name][i][1]:.3f}' for i in (0, -1))
      yield label, first, last, comparisons.get(name, '')


def read_predictions(path: pathlib.Path) -> list[tuple[str, str]]:
  """Returns (text with masks, the model's text) of a file that t5x.infer wrote."""
  predictions = []

  def add(row):
    predictions.append((row['inputs']['inputs_pretokenized'], row['prediction']))

  _for_lines(path, 't5x.infer', add)
  return predictions


def fill_in_parts(masked: str, filled: str) -> list[str]:
  """Splits a model's text into kept and filled-in parts, by turns.

  One part if the model has not kept all that is outside of the masks.
  """
  first, *others = (f'({re.escape(p)})' for p in masked.strip().split('<mask>'))
  if not others:
    return [filled]
  # Atomic groups: without them the time grows with the power of the masks.
  middle = ''.join(f'(?>(.*?){piece})' for piece in others[:-1])
  match = re.fullmatch(f'{first}{middle}(.*){others[-1]}', filled, re.S)
  return list(match.groups()) if match else [filled]


def fill_in_lines(
  predictions: Sequence[tuple[str, str]], paint: inspect.Paint
) -> Iterator[str]:
  """Formats texts with masks and, below each, the model's, with fill-ins marked."""
  for masked, filled in predictions:
    parts = fill_in_parts(masked, filled.strip())
    marked = (
      paint('infilled', part) if i % 2 else part for i, part in enumerate(parts)
    )
    for text in (masked.replace('<mask>', paint('mask', '<mask>')), ''.join(marked)):
      yield '  ' + text.replace('\n', '⏎')
    yield ''


# The page.

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #656d76; --line: #d0d7de;
  --paper: #fff; --blue: #0969da; --orange: #bc4c00; --green: #1a7f37; --red: #cf222e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --faint: #9198a1;
  --line: #3d444d; --paper: #0d1117; --blue: #58a6ff; --orange: #f0883e;
  --green: #3fb950; --red: #ff7b72 } }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
table { border-collapse: collapse }
th, td { padding: .2rem 2rem .2rem 0; text-align: left;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums }
figure { display: inline-block; width: 28rem; max-width: 100%; margin: 1rem 1rem 0 0 }
figcaption { font-size: 14px } figcaption span { margin-right: 1rem }
svg { width: 100% }
svg text { fill: var(--faint); font-size: 12px }
path { fill: none; stroke: var(--line) }
.curve { stroke: currentColor; stroke-width: 2 }
.flat { stroke: currentColor; stroke-dasharray: 4 4 }
.c0, .sgr32 { color: var(--green) } .c1, .sgr33 { color: var(--orange) }
.c2, .sgr36 { color: var(--blue) } .sgr31 { color: var(--red) }
.sgr2 { color: var(--faint) } .sgr32 { font-weight: bold }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 14px }
"""
_WIDTH, _HEIGHT, _LEFT, _TOP = 400, 200, 36, 10


def ansi_to_html(text: str) -> str:
  """Converts a terminal's text, coloured by `inspect`, to HTML."""
  return re.sub(
    '\033\\[(\\d+)m(.*?)\033\\[0m',
    r'<span class="sgr\1">\2</span>',
    html.escape(text),
    flags=re.DOTALL,
  )


def chart(title: str, curves: Mapping[str, Curve]) -> str:
  """Draws at most three curves; one of a single point is a dashed level."""
  last = max(curve[-1][0] for curve in curves.values()) or 1
  highest = max(value for curve in curves.values() for _, value in curve)
  top = 1 if highest <= 1 else 4 * math.ceil(highest / 4)
  right, bottom = _LEFT + _WIDTH, _TOP + _HEIGHT + 18

  def place(step, value):
    return (
      f'{_LEFT + _WIDTH * step / last:.1f},{_TOP + _HEIGHT * (1 - value / top):.1f}'
    )

  legend, drawn = [], []
  for i in range(5):
    drawn += [
      f'<path d="M{place(0, top * i / 4)} h{_WIDTH}"/>',
      f'<text x="{_LEFT - 6}" y="{_TOP + _HEIGHT * (1 - i / 4) + 4}" '
      f'text-anchor="end">{top * i / 4:g}</text>',
    ]
  for number, (name, curve) in enumerate(curves.items()):
    kind, line = 'curve', ' '.join(place(*point) for point in curve)
    if len(curve) == 1:
      kind, line = 'flat', f'{place(0, curve[0][1])} h{_WIDTH}'
    drawn.append(f'<path class="c{number} {kind}" d="M{line}"/>')
    legend.append(
      f'<span class="c{number}">{html.escape(name)} {curve[-1][1]:.3f}</span>'
    )
  return '\n'.join(
    [
      f'<figure><strong>{title}</strong>',
      f'<figcaption>{"".join(legend)}</figcaption>',
      f'<svg viewBox="0 0 {right + 4} {bottom + 6}">',
      *drawn,
      f'<text x="{_LEFT}" y="{bottom}">0</text>',
      f'<text x="{right}" y="{bottom}" text-anchor="end">step {last:,}</text>',
      '</svg></figure>',
    ]
  )


def page(
  title: str,
  curves: Mapping[str, Mapping[str, Curve]],
  baselines: Mapping,
  predictions: Sequence[tuple[str, str]] = (),
  noise: str = '',
) -> str:
  """Returns the page; `noise` is coloured output of `bart_t5x.inspect`."""
  title = html.escape(title)
  parts = [
    '<!doctype html><html lang="en"><meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width">',
    f'<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>',
  ]
  for source, held_out in evaluations(curves).items():
    parts.append(f'<h2>Held-out documents of {html.escape(source)}</h2><table>')
    for row in _table(held_out, baselines):
      parts.append('<tr>' + ''.join(f'<td>{html.escape(cell)}' for cell in row))
    parts.append('</table>')
    losses = {
      'held out': held_out.get('loss'),
      'training': curves.get('train', {}).get('loss'),
      'unigram model': [(0, baselines['unigram_loss'])],
    }
    accuracies = {
      'copied': held_out.get('copied_accuracy'),
      'infilled': held_out.get('infilled_accuracy'),
      f'always {baselines["commonest_token"]!r}': [
        (0, baselines['commonest_token_share'])
      ],
    }
    for name, drawn in (('Loss', losses), ('Accuracy', accuracies)):
      parts.append(chart(name, {k: v for k, v in drawn.items() if v}))
  painted = '\n'.join(fill_in_lines(predictions, inspect.paint_colour))
  for name, text in (('Filled masks', painted), ('What the model reads', noise)):
    if text:
      parts.append(f'<h2>{name}</h2><pre>{ansi_to_html(text)}</pre>')
  return '\n'.join([*parts, ''])


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m bart_t5x.report', description=__doc__.split('\n')[0]
  )
  add = functools.partial(parser.add_argument, type=pathlib.Path)
  add('--model_dir', required=True)
  add('--corpus_dir', required=True)
  add('--predictions', help='a file that t5x.infer wrote')
  add('--html', help='the page to write')
  add(
    '--noise',
    help='for the page: what FORCE_COLOR=1 python -m bart_t5x.inspect … printed',
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  args = _parser().parse_args(argv)
  try:
    baselines = corpus_format.read_existing(args.corpus_dir)['baselines']
    curves = read_curves(args.model_dir)
    if not evaluations(curves):
      raise ValueError(f'no evaluation in {args.model_dir}/metrics.jsonl')
    predictions = read_predictions(args.predictions) if args.predictions else []
    noise = args.noise.read_text(encoding='utf-8') if args.noise else ''
    if args.html:
      text = page(str(args.model_dir), curves, baselines, predictions, noise)
      args.html.write_text(text, encoding='utf-8')
  except (OSError, ValueError) as e:
    return cli.fail(e)
  paint = inspect.paint_for_stdout()
  for source, held_out in evaluations(curves).items():
    print(f'Held-out documents of {source}\n')
    print('\n'.join(held_out_lines(held_out, baselines)))
  if predictions:
    print('\nFilled masks\n')
    print('\n'.join(fill_in_lines(predictions, paint)))
  return 0


if __name__ == '__main__':
  sys.exit(main())
