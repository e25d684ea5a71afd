"""What a pre-training run learned, in one look at the terminal.

    python -m bart_t5x.report --model_dir=runs/bart_mini_no --corpus_dir=data/mini

Reads the TensorBoard events that `t5x.train` wrote and the baselines that `prepare`
put into corpus.json. Nothing is computed anew.
"""

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Sequence

Curve = list[tuple[int, float]]  # (step, value), steps rising

_BLOCKS = '▁▂▃▄▅▆▇█'


def read_curves(folder: pathlib.Path) -> dict[str, Curve]:
  """The scalars in a folder of TensorBoard events, by name.

  Raises:
    FileNotFoundError: the folder holds no events.
  """
  # Late: importing tensorboard takes longer than --help should.
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  if not list(folder.glob('events.out.tfevents.*')):
    raise FileNotFoundError(
        f'no TensorBoard events in {folder}: has python -m t5x.train evaluated there?'
    )
  events = event_accumulator.EventAccumulator(
      str(folder), size_guidance={event_accumulator.TENSORS: 0}
  )
  events.Reload()
  curves = {}
  for tag in events.Tags()['tensors']:
    points = {}  # a resumed run writes a step again: the later value counts
    for event in events.Tensors(tag):
      value = tensor_util.make_ndarray(event.tensor_proto)
      if value.ndim == 0 and value.dtype.kind == 'f':
        points[event.step] = float(value)
    if points:
      curves[tag] = sorted(points.items())
  return curves


def sparkline(curve: Curve, width: int = 40) -> str:
  """A curve as one line of block characters, lowest to highest value.

  Args:
    curve: at least one point.
    width: longest line, in characters; longer curves are thinned out.
  """
  step = max(1, math.ceil(len(curve) / width))
  values = [value for _, value in curve[::step]]
  low, high = min(values), max(values)
  scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0
  return ''.join(_BLOCKS[round((value - low) * scale)] for value in values)


def held_out_table(curves: dict[str, Curve], corpus: dict) -> list[str]:
  """Loss and accuracies at the first and the last evaluation, with baselines.

  Args:
    curves: of the held-out evaluation.
    corpus: the content of corpus.json.

  Returns:
    Lines of text.
  """
  baselines = corpus['baselines']
  unigram = f'{baselines["unigram_loss"]:.3f}  a unigram model'
  common = (
      f'{baselines["commonest_token_share"]:.3f}  always guessing '
      f'{baselines["commonest_token"]!r}'
  )
  rows = [
      ('loss', 'loss (nats a token)', unigram),
      ('accuracy', 'accuracy', ''),
      ('infilled_accuracy', 'accuracy, infilled tokens', common),
      ('copied_accuracy', 'accuracy, copied tokens', ''),
      ('end_accuracy', 'accuracy, end tokens', ''),
      ('hf_compat_loss', 'loss, without <s> and </s>', ''),
      ('hf_compat_accuracy', 'accuracy, without <s>, </s>', ''),
  ]
  lines = [f'{"held-out documents":27} {"start":>8} {"end":>8}   to compare with']
  for tag, label, comparison in rows:
    if tag in curves:
      curve = curves[tag]
      line = f'{label:27} {curve[0][1]:8.3f} {curve[-1][1]:8.3f}   {comparison}'
      lines.append(line.rstrip())
  if 'loss' in curves and len(curves['loss']) > 1:
    lines.append(f'{"loss by step":27} {sparkline(curves["loss"])}')
  return lines


def prediction_lines(path: pathlib.Path) -> list[str]:
  """Each input and what the model made of it, from what t5x.infer wrote."""
  lines = []
  for row in path.read_text(encoding='utf-8').splitlines():
    result = json.loads(row)
    inputs = result['inputs'].get('inputs_pretokenized', '')
    lines += [f'  in   {inputs}', f'  out  {result["prediction"]}', '']
  return lines


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      prog='python -m bart_t5x.report', description=__doc__.split('\n')[0]
  )
  parser.add_argument('--model_dir', required=True, type=pathlib.Path)
  parser.add_argument('--corpus_dir', required=True, type=pathlib.Path)
  parser.add_argument(
      '--predictions', type=pathlib.Path, help='a file that t5x.infer wrote'
  )
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  args = _parse(argv)
  try:
    corpus = json.loads((args.corpus_dir / 'corpus.json').read_text(encoding='utf-8'))
    folders = sorted((args.model_dir / 'training_eval').glob('*/'))
    if not folders:
      raise FileNotFoundError(f'no evaluation in {args.model_dir}/training_eval')
    for folder in folders:
      print('\n'.join(held_out_table(read_curves(folder), corpus)))
    if args.predictions:
      print('\nwhat it puts for <mask>, as it comes')
      print('\n'.join(prediction_lines(args.predictions)))
  except FileNotFoundError as e:
    print(f'error: {e}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
