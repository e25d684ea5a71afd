"""Readers of files in the formats of the real data, and where data comes from."""

import pathlib
import sys
import types

import gin
import pytest
import seqio

import tasks  # noqa: F401 registers the tasks
from tasks import readers

DATA = pathlib.Path(__file__).parent / 'data'


@pytest.fixture(autouse=True)
def clean_gin():
  gin.clear_config()
  yield
  gin.clear_config()


def test_gin_names_a_folder():
  gin.bind_parameter('tasks.readers.records.source', str(DATA / 'finetune'))
  records = readers.records('nb_nn', 'train', None, 'somewhere')
  assert next(records) == {'nb': 'Jeg heter Kari.', 'nn': 'Eg heiter Kari.'}


def test_gin_chooses_the_hub(monkeypatch, corpus_dir):
  asked = []

  def load_dataset(path, config, split):
    asked.append((path, config, split))
    return [{'text': 'Barna leker.', 'label': 'correct'}]

  fake = types.SimpleNamespace(load_dataset=load_dataset)
  monkeypatch.setitem(sys.modules, 'datasets', fake)
  gin.bind_parameter('tasks.readers.records.source', 'hub')
  task = seqio.get_mixture_or_task('scala_nb')
  vocabulary = task.output_features['inputs'].vocabulary
  monkeypatch.setattr(vocabulary, 'path', corpus_dir)
  monkeypatch.setattr(vocabulary, '_content', None)
  (example,) = task.source.get_dataset('validation').as_numpy_iterator()
  assert example['targets_pretokenized'] == b'riktig'
  assert asked == [('EuroEval/scala-nb', None, 'val')]
  with pytest.raises(ValueError, match='not available on the Hub'):
    readers.records('nb_nn', 'train', None, 'https://www.nb.no')


def test_two_files_for_one_split_are_one_too_many(tmp_path):
  gin.bind_parameter('tasks.readers.records.source', str(tmp_path))
  (tmp_path / 'norec').mkdir()
  for name in ('train.jsonl', 'train.tsv'):
    (tmp_path / 'norec' / name).write_text('')
  with pytest.raises(ValueError, match='Keep one'):
    readers.records('norec', 'train', None, 'somewhere')


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  from pyarrow import parquet

  rows = [{'text': 'God film.', 'rating': 5}]
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'train.parquet')
  assert list(readers.read_file(str(tmp_path / 'train.parquet'))) == rows


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.jsonl', '{"text": "x"}\nnei\n', 'line 2 is not JSON'),
    ('a.jsonl', '[1]\n', 'must be a JSON object'),
    ('a.tsv', 'a\tb\n1\n', 'line 2 has 1 columns, but the first line names 2'),
    ('a.tsv', '', 'must name the columns'),
    ('a.conllu', '1\tKari\n', 'has 2 columns; CoNLL-U has 10'),
    ('a.conllu', '1\tKari' + '\t_' * 8 + '\n', 'Use the files of NorNE'),
    ('a.json', '{}', 'neither a list nor a SQuAD file'),
    ('a.json', '{"data": [{"question": ""}]}', "a SQuAD file: no 'paragraphs'"),
    ('a.json', '[1]', 'element 1 is not an object'),
    ('a.json', '{', 'is not JSON'),
    ('a.csv', '', 'is unknown. Known endings'),
  ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    list(readers.read_file(str(tmp_path / name)))


def test_a_file_that_is_not_there_is_named_with_where_it_was_looked_for(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(
    FileNotFoundError, match=f"'ord/test.tsv'.* current folder, '{tmp_path}'"
  ):
    readers.read_file('ord/test.tsv')


@pytest.mark.parametrize(
  ('name', 'content'),
  [
    ('a.tsv', 'ord\tklasse\r\nhus\tsubstantiv\r\n'),
    ('a.jsonl', '{"ord": "hus", "klasse": "substantiv"}\r\n'),
    ('a.json', '[{"ord": "hus", "klasse": "substantiv"}]'),
  ],
)
def test_a_byte_order_mark_is_no_part_of_the_first_name(name, content, tmp_path):
  (tmp_path / name).write_bytes(content.encode('utf-8-sig'))
  (record,) = readers.read_file(str(tmp_path / name))
  assert record == {'ord': 'hus', 'klasse': 'substantiv'}


def test_tsv_has_no_quotes_and_no_longest_field(tmp_path):
  texts = ['"', 'x' * 140_000, 'a\u2028"b"']
  lines = [f'{text}\t{i}\n' for i, text in enumerate(texts)]
  (tmp_path / 'a.tsv').write_text('ord\tnr\n' + '\n'.join(lines))
  found = list(readers.read_tsv(str(tmp_path / 'a.tsv')))
  assert found == [{'ord': text, 'nr': str(i)} for i, text in enumerate(texts)]


@pytest.mark.parametrize('name', ['a.tsv', 'a.jsonl', 'a.json', 'a.conllu'])
def test_other_encodings_are_told(name, tmp_path):
  (tmp_path / name).write_bytes('ord\nrød\n'.encode('latin1'))
  with pytest.raises(ValueError, match=f'{name} is not UTF-8: .*0xf8.*iconv'):
    list(readers.read_file(str(tmp_path / name)))


def test_a_list_of_objects(tmp_path):
  (tmp_path / 'a.json').write_text('[{"article": "x"}, {"article": "y"}]')
  found = readers.read_file(str(tmp_path / 'a.json'))
  assert list(found) == [{'article': 'x'}, {'article': 'y'}]
