"""The report of a run, from event files that TensorBoard wrote."""

import json

import pytest
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util import tensor_util

from bart_t5x import report

BASELINES = {
  'unigram_loss': 6.5,
  'commonest_token': '.',
  'commonest_token_share': 0.07,
}


def write_events(folder, tag, points):
  writer = EventFileWriter(str(folder))
  for step, value in points:
    tensor = tensor_util.make_tensor_proto(value, dtype='float32')
    summary = summary_pb2.Summary(
      value=[summary_pb2.Summary.Value(tag=tag, tensor=tensor)]
    )
    writer.add_event(event_pb2.Event(step=step, summary=summary))
  writer.close()


@pytest.fixture
def run(tmp_path):
  folder = tmp_path / 'run/training_eval/denoising'
  folder.mkdir(parents=True)
  write_events(folder, 'loss', [(0, 9.0), (10, 5.0), (20, 4.0)])
  corpus = tmp_path / 'corpus'
  corpus.mkdir()
  (corpus / 'corpus.json').write_text(json.dumps({'baselines': BASELINES}))
  return tmp_path


def test_curves_are_read_by_step(run):
  curves = report.read_curves(run / 'run/training_eval/denoising')
  assert curves == {'loss': [(0, 9.0), (10, 5.0), (20, 4.0)]}


def test_truncated_record_ends_the_file(run):
  (file,) = (run / 'run/training_eval/denoising').iterdir()
  whole = file.read_bytes()
  for cut in range(1, 20):
    file.write_bytes(whole[:-cut])
    assert report.read_curves(file.parent) == {'loss': [(0, 9.0), (10, 5.0)]}


def test_sparkline_spans_lowest_to_highest():
  assert report.sparkline([(0, 7.0), (1, 3.5), (2, 0.0)]) == '█▅▁'
  assert report.sparkline([(0, 1.0), (1, 1.0)]) == '▁▁'


def test_main_prints_start_end_baselines_and_predictions(run, capsys):
  predictions = run / 'predictions.jsonl'
  # str.splitlines would split at U+2028.
  text = 'det\n\u2028går'
  row = {'inputs': {'inputs_pretokenized': 'det <mask>'}, 'prediction': text}
  predictions.write_text(json.dumps(row, ensure_ascii=False) + '\n')
  arguments = ['--model_dir', str(run / 'run'), '--corpus_dir', str(run / 'corpus')]
  assert report.main([*arguments, '--predictions', str(predictions)]) == 0
  out = capsys.readouterr().out
  assert '9.000    4.000   6.500  a unigram model' in out
  assert 'in   det <mask>\n  out  det⏎\u2028går' in out


def test_bad_folders_are_errors(run, capsys):
  arguments = ['--model_dir', str(run), '--corpus_dir', str(run / 'corpus')]
  assert report.main(arguments) == 1
  assert f'{run}/training_eval' in capsys.readouterr().err
  (run / 'corpus/corpus.json').write_text('{')
  assert report.main(arguments) == 1
  assert 'corpus.json is damaged' in capsys.readouterr().err
