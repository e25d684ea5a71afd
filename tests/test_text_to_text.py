"""Text-to-text tasks as users register them, and files of inputs."""

import os
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


@pytest.mark.parametrize(
  ('made', 'reported'),
  [
    ({'inputs': 'x', 'targets': 'kanskje'}, "'kanskje' .known: ja, nei"),
    ({'inputs': 'x', 'targets': 7}, "'targets' is not text: 7"),
    ({'inputs': None, 'targets': 'ja'}, "'inputs' is not text: None"),
    ({'input': 'x', 'targets': 'ja'}, "must return a dictionary with .*'input'"),
    (None, 'must return a dictionary .* None'),
    ({'inputs': 'x', 'targets': 'ja', 'id': '1'}, "gives .'id', 'inputs', 'targets'"),
  ],
)
def test_bad_record_is_reported(add, made, reported):
  task = add(
    [('a', 'ja'), ('', 'nei'), ('b', 'nei')],
    to_text=lambda row: made if row['inputs'] == 'b' else to_text(row),
    labels=('ja', 'nei'),
  )
  with pytest.raises(ValueError, match=f'train.tsv.: record 3: .*{reported}'):
    examples(task)


@pytest.mark.parametrize(
  ('to_text', 'reported'),
  [
    (lambda row: {'inputs': row['tekst']}, "record 1 has no 'tekst', but .*'inputs'"),
    (lambda row: {'inputs': row['inputs'].split()[1]}, 'record 1: list index out of'),
  ],
)
def test_error_in_to_text_is_reported(add, to_text, reported):
  with pytest.raises(ValueError, match=reported):
    examples(add([('a', 'b')], to_text=to_text))


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


def test_input_that_is_not_a_regular_file(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  for path in (str(tmp_path / 'pipe'), str(tmp_path), 3):
    with pytest.raises(FileNotFoundError, match=re.escape(repr(path))):
      input_file.dataset(path)


def test_no_input_file():
  with pytest.raises(ValueError, match='--gin.INPUT_FILE='):
    input_file.dataset()
  with pytest.raises(FileNotFoundError, match='nowhere.txt'):
    input_file.dataset('nowhere.txt')
