"""Readers of files in the formats of the real data, and prompts made of records."""

import json
import pathlib
import sys
import types

import gin
import pytest
import seqio

import tasks  # noqa: F401 registers the tasks
from tasks import prompts, readers

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


def test_two_files_for_one_split_raise(tmp_path):
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
    ('a.jsonl', '{"text": "x"}\nnei\n', 'line 2: not valid JSON'),
    ('a.jsonl', '[1]\n', 'line 1: expected a JSON object'),
    ('a.tsv', 'a\tb\n1\n', 'line 2 has 1 columns, but the first line names 2'),
    ('a.tsv', '', 'must name the columns'),
    ('a.conllu', '1\tKari\n', 'has 2 columns; CoNLL-U has 10'),
    ('a.conllu', '1\tKari' + '\t_' * 8 + '\n', 'Use the files of NorNE'),
    ('a.json', '{}', 'neither a list nor a SQuAD file'),
    ('a.json', '[1]', 'element 1 is not an object'),
    ('a.json', '{', 'is not JSON'),
    ('a.csv', '', 'format of .*a.csv. is unknown'),
  ],
)
def test_errors_name_the_file(name, content, message, tmp_path):
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    list(readers.read_file(str(tmp_path / name)))


@pytest.mark.parametrize(
  'data',
  [
    [{'paragraphs': [{'context': 'c', 'qas': [{'question': 'q', 'answers': []}]}]}],
    [{'context': 'c', 'qas': [{'question': 'q', 'answers': []}]}],
    [{'context': 'c', 'question': 'q', 'answers': []}],
  ],
)
def test_questions_of_nested_and_flat_files(data, tmp_path):
  for content in (data, {'version': '1', 'data': data}):
    (tmp_path / 'a.json').write_text(json.dumps(content))
    (record,) = readers.read_file(str(tmp_path / 'a.json'))
    assert [record[k] for k in ('context', 'question', 'answers')] == ['c', 'q', []]


def test_missing_file_is_named_with_its_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(FileNotFoundError, match=f"'ord/test.tsv'.* '{tmp_path}'"):
    readers.read_file('ord/test.tsv')


@pytest.mark.parametrize(
  ('name', 'content'),
  [
    ('a.tsv', 'ord\tklasse\r\nhus\tsubstantiv\r\n'),
    ('a.jsonl', '{"ord": "hus", "klasse": "substantiv"}\r\n'),
    ('a.json', '[{"ord": "hus", "klasse": "substantiv"}]'),
  ],
)
def test_byte_order_mark_is_skipped(name, content, tmp_path):
  (tmp_path / name).write_bytes(content.encode('utf-8-sig'))
  (record,) = readers.read_file(str(tmp_path / name))
  assert record == {'ord': 'hus', 'klasse': 'substantiv'}


def test_tsv_has_no_quotes_and_no_longest_field(tmp_path):
  texts = ['"', 'x' * 140_000, 'a\u2028"b"']
  lines = [f'{text}\t{i}\n' for i, text in enumerate(texts)]
  (tmp_path / 'a.tsv').write_text('ord\tnr\n' + '\n'.join(lines))
  found = list(readers.read_tsv(str(tmp_path / 'a.tsv')))
  assert found == [{'ord': text, 'nr': str(i)} for i, text in enumerate(texts)]


@pytest.mark.parametrize('name', ['a.tsv', 'a.json'])
def test_other_encodings_are_reported(name, tmp_path):
  (tmp_path / name).write_bytes('rød\n'.encode('latin1'))
  with pytest.raises(ValueError, match=f'{name}, line 1: .*0xf8.*iconv'):
    list(readers.read_file(str(tmp_path / name)))


# ---- Prompts ----


@pytest.mark.parametrize(
  ('record', 'label'),
  [
    ({'text': 'x', 'label': 'neutral'}, 'nøytral'),
    ({'text': 'x', 'label': 'fair'}, 'nøytral'),
    ({'text': 'x', 'label': 'positiv'}, 'positiv'),
    ({'text': 'x', 'rating': '2'}, 'negativ'),
    ({'text': 'x', 'rating': 3}, 'nøytral'),
    ({'text': 'x', 'rating': 5}, 'positiv'),
    ({'id': '1', 'review': 'x', 'sentiment': 0}, 'negativ'),
    ({'id': '1', 'review': 'x', 'sentiment': 2}, 'positiv'),
  ],
)
def test_sentiment_in_every_form(record, label):
  assert prompts.sentiment_to_text(record) == {
    'inputs': 'stemning: x',
    'targets': label,
  }


@pytest.mark.parametrize(
  'answers',
  [
    {'text': ['1814', 'i 1814'], 'answer_start': [3, 1]},
    [{'text': '1814', 'answer_start': 3}, {'text': 'i 1814', 'answer_start': 1}],
  ],
)
def test_answers_in_both_forms(answers):
  record = {'question': 'Når?', 'context': 'Det var i 1814.', 'answers': answers}
  example = prompts.question_to_text(record)
  assert example['targets'] == '1814'
  assert json.loads(example['references']) == ['1814', 'i 1814']


@pytest.mark.parametrize(
  ('record', 'summaries'),
  [
    ({'article': 'x', 'summaries': ['a', 'b']}, ['a', 'b']),
    (
      {'article': 'x', 'summaries_nn': [{'summary1': 'a'}, {'summary2': 'b'}]},
      ['a', 'b'],
    ),
    ({'article': 'x', 'summaries': 'a'}, ['a']),
    ({'document': 'x', 'summary': 'a'}, ['a']),
    ({'text': 'x', 'target_text': 'a'}, ['a']),
  ],
)
def test_summaries_in_every_form(record, summaries):
  example = prompts.summary_to_text(record, 'summaries_nn')
  assert example['inputs'] == 'sammendrag: x'
  assert example['targets'] == 'a'
  assert prompts.references_of('ignored', example, is_target=True) == summaries
  assert prompts.references_of(' b ', example, is_target=False) == 'b'


@pytest.mark.parametrize(
  ('to_text', 'record', 'message'),
  [
    (prompts.sentiment_to_text, {'text': 'x', 'label': 'bra'}, "label 'bra'"),
    (prompts.sentiment_to_text, {'text': 'x', 'rating': 7}, '1 to 6. Got: 7'),
    (prompts.sentiment_to_text, {'text': 'x', 'sentiment': 3}, '0, 1 or 2. Got: 3'),
    (
      prompts.sentiment_to_text,
      {'tekst': 'x', 'label': 'fair'},
      'text, review. Got: label, tekst',
    ),
    (prompts.summary_to_text, {'text': 'x', 'sum': 'y'}, 'summary, target_text'),
    (prompts.acceptability_to_text, {'text': 'x', 'label': 1}, 'unknown label 1'),
    (prompts.entities_to_text, {'tokens': ['x'], 'labels': ['B-DYR']}, 'B-DYR'),
    (prompts.entities_to_text, {'tokens': ['x'], 'labels': []}, '1 tokens, but 0'),
  ],
)
def test_unknown_labels_and_columns_raise(to_text, record, message):
  with pytest.raises(ValueError, match=message):
    to_text(record)


def test_entities_side_by_side_and_without_a_beginning():
  record = {
    'tokens': ['Oslo', 'Bergen', 'Kari', 'Dahl', 'TV|2', '|'],
    'labels': ['B-GPE_LOC', 'B-LOC', 'I-PER', 'I-PER', 'B-ORG', 'I-ORG'],
  }
  targets = prompts.entities_to_text(record)['targets']
  assert targets == 'LOC: Oslo | LOC: Bergen | PER: Kari Dahl | ORG: TV/2 /'
