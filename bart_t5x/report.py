"""What a pre-training run learned, in one look at the terminal.

    python -m bart_t5x.report --model_dir=runs/bart_mini_no --corpus_dir=data/mini

Reads the TensorBoard events that `t5x.train` wrote and the baselines that `prepare`
put into corpus.json. Nothing is computed anew.
"""

import argparse
import itertools
import json
import math
import pathlib
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bart_t5x import cli

if TYPE_CHECKING:
  from tensorboard.compat.proto import event_pb2

Curve = list[tuple[int, float]]  # (step, value), steps rising

_BLOCKS = '▁▂▃▄▅▆▇█'


def _events(file: pathlib.Path) -> Iterator['event_pb2.Event']:
  """The events of a file, up to where a writer stopped in mid-record.

  TensorBoard's own loader would import TensorFlow, which takes longer than all the
  rest. A record is 8 bytes of length, 4 of checksum, the content, 4 of checksum.
  """
  from tensorboard.compat.proto import event_pb2  # late: --help answers at once

  content = file.read_bytes()
  at = 0
  while len(content) >= at + 12:
    (length,) = struct.unpack_from('<Q', content, at)
    record = content[at + 12 : at + 12 + length]
    at += 16 + length
    if at > len(content):
      return
    yield event_pb2.Event.FromString(record)


def read_curves(folder: pathlib.Path) -> dict[str, Curve]:
  """The scalars in a folder of TensorBoard events, by name.

  Raises:
    FileNotFoundError: the folder holds no events.
  """
  from tensorboard.util import tensor_util  # late, as above

  files = sorted(folder.glob('events.out.tfevents.*'))
  if not files:
    raise FileNotFoundError(
      f'no TensorBoard events in {folder}: has python -m t5x.train evaluated there?'
    )
  curves = {}
  for event in itertools.chain.from_iterable(map(_events, files)):
    for value in event.summary.value:
      if not value.HasField('tensor'):
        continue
      array = tensor_util.make_ndarray(value.tensor)
      if array.ndim == 0 and array.dtype.kind == 'f':
        # A resumed run writes a step again: the later value counts.
        curves.setdefault(value.tag, {})[event.step] = float(array)
  return {tag: sorted(points.items()) for tag, points in curves.items()}


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
  # Not splitlines(), which also splits at what JSON leaves in a text, such as U+2028.
  with path.open(encoding='utf-8') as rows:
    for row in rows:
      result = json.loads(row)
      inputs = result['inputs'].get('inputs_pretokenized', '')
      prediction = result['prediction'].replace('\n', '⏎')  # to stay on a line
      lines += [f'  in   {inputs}', f'  out  {prediction}', '']
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
  from bart_t5x import corpus_format  # late: --help answers at once

  try:
    path = args.corpus_dir / corpus_format.CORPUS_FILE
    corpus = corpus_format.parse(path.read_text(encoding='utf-8'), str(path))
    folders = sorted((args.model_dir / 'training_eval').glob('*/'))
    if not folders:
      raise FileNotFoundError(f'no evaluation in {args.model_dir}/training_eval')
    for folder in folders:
      if len(folders) > 1:
        print(f'{folder.name}:')
      print('\n'.join(held_out_table(read_curves(folder), corpus)))
    if args.predictions:
      print('\nwhat it puts for <mask>, as it comes')
      print('\n'.join(prediction_lines(args.predictions)))
  except (OSError, ValueError) as e:
    return cli.fail(e)
  return 0


if __name__ == '__main__':
  sys.exit(main())
