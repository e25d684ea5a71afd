"""Writes the tables and curves of benchmarks/transfer.py."""

import argparse
import json
import pathlib

from bart_t5x import report

SECONDS = 'seconds.jsonl'
STARTS = ('pretrained', 'scratch')
METRICS = ('exact_match', 'chrf')
TITLES = {
  'transfer_lemma': 'Definition → headword',
  'transfer_order': 'Shuffled sentences → text',
}
_COLORS = {'pretrained': '#1f6feb', 'scratch': '#d1242f'}
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 280, 170, 50, 40, 70

Curve = list[tuple[int, float]]


def _evaluations(folder: pathlib.Path, task: str) -> list[dict]:
  """The lines of seqio's JSONLogger, one per evaluation; steps from 0."""
  path = folder / 'inference_eval' / f'{task}-metrics.jsonl'
  first_step = folder / 'first_step.txt'
  if not path.exists() or not first_step.exists():
    return []
  first = int(first_step.read_text())
  found = [json.loads(line) for line in path.read_text().splitlines()]
  return [{**e, 'step': e['step'] - first} for e in found]


def is_done(folder: str, task: str, start: str, steps: int) -> bool:
  """Whether a fine-tuning run has evaluated its last step."""
  evaluations = _evaluations(pathlib.Path(folder) / task / start, task)
  return bool(evaluations) and evaluations[-1]['step'] >= steps


def _curve(folder: pathlib.Path, task: str, metric: str) -> Curve:
  """A metric by fine-tuning step, whatever step the run began at."""
  return [(e['step'], e[metric]) for e in _evaluations(folder, task)]


def svg(panels: dict[str, dict[str, Curve]]) -> str:
  """Line charts side by side.

  Args:
    panels: title -> name -> (step, value from 0 to 100), the same names in each.
  """
  width = len(panels) * (_WIDTH + _GAP) + _LEFT
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="260" '
    'font-family="sans-serif" font-size="12">',
    '<rect width="100%" height="100%" fill="white"/>',
  ]
  for number, (title, curves) in enumerate(panels.items()):
    parts += _panel(_LEFT + number * (_WIDTH + _GAP), title, curves)
  return '\n'.join([*parts, '</svg>\n'])


def _panel(left: int, title: str, curves: dict[str, Curve]) -> list[str]:
  points = [point for curve in curves.values() for point in curve]
  last = max(step for step, _ in points)
  top = max(10, 10 * -(-max(value for _, value in points) // 10))

  def place(step, value):
    x = left + _WIDTH * step / last
    return f'{x:.1f},{_TOP + _HEIGHT * (1 - value / top):.1f}'

  bottom = _TOP + _HEIGHT
  parts = [
    f'<text x="{left}" y="{_TOP - 14}" font-weight="bold">{title}</text>',
    f'<path d="M{left},{_TOP} V{bottom} H{left + _WIDTH}" fill="none" stroke="#888"/>',
    f'<text x="{left - 8}" y="{_TOP + 4}" text-anchor="end">{top:g}</text>',
    f'<text x="{left - 8}" y="{bottom}" text-anchor="end">0</text>',
    f'<text x="{left + _WIDTH}" y="{bottom + 18}" text-anchor="end">step {last}</text>',
  ]
  for row, (name, curve) in enumerate(curves.items()):
    color = _COLORS[name]
    line = ' '.join(place(*point) for point in curve)
    parts += [
      f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>',
      f'<text x="{left + 90 * row}" y="{bottom + 36}" fill="{color}">{name}</text>',
    ]
  return parts


def _pretraining_lines(folder: pathlib.Path) -> list[str]:
  """The held-out metrics of pre-training, first and last."""
  (curves,) = report.evaluations(report.read_curves(folder / 'pretrained')).values()
  lines = ['| pre-training, held out | start | end |', '| --- | ---: | ---: |']
  for name in ('loss', 'accuracy', 'infilled_accuracy', 'copied_accuracy'):
    values = [value for _, value in curves[name]]
    lines.append(f'| {name} | {values[0]:.3f} | {values[-1]:.3f} |')
  return lines


def _task_lines(folder: pathlib.Path) -> list[str]:
  """The best value of each metric among a run's evaluations."""
  lines = [
    '| task, held-out examples | metric | pre-trained | from scratch |',
    '| --- | --- | ---: | ---: |',
  ]
  for task, title in TITLES.items():
    for metric in METRICS:
      pretrained, scratch = (
        max(value for _, value in _curve(folder / task / start, task, metric))
        for start in STARTS
      )
      lines.append(f'| {title} | {metric} | {pretrained:.1f} | {scratch:.1f} |')
  return lines


def write(
  output: pathlib.Path, folder: str | pathlib.Path, args: argparse.Namespace
) -> None:
  """Writes transfer.md and transfer.svg to `output` about the runs in `folder`."""
  folder = pathlib.Path(folder)
  panels = {
    f'{title}: chrF': {
      start: _curve(folder / task / start, task, 'chrf') for start in STARTS
    }
    for task, title in TITLES.items()
  }
  (output / 'transfer.svg').write_text(svg(panels))
  spent = [json.loads(line) for line in (folder / SECONDS).read_text().splitlines()]
  minutes = sum(s['cpu'] for s in spent) / 60
  lines = [
    '# Does pre-training pay? A mini BART on two tasks',
    '',
    f'Made by `python benchmarks/transfer.py --megabytes={args.megabytes} '
    f'--pretraining_steps={args.pretraining_steps} --steps={args.steps} --input …` on '
    f'two CPU cores, in {minutes:.0f} CPU minutes. One seed and short runs: the '
    'difference between the columns is what to look at, not their height.',
    '',
    'gin/models/mini.gin with a vocabulary of 8,000 (2 M parameters) was pre-trained '
    'with gin/bart_mini_no.gin and gin/noise/default.gin on '
    f'{args.megabytes} MB of Norwegian laws, novels of 1840–1920, Bokmålsordboka and '
    f'manuals, {args.pretraining_steps:,} steps of 32 × 64 tokens; held-out texts are '
    'in no training file. Fine-tuning: gin/finetune.gin, 4,096 examples, '
    f'{args.steps} steps of 32, learning rate 1e-3 for both, greedy decoding of 128 '
    'held-out examples, of five evaluations the best.',
    '',
    'The best is taken on the very examples that the table is about, for each metric '
    'apart, which flatters both columns; the rate was not tuned for either start. Read '
    'it as how far each start is after so few steps, not as what the tasks allow.',
    '',
    *_task_lines(folder),
    '',
    '![chrF of the held-out examples while fine-tuning](transfer.svg)',
    '',
    *_pretraining_lines(folder),
    '',
  ]
  (output / 'transfer.md').write_text('\n'.join(lines))
