"""Files of inputs, as text and as JSON lines."""

import gin
import pytest
import seqio

from tasks import fill_in, input_file


@pytest.fixture(autouse=True)
def clean_gin():
  gin.clear_config()
  yield
  gin.clear_config()


def read(path, prompt=''):
  columns = input_file.dataset(str(path), prompt)
  return list(zip(columns['inputs'], columns['targets'], strict=True))


def test_sentences_to_fill_in_that_are_cut_are_counted(tmp_path, corpus_dir, caplog):
  path = tmp_path / 'sentences.txt'
  path.write_text('på <mask>\n' + 'fjord og snø ' * 20 + '<mask>\n')
  name = 'input_file_test_fill_in'
  task = fill_in.add_fill_in_task(name, corpus_dir)
  try:
    with gin.unlock_config():
      gin.bind_parameter('tasks.input_file.dataset.path', str(path))
    task.get_dataset({'inputs': 16, 'targets': 16}, 'test')
  finally:
    gin.clear_config()
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


def test_a_byte_order_mark_is_no_text(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('En.\n', encoding='utf-8-sig')
  assert read(path) == [('En.', '')]


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.txt', '\n', 'has no inputs'),
    ('a.jsonl', '{"text": "x"}\n', 'object 1 must have its text as "inputs"'),
    ('a.jsonl', '{"inputs": 3}\n', 'as "inputs"'),
    ('a.jsonl', 'x\n', 'line 1 is not JSON'),
  ],
)
def test_wrong_files_are_named(name, content, message, tmp_path):
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    read(tmp_path / name)


def test_no_file():
  with pytest.raises(ValueError, match='--gin.INPUT_FILE='):
    input_file.dataset()
  with pytest.raises(FileNotFoundError, match='nowhere.txt'):
    input_file.dataset('nowhere.txt')
