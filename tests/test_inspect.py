"""`python -m bart_t5x.inspect`."""

import re
import shutil

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf

from bart_t5x import corpus_format, inspect, noise, preprocessors, vocabularies
from tasks import pretrain


@pytest.fixture(autouse=True)
def clean_gin():
  yield
  gin.clear_config()


@pytest.fixture(scope='module', autouse=True)
def registered_tasks(corpus_dir):
  pretrain.add_denoising_task('inspect_test', corpus_dir)
  pretrain.add_denoising_task(
    'inspect_test_empty', corpus_dir, noise.Recipe(permute_ratio=0, infill_ratio=0)
  )
  pretrain.add_denoising_task('inspect_test_absent', '/nowhere')

  def read(split, shuffle_files=False, seed=None):
    example = {'inputs': 'Barna på fjorden', 'targets': 'snø'}
    return tf.data.Dataset.from_tensors(example)

  feature = seqio.Feature(vocabularies.load_vocabulary(corpus_dir, templates=True))
  seqio.TaskRegistry.add(
    'inspect_test_text',
    source=seqio.FunctionDataSource(read, ['train']),
    preprocessors=[preprocessors.tokenize_for_bart],
    output_features={'inputs': feature, 'targets': feature},
  )
  yield
  for name in ('', '_empty', '_absent', '_text'):
    seqio.TaskRegistry.remove(f'inspect_test{name}')


def inspected(capsys, *args, task='inspect_test'):
  code = inspect.main(
    [
      f'--task={task}',
      '--inputs_length=64',
      '--targets_length=64',
      '--num_summed=100',
      *args,
    ]
  )
  return (code, *capsys.readouterr())


def test_shows_examples_rows_and_the_table(capsys):
  code, out, _ = inspected(capsys, '--num_examples=4', '--num_rows=2')
  assert code == 0
  assert out.count('document ') == 4 and out.count('\nrow ') == 2
  assert 'padding, decoder' in out
  share = float(out.split('tokens masked')[1].split('%')[0])
  assert 29 < share < 34  # whole words, rounded up
  assert 'whole_words=True' in out  # gin/noise/default.gin
  assert '\033[' not in out
  assert 'Ġ' not in out  # random tokens too are spelt as text


def test_colour_on_request(capsys, monkeypatch):
  monkeypatch.setenv('FORCE_COLOR', '1')
  _, out, _ = inspected(capsys)
  assert '\033[33m<mask>\033[0m' in out


def test_gin_bindings_change_the_noise(capsys):
  fields = ('infill_ratio', 'permute_ratio')
  _, out, _ = inspected(capsys, *(f'--gin.noise.Recipe.{f}=0.0' for f in fields))
  assert float(out.split('tokens masked')[1].split('%')[0]) == 0
  assert 'span ' not in out and 'order ' not in out


def test_other_tasks_are_shown_as_text(capsys):
  code, out, _ = inspected(capsys, task='inspect_test_text')
  assert code == 0
  assert "inputs  'Barna på fjorden'" in out and "targets 'snø'" in out
  assert 'examples                              1' in out


def test_mixture_shows_each_of_its_tasks(capsys):
  name = 'inspect_test_mixture'
  seqio.MixtureRegistry.add(name, [('inspect_test', 3), ('inspect_test_empty', 1)])
  try:
    code, out, _ = inspected(capsys, '--num_examples=4', '--num_rows=2', task=name)
  finally:
    seqio.MixtureRegistry.remove(name)
  assert code == 0
  examples, _, tables = out.partition('\nrow 1')
  first, _, second = examples.partition('task inspect_test_empty\n')
  assert first.startswith('task inspect_test\n')
  assert (first.count('document '), second.count('document ')) == (4, 4)
  shares = [float(t.split('%')[0]) for t in tables.split('tokens masked')[1:]]
  assert 29 < shares[0] < 34 and shares[1] == 0


