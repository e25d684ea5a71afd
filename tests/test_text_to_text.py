"""Text-to-text tasks as users register them, and files of inputs."""

import pathlib
import re
import runpy
import subprocess
import sys

import gin
import numpy as np
import pytest
import seqio

from tasks import fill_in, input_file, text_to_text

ROOT = pathlib.Path(__file__).parent.parent
LENGTHS = {'inputs': 64, 'targets': 64}


@pytest.fixture(autouse=True)
def clean_gin():
  gin.clear_config()
  yield
  gin.clear_config()


def to_text(row):
  return {'inputs': row['inputs'], 'targets': row['targets']}


@pytest.fixture
def add(tmp_path, corpus_dir):
  """Registers a task of rows with inputs and targets."""
  added = []

  def call(rows, **kwargs):
    path = tmp_path / 'train.tsv'
    lines = ['inputs\ttargets', *('\t'.join(row) for row in rows)]
    path.write_text('\n'.join(lines) + '\n')
    name = f'text_test_{len(added)}'
    kwargs = {'to_text': to_text, 'corpus_dir': corpus_dir, **kwargs}
    added.append(name)
    return text_to_text.add_text_to_text_task(
      name, files={'train': str(path)}, **kwargs
    )

  yield call
  for name in added:
    seqio.TaskRegistry.remove(name)


def examples(task, lengths=LENGTHS, split='train'):
  dataset = task.get_dataset(lengths, split, shuffle=False)
  return list(dataset.as_numpy_iterator())


# ---- The README's example ----


def readme_block(name):
  """The code block of the README that begins with a comment of this name."""
  text = (ROOT / 'README.md').read_text()
  (block,) = re.findall(rf'```\w*\n# {re.escape(name)}\n(.*?)```', text, re.DOTALL)
  return block


@pytest.fixture
def readme_task(tmp_path, corpus_dir, monkeypatch):
  """The README's task as written, in a folder with the files it names."""
  source = readme_block('my_task.py')
  assert len(source.strip().splitlines()) <= 15
  (tmp_path / 'my_task.py').write_text(source)
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'mini').symlink_to(corpus_dir)
  (tmp_path / 'ord').mkdir()
  (tmp_path / 'ord/train.tsv').write_text('ord\tklasse\nsnø\tsubstantiv\ngå\tverb\n')
  (tmp_path / 'ord/validation.tsv').write_text('ord\tklasse\nrød\tfarge\n')
  monkeypatch.chdir(tmp_path)
  runpy.run_path('my_task.py')
  yield seqio.get_mixture_or_task('ordklasser')
  seqio.TaskRegistry.remove('ordklasser')


def test_the_readme_task(readme_task):
  found = [
    (e['inputs_pretokenized'], e['targets_pretokenized']) for e in examples(readme_task)
  ]
  assert found == [
    ('ordklasse: snø'.encode(), b'substantiv'),
    ('ordklasse: gå'.encode(), b'verb'),
  ]
  (metric,) = readme_task.metric_fns
  assert metric(['verb'], ['verb'])['accuracy'] == 100
  with pytest.raises(ValueError, match='ordklasser/validation .ord/valid.*farge'):
    examples(readme_task, split='validation')


@pytest.mark.slow
def test_inspect_shows_the_readme_task(readme_task, tmp_path, monkeypatch):
  command = [sys.executable, '-m', 'bart_t5x.inspect']
  command += ['--task=ordklasser', '--module=my_task']
  run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert run.returncode == 0, run.stderr
  assert "inputs  'ordklasse: snø'" in run.stdout
  assert "targets 'substantiv'" in run.stdout


# ---- Records and lengths ----


def test_empty_texts_are_left_out_and_counted(add, caplog):
  task = add([('a', 'b'), ('', 'b'), ('a', ' '), ('c', 'd')])
  assert len(examples(task)) == 2
  assert (
    'train.tsv): 2 of 4 records have no inputs or no targets and are' in caplog.text
  )


def test_all_unknown_labels_are_counted(add):
  rows = [('a', 'ja'), *[('b', 'kanskje')] * 5]
  task = add(rows, labels=('ja', 'nei'))
  with pytest.raises(ValueError) as caught:
    examples(task)
  message = str(caught.value)
  assert '5 of 6 records cannot be used' in message
  assert "record 2 has the unknown label 'kanskje' (known: ja, nei)" in message
  assert message.count('unknown label') == 3
  assert message.endswith('and 2 more.')


@pytest.mark.parametrize(
  ('text', 'reported'), [(7, "not text: {'targets': 'int'}"), (None, 'NoneType')]
)
def test_values_that_are_not_text_are_reported(add, text, reported):
  task = add(
    [('a', 'ja'), ('b', 'nei')],
    to_text=lambda row: {
      'inputs': 'x',
      'targets': 'y' if row['inputs'] == 'a' else text,
    },
  )
  with pytest.raises(ValueError, match='1 of 2 records cannot be used: record 2') as e:
    examples(task)
  assert reported in str(e.value)


def test_missing_column_is_named(add):
  task = add([('a', 'b')], to_text=lambda row: {'inputs': row['tekst']})
  with pytest.raises(ValueError, match="record 1 has no 'tekst', but .*'inputs'"):
    examples(task)


