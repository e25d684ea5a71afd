"""`python -m bart_t5x.inspect`."""

import re
import shutil

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf

from bart_t5x import inspect, noise, prepare, preprocessors, vocabularies
from tasks import pretrain


@pytest.fixture(autouse=True)
def clean_gin():
  yield
  gin.clear_config()


@pytest.fixture(scope='module', autouse=True)
def tasks_to_look_at(corpus_dir):
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
  assert 'span length (0: insertion)' in out and 'padding, decoder' in out
  share = float(out.split('tokens masked')[1].split('%')[0])
  assert 29 < share < 34  # whole words, rounded up
  assert 'whole_words=True' in out  # gin/denoising.gin
  assert '\033[' not in out
  assert 'Ġ' not in out  # random tokens too are spelt as text


def test_colour_on_request(capsys):
  _, out, _ = inspected(capsys, '--color=always')
  assert '\033[33m<mask>\033[0m' in out


def test_bindings_act(capsys):
  fields = ('infill_ratio', 'permute_ratio')
  _, out, _ = inspected(capsys, *(f'--gin.noise.Recipe.{f}=0.0' for f in fields))
  assert float(out.split('tokens masked')[1].split('%')[0]) == 0
  assert 'span length' not in out and 'order ' not in out


def test_recipe_of_the_task_is_used(capsys):
  _, out, _ = inspected(capsys, task='inspect_test_empty')
  assert float(out.split('tokens masked')[1].split('%')[0]) == 0
  assert 'infill_ratio=0,' in out


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
  assert (first.count('document '), second.count('document ')) == (3, 1)
  shares = [float(t.split('%')[0]) for t in tables.split('tokens masked')[1:]]
  assert 29 < shares[0] < 34 and shares[1] == 0


def test_colour_only_in_terminals_without_no_color(monkeypatch):
  monkeypatch.delenv('NO_COLOR', raising=False)
  assert inspect.wants_color('auto', True) and not inspect.wants_color('auto', False)
  assert inspect.wants_color('always', False) and not inspect.wants_color('never', True)
  monkeypatch.setenv('NO_COLOR', '1')
  assert not inspect.wants_color('auto', True)
  monkeypatch.setenv('NO_COLOR', '')  # as if it were not set
  assert inspect.wants_color('auto', True)


@pytest.mark.parametrize(
  ('task', 'args', 'message'),
  [
    ('inspect_test_emty', [], "'inspect_test_emty'. Nearest: inspect_test_empty"),
    ('inspect_test', ['--split=test'], "no split 'test'"),
    ('inspect_test_absent', [], 'bart_t5x.prepare --source'),
    ('inspect_test', ['--inputs_length=20'], 'the encoder takes 20'),
    ('inspect_test', ['--colour=red'], 'Unknown arguments: --colour=red'),
    ('inspect_test', ['--gin.noise.Recipe.infil_ratio=1'], "mean 'infill_ratio'?"),
    ('inspect_test', ['--gin_file=no_such.gin'], 'no_such.gin was not found'),
    ('inspect_test', ['--module=no_such_module'], "names 'no_such_module', which"),
  ],
)
def test_bad_input_is_one_line(capsys, task, args, message):
  code, _, err = inspected(capsys, *args, task=task)
  assert code == 1
  assert err.startswith('error: ') and message in err
  assert 'Traceback' not in err


def row(out, label):
  """The number in the table's row of that name."""
  (line,) = [line for line in out.splitlines() if line.startswith(label)]
  return int(line.removeprefix(label).split()[0].replace(',', ''))


@pytest.fixture
def addresses(corpus_dir, tmp_path):
  """A task over texts that are mostly one word."""
  random = np.random.default_rng(8)
  texts = tmp_path / 'texts.txt'
  with open(texts, 'w') as f:
    for _ in range(60):
      address = ''.join(random.choice(list('bcdfghjklm0123456789'), 160))
      f.write(f'Og {"snø på " * 9}https://{address} {"og sjø " * 9}.\n')
  output = str(tmp_path / 'prepared')
  args = ['--source=text', f'--input={texts}', f'--output_dir={output}']
  args += [f'--tokenizer_file={corpus_dir}', '--min_validation_documents=1']
  assert prepare.main([*args, '--num_workers=1']) == 0
  pretrain.add_denoising_task('inspect_test_addresses', output)
  yield 'inspect_test_addresses'
  seqio.TaskRegistry.remove('inspect_test_addresses')


def test_texts_with_long_words_are_reported(capsys, addresses):
  args = ['--num_examples=100', '--num_rows=0', '--targets_length=210']
  args += ['--inputs_length=186']
  _, out, _ = inspected(capsys, *args, task=addresses)
  reported = out.count('  units   tokens: ')
  assert row(out, 'spans of tokens, not words') == reported
  assert 5 < reported < out.count('document ')
  assert row(out, 'source tokens cut off') == 0


def test_cut_off_tokens_are_reported(capsys, monkeypatch):
  monkeypatch.setattr(preprocessors, '_check_room', lambda *lengths: None)
  args = ('--num_examples=100', '--num_rows=0', '--inputs_length=30')
  _, out, _ = inspected(capsys, *args)
  cut = [int(n) for n in re.findall(r'cut off (\d+) source tokens', out)]
  assert row(out, 'source tokens cut off') == sum(cut) > 0
  assert f'(of {len(cut)} examples)' in out


@pytest.mark.parametrize('damage', ['changed', 'cut off'])
def test_a_damaged_shard_is_reported(capsys, corpus_dir, tmp_path, damage):
  folder = tmp_path / 'prepared'
  shutil.copytree(corpus_dir, folder)
  path = folder / 'train-00001-of-00004.tfrecord'
  content = bytearray(path.read_bytes())
  content[100] ^= 1
  path.write_bytes(content if damage == 'changed' else content[:-7])
  name = 'inspect_test_damaged'
  pretrain.add_denoising_task(name, str(folder))
  try:
    code, _, err = inspected(capsys, '--num_summed=10000', task=name)
  finally:
    seqio.TaskRegistry.remove(name)
  assert code == 1 and err.count('\n') == 1
  assert ('damaged' if damage == 'changed' else str(path)) in err


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
    assert sum(len(new) for new, _ in spans) == len(example['span_lengths'])
    assert example['span_lengths'].sum() == len(infilled)


def _traced(dataset, sequence_length, output_features):
  return preprocessors.denoise(
    dataset, sequence_length, output_features, noise.Recipe(), trace=True
  )