@pytest.mark.parametrize(
  ('task', 'args', 'message'),
  [
    ('inspect_test_emty', [], "'inspect_test_emty'. Nearest: inspect_test_empty"),
    ('inspect_test', ['--split=test'], "no split 'test'"),
    ('inspect_test_absent', [], 'bart_t5x.prepare --source'),
    ('inspect_test', ['--inputs_length=20'], 'the encoder takes 20'),
    ('inspect_test', ['--colour=red'], 'Unknown arguments: --colour=red'),
    ('inspect_test', ['--gin.noise.Recipe.infil_ratio=1'], "mean 'infill_ratio'?"),
    ('inspect_test', ['--gin_file=no_such.gin'], 'no_such.gin'),
    ('inspect_test', ['--module=no_such_module'], "names 'no_such_module', which"),
    ('inspect_test', ['--module=./tasks.py'], "'./tasks.py'"),
  ],
)
def test_bad_input_is_reported_on_one_line(capsys, task, args, message):
  code, _, err = inspected(capsys, *args, task=task)
  assert code == 1
  assert err.startswith('error: ') and message in err
  assert 'Traceback' not in err


def row(out, label):
  (line,) = [line for line in out.splitlines() if line.startswith(label)]
  return int(line.removeprefix(label).split()[0].replace(',', ''))


def test_cut_off_tokens_are_reported(capsys, monkeypatch):
  monkeypatch.setattr(preprocessors, '_check_room', lambda *lengths: None)
  args = ('--num_examples=100', '--num_rows=0', '--inputs_length=30')
  _, out, _ = inspected(capsys, *args)
  cut = [int(n) for n in re.findall(r'cut off (\d+) source tokens', out)]
  assert row(out, 'source tokens cut off') == sum(cut) > 0
  assert f'(of {len(cut)} examples)' in out


def test_damaged_shard_is_reported(capsys, corpus_dir, tmp_path):
  folder = tmp_path / 'prepared'
  shutil.copytree(corpus_dir, folder)
  path = folder / 'train-00001-of-00004.tfrecord'
  content = bytearray(path.read_bytes())
  content[100] ^= 1
  path.write_bytes(content)
  name = 'inspect_test_damaged'
  pretrain.add_denoising_task(name, str(folder))
  try:
    code, _, err = inspected(capsys, '--num_summed=10000', task=name)
  finally:
    seqio.TaskRegistry.remove(name)
  assert code == 1 and err.count('\n') == 1 and 'damaged' in err


def test_spans_of_references():
  # The text 1 2 3 4 5 6 with its halves exchanged: 4 5 6 1 2 3.
  permuted = [4, 5, 6, 1, 2, 3]
  found = list(inspect.spans_of([-9, 4, -9, 1, -9, -8], permuted))
  assert found == [([9], []), ([9], [5, 6]), ([9, 8], [2, 3])]
  # Rotated to begin at the 1; a deletion leaves positions without a new token.
  found = list(inspect.spans_of([1, 3, -7, 4, 5, 6], permuted))
  assert found == [([], [2]), ([7], [])]


def test_sentence_order_of_permuted_positions():
  assert inspect.sentence_order([4, 5, 6, 1, 2, 3], [0, 3]) == [1, 0]
  assert inspect.sentence_order([], []) == []


def test_every_masked_token_is_in_a_span(corpus_dir):
  task = seqio.get_mixture_or_task('inspect_test_empty')
  steps = [*task.preprocessors[:-1], _traced]
  ds = task.replace(preprocessors=steps).get_dataset(
    {'inputs': 64, 'targets': 64}, seed=1
  )
  for example in ds.take(50).as_numpy_iterator():
    spans = list(
      inspect.spans_of(example['references'].tolist(), example['permuted'].tolist())
    )
    missing = sorted(position for _, positions in spans for position in positions)
    infilled = np.flatnonzero(example['targets_noised'] == noise.INFILLED)
    assert missing == infilled.tolist()
    assert all(new for new, _ in spans)


def _traced(dataset, sequence_length, output_features):
  return preprocessors.denoise(
    dataset, sequence_length, output_features, noise.Recipe(), trace=True
  )


def test_a_corpus(capsys, corpus_dir, tmp_path):
  assert inspect.main([f'--corpus={corpus_dir}']) == 0
  corpus = corpus_format.read(corpus_dir)
  shown = capsys.readouterr().out
  for split in corpus['splits'].values():
    assert f'{split["documents"]:,}' in shown
    assert f'{split["bytes"] / split["tokens"]:.2f}' in shown
    assert f'{split["tokens"] / split["words"]:.2f}' in shown
  assert inspect.main([f'--corpus={tmp_path}']) == 1
  assert str(tmp_path) in capsys.readouterr().err