@pytest.mark.parametrize(
  ('to_text', 'got'),
  [
    (lambda row: {'input': 'a', 'targets': 'b'}, r"\['input', 'targets'\]"),
    (lambda row: None, 'None'),
    (lambda row: ('a', 'b'), r"\('a', 'b'\)"),
  ],
)
def test_wrong_to_text_is_reported(add, to_text, got):
  task = add([('a', 'b')], to_text=to_text)
  pattern = f"must return a dictionary with 'inputs' and 'targets'. Got .* 1: {got}"
  with pytest.raises(ValueError, match=pattern):
    examples(task)


def test_records_with_other_fields_than_the_first_are_reported(add):
  def to_text(row):
    more = {'id': 'x'} if row['inputs'] == 'a' else {}
    return {'inputs': row['inputs'].split()[0], 'targets': 'b', **more}

  task = add([('a', 'b'), ('c', 'd'), (' ', 'f')], to_text=to_text)
  with pytest.raises(ValueError, match='2 of 3 records cannot be used') as caught:
    examples(task)
  assert (
    "record 2 gives ['inputs', 'targets'], those before ['id', 'inputs', 'targets']"
    in str(caught.value)
  )
  assert 'record 3: list index out of range' in str(caught.value)


def test_long_texts_are_counted_by_feature(add, caplog, corpus_dir):
  task = add([('fjord', 'ord ' * 30), ('fjord ' * 40, 'snø'), ('på', 'ord ' * 20)])
  lengths = {'inputs': 20, 'targets': 12}
  encode = task.output_features['targets'].vocabulary.encode
  longest = len(encode('ord ' * 30)) + 2
  found = examples(task, lengths)
  assert [e['targets_truncated'] > 0 for e in found] == [True, False, True]
  assert (
    f'{task.name}/train: 2 of 3 targets are longer than '
    f"TASK_FEATURE_LENGTHS['targets'] = 12 and lose their end; the longest has "
    f'{longest} tokens.'
  ) in caplog.text
  assert '1 of 3 inputs are longer' in caplog.text


@pytest.mark.parametrize('more', [-1, 0, 1])
def test_text_that_just_fits_is_not_counted(add, more, caplog):
  task = add([('fjord og snø på sjø', 'x')])
  size = (
    len(task.output_features['inputs'].vocabulary.encode('fjord og snø på sjø')) + 2
  )
  (example,) = examples(task, {'inputs': size + more, 'targets': 8})
  assert ('are longer than' in caplog.text) == (more < 0)
  assert (example['inputs_truncated'] > 0) == (more < 0)


# ---- Files of inputs ----


def test_every_task_has_the_split_input_file(add, tmp_path):
  (tmp_path / 'inputs.txt').write_text('fjord\nsnø\n')
  gin.bind_parameter('tasks.input_file.dataset.path', str(tmp_path / 'inputs.txt'))
  task = add([('a', 'b')], labels=('b',))
  found = examples(task, split=input_file.SPLIT)
  assert [e['inputs_pretokenized'].decode() for e in found] == ['fjord', 'snø']
  np.testing.assert_array_equal(found[0]['targets'], [1, 2])


def test_files_or_read():
  with pytest.raises(ValueError, match='either files or read'):
    text_to_text.add_text_to_text_task('no_data', to_text)


def read(path, prompt=''):
  columns = input_file.dataset(str(path), prompt)
  return list(zip(columns['inputs'], columns['targets'], strict=True))


def test_fill_in_counts_cut_texts(tmp_path, corpus_dir, caplog):
  path = tmp_path / 'sentences.txt'
  path.write_text('på <mask>\n' + 'fjord og snø ' * 20 + '<mask>\n')
  name = 'input_file_test_fill_in'
  task = fill_in.add_fill_in_task(name, corpus_dir)
  gin.bind_parameter('tasks.input_file.dataset.path', str(path))
  try:
    task.get_dataset({'inputs': 16, 'targets': 16}, 'test')
  finally:
    seqio.TaskRegistry.remove(name)
  assert f'{name}/test: 1 of 2 inputs are longer than TASK_FEATURE_LENGTHS' in (
    caplog.text
  )


def test_lines_of_text(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('Første linje.\r\n\n Åse \n')
  assert read(path, 'språk: ') == [('språk: Første linje.', ''), ('språk:  Åse ', '')]


def test_json_lines(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"id": 1, "inputs": "En\\ntekst"}\n{"inputs": "To"}\n')
  assert read(path) == [('En\ntekst', ''), ('To', '')]


def test_empty_inputs_are_counted(tmp_path, caplog):
  path = tmp_path / 'a.txt'
  path.write_text('En.\n\n  \nTo.\n')
  read(path)
  read(path)
  assert caplog.text.count('2 of 4 inputs are empty') == 1


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.txt', '\n', 'has no inputs'),
    ('a.jsonl', '{"text": "x"}\n', 'line 1 must have its text as "inputs"'),
    ('a.jsonl', '{"inputs": 3}\n', 'as "inputs"'),
    ('a.jsonl', 'x\n', 'line 1: not valid JSON'),
  ],
)
def test_errors_name_the_input_file(name, content, message, tmp_path):
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    read(tmp_path / name)


def test_no_input_file():
  with pytest.raises(ValueError, match='--gin.INPUT_FILE='):
    input_file.dataset()
  with pytest.raises(FileNotFoundError, match='nowhere.txt'):
    input_file.dataset('nowhere.txt')
