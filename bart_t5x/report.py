"""Prints held-out metrics of a pre-training run, with baselines.

    python -m bart_t5x.report --model_dir=runs/bart_mini_no --corpus_dir=data/mini

Reads TensorBoard events of `t5x.train` and the baselines in corpus.json.
"""

import argparse
import json
import math
import pathlib
import struct
import sys
from collections.abc import Sequence

from bart_t5x import cli

Curve = list[tuple[int, float]]  # (step, value), steps rising

_BLOCKS = '▁▂▃▄▅▆▇█'


def read_curves(folder: pathlib.Path) -> dict[str, Curve]:
  """Returns the scalars in a folder of TensorBoard events, by name."""
  # Late, for --help. TensorBoard's own loader would import TensorFlow.
  from tensorboard.compat.proto import event_pb2
  from tensorboard.util import tensor_util

  curves = {}
  for file in sorted(folder.glob('events.out.tfevents.*')):
    content, at = file.read_bytes(), 0
    while at < len(content):
      # Record: 8 bytes of length, 4 of checksum, the event, 4 of checksum. The last
      # may be incomplete.
      (length,) = struct.unpack('<Q', content[at : at + 8].ljust(8, b'\0'))
      record = content[at + 12 : at + 12 + length]
      at += 16 + length
      if at > len(content):
        break
      event = event_pb2.Event.FromString(record)
      for value in event.summary.value:
        if not value.HasField('tensor'):
          continue
        array = tensor_util.make_ndarray(value.tensor)
        if array.ndim == 0 and array.dtype.kind == 'f':
          # A resumed run repeats steps; the later value counts.
          curves.setdefault(value.tag, {})[event.step] = float(array)
  return {tag: sorted(points.items()) for tag, points in curves.items()}


def sparkline(curve: Curve, width: int = 40) -> str:
  """Draws a non-empty curve with at most `width` block characters."""
  step = max(1, math.ceil(len(curve) / width))
  values = [value for _, value in curve[::step]]
  low, high = min(values), max(values)
  scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0
  return ''.join(_BLOCKS[round((value - low) * scale)] for value in values)


def held_out_table(curves: dict[str, Curve], corpus: dict) -> list[str]:
  """Returns lines with loss and accuracies at the first and the last evaluation.

  `corpus` is the content of corpus.json, with the baselines.
  """
  baselines = corpus['baselines']
  unigram = f'{baselines["unigram_loss"]:.3f}  a unigram model'
  common = (
    f'{baselines["commonest_token_share"]:.3f}  always guessing '
    f'{baselines["commonest_token"]!r}'
  )
  rows = [
    ('loss', 'loss (nats per token)', unigram),
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
  """Returns inputs and predictions of a file that t5x.infer wrote."""
  lines = []
  # Not splitlines(), which also splits at a U+2028 inside a text.
  with path.open(encoding='utf-8') as rows:
    for row in rows:
      result = json.loads(row)
      inputs = result['inputs'].get('inputs_pretokenized', '')
      prediction = result['prediction'].replace('\n', '⏎')
      lines += [f'  in   {inputs}', f'  out  {prediction}', '']
  return lines


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m bart_t5x.report', description=__doc__.split('\n')[0]
  )
  parser.add_argument('--model_dir', required=True, type=pathlib.Path)
  parser.add_argument('--corpus_dir', required=True, type=pathlib.Path)
  parser.add_argument(
    '--predictions', type=pathlib.Path, help='a file that t5x.infer wrote'
  )
  args = parser.parse_args(argv)
  try:
    path = args.corpus_dir / 'corpus.json'
    try:
      corpus = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as e:
      raise ValueError(f'{path} is damaged: {e}') from e
    folders = sorted((args.model_dir / 'training_eval').glob('*/'))
    if not folders:
      raise FileNotFoundError(f'no evaluation in {args.model_dir}/training_eval')
    for folder in folders:
      if len(folders) > 1:
        print(f'{folder.name}:')
      print('\n'.join(held_out_table(read_curves(folder), corpus)))
    if args.predictions:
      print('\npredictions')
      print('\n'.join(prediction_lines(args.predictions)))
  except (OSError, ValueError) as e:
    return cli.fail(e)
  return 0


if __name__ == '__main__':
  sys.exit(main())
