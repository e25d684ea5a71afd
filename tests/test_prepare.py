"""The command `prepare`: its output, when it reuses a corpus, and its errors."""

import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time

import fsspec
import pytest

from bart_t5x import corpus_build, prepare, vocabularies


@pytest.fixture
def text_file(tmp_path):
  path = tmp_path / 'text.txt'
  lines = [f'Linje {i} om fjell og fjord. Nr. {i * 7 % 1000} her.' for i in range(400)]
  path.write_text('\n'.join(lines) + '\n\nLinje 0 om fjell og fjord. Nr. 0 her.\n')
  return path


def arguments(text_file, out, *more):
  return [
    '--source=text',
    f'--input={text_file}',
    f'--output_dir={out}',
    '--vocab_size=300',
    '--num_workers=1',
    *more,
  ]


def files(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_makes_a_corpus_and_then_reuses_it(text_file, tmp_path, capsys):
  out = tmp_path / 'deep' / 'out'
  assert prepare.main(arguments(text_file, out, '--license=CC0')) == 0
  assert '300 documents' in capsys.readouterr().out
  corpus = json.loads((out / 'corpus.json').read_text())
  assert corpus['format_version'] == 2
  assert (corpus['source'], corpus['license']) == ('text', 'CC0')
  assert corpus['vocab_size'] == 300
  assert corpus['splits']['validation']['documents'] == 100
  assert corpus['splits']['train']['documents'] == 300
  assert corpus['dropped'] == {'empty': 1, 'duplicates': 1}
  assert len(corpus['vocabulary_sha256']) == len(corpus['text_sha256']) == 64
  before = files(out)
  assert prepare.main(arguments(text_file, out, '--license=CC0')) == 0
  assert 'Reusing' in capsys.readouterr().out
  assert files(out) == before
  # Made again: the same bytes.
  assert prepare.main(arguments(text_file, out, '--license=CC0', '--overwrite')) == 0
  assert files(out) == before


def one_line(capsys):
  error = capsys.readouterr().err.strip().splitlines()
  assert error[-1].startswith('error: ')
  assert not any('Traceback' in line for line in error)
  return error[-1]


def test_max_documents(text_file, tmp_path, capsys):
  some, whole = tmp_path / 'some', tmp_path / 'whole'
  assert prepare.main(arguments(text_file, some, '--max_documents=250')) == 0
  corpus = json.loads((some / 'corpus.json').read_text())
  read = sum(split['documents'] for split in corpus['splits'].values())
  assert read + sum(corpus['dropped'].values()) == 250
  assert prepare.main(arguments(text_file, some)) == 1
  assert '--max_documents: 250, now None' in capsys.readouterr().err
  assert prepare.main(arguments(text_file, whole)) == 0
  settings = json.loads((whole / 'corpus.json').read_text())['settings']
  assert 'max_documents' not in settings


def test_changed_sources_need_another_corpus(text_file, tmp_path, capsys):
  args = arguments(tmp_path / '*.txt', tmp_path / 'out')
  assert prepare.main(args) == 0
  before = files(tmp_path / 'out')
  more = tmp_path / 'more.txt'
  more.write_text('Ny fil.')
  assert prepare.main(args) == 1
  assert 'changed since' in capsys.readouterr().err
  more.unlink()
  text = text_file.read_text()
  text_file.write_text(text + 'En linje til.\n')
  assert prepare.main(args) == 1
  assert 'changed since' in capsys.readouterr().err
  assert prepare.main([*args, '--overwrite']) == 0
  assert files(tmp_path / 'out') != before
  text_file.unlink()  # a corpus may outlive its source
  assert prepare.main(args) == 0
  assert 'Reusing' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (['--vocab_size=5000'], r'only 4\d\d tokens.*--vocab_size=5000'),
    (['--vocab_size=261'], '--vocab_size.*262'),
    (['--input=nothing.txt'], 'nothing.txt'),
    (['--field=x'], '--field'),
    (['--output_dir=memory:///a/b', '--overwrite'], 'memory:///a/b'),
    (['--pipeline_options=--runner=FlinkRunner'], '--pipeline_options'),
    (['--beam', '--max_documents=3'], '--max_documents'),
    (['--beam', '--pipeline_options=--runner=DaskRunner'], 'DaskRunner'),
    (['--beam', '--pipeline_options=--runer=FlinkRunner'], 'runer'),
    (['--beam', '--pipeline_options=runner=FlinkRunner'], 'runner=FlinkRunner'),
    (['--output_dir='], '--output_dir'),
    (['--validation_share=0.5', '--min_validation_documents=400'], 'too few'),
    (['--validation_share=0.6'], '--validation_share'),
    (['--unit=file'], 'holds 1 distinct'),
    (['--tokenizer=bpe', '--min_frequency=3'], '--min_frequency'),
  ],
)
def test_bad_arguments(text_file, tmp_path, capsys, more, message):
  out = tmp_path / 'out'
  args = arguments(text_file, out, *more)
  if '--beam' in more:
    args.remove('--num_workers=1')
  if more[0].startswith('--input'):
    args = [a for a in args if a == more[0] or not a.startswith('--input')]
  assert prepare.main(args) == 1
  line = one_line(capsys)
  assert re.search(message, line), line
  assert not out.exists()


@pytest.mark.parametrize('name', ['--vocab_size', '--min_frequency'])
def test_number_too_large_for_the_trainers(text_file, tmp_path, capsys, name):
  with pytest.raises(SystemExit):
    prepare.main(arguments(text_file, tmp_path / 'out', f'{name}={2**64}'))
  error = capsys.readouterr().err
  assert name in error
  assert str(2**64) in error


@pytest.mark.parametrize(
  ('source', 'missing'), [('text', '--input'), ('hf', '--dataset')]
)
def test_missing_arguments(tmp_path, capsys, source, missing):
  assert prepare.main([f'--source={source}', f'--output_dir={tmp_path / "out"}']) == 1
  assert missing in one_line(capsys)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'\n \n\t\n', 'holds 0 '),
    (b'fin\nbl\xe5\n', 'text.txt, line 2: byte 0xe5'),
  ],
)
def test_bad_text(text_file, tmp_path, capsys, content, message):
  text_file.write_bytes(content)
  out = tmp_path / 'out'
  out.mkdir()
  assert prepare.main(arguments(text_file, out)) == 1
  assert message in one_line(capsys)
  assert files(out) == {}


def test_output_folder_that_cannot_be_written(text_file, capsys):
  assert prepare.main(arguments(text_file, text_file / 'out')) == 1
  assert str(text_file) in one_line(capsys)


def test_only_a_corpus_is_replaced(text_file, tmp_path, capsys):
  out = tmp_path / 'out'
  out.mkdir()
  (out / 'train-00007-of-00009.tfrecord').write_text('old')
  (out / 'notes.txt').write_text('mine')
  assert prepare.main(arguments(text_file, out)) == 1
  assert '--overwrite' in one_line(capsys)
  assert prepare.main(arguments(text_file, out, '--overwrite')) == 1
  assert 'other files' in one_line(capsys)
  assert len(files(out)) == 2
  (out / 'notes.txt').unlink()
  assert prepare.main(arguments(text_file, out, '--overwrite')) == 0
  assert sorted(files(out)) == [
    'corpus.json',
    'tokenizer.json',
    'train-00000-of-00001.tfrecord',
    'validation-00000-of-00001.tfrecord',
  ]


def test_damaged_corpus_is_not_reused_but_replaced(text_file, tmp_path, capsys):
  out = tmp_path / 'out'
  assert prepare.main(arguments(text_file, out)) == 0
  before = files(out)
  shard, tokenizer = 'train-00000-of-00001.tfrecord', before['tokenizer.json']
  corpus = json.loads(before['corpus.json'])
  for name, content in (
    (shard, None),
    (shard, before[shard][:-1]),
    ('tokenizer.json', None),
    ('tokenizer.json', tokenizer.replace(b'"a": 6', b'"a": 7')),
    ('corpus.json', b'[]'),
    ('corpus.json', b'{"splits":'),
    ('corpus.json', json.dumps({**corpus, 'splits': None}).encode()),
    ('corpus.json', json.dumps({**corpus, 'format_version': 99}).encode()),
  ):
    (out / name).unlink()
    if content is not None:
      assert content != before[name]
      (out / name).write_bytes(content)
    assert prepare.main(arguments(text_file, out)) == 1
    line = one_line(capsys)
    assert str(out) in line
    assert prepare.main(arguments(text_file, out, '--overwrite')) == 0
    assert files(out) == before


def test_urls(text_file, tmp_path, capsys):
  fs = fsspec.filesystem('memory')
  url = f'memory:///{tmp_path.name}'
  fs.pipe(f'{url}/text.txt', text_file.read_bytes())
  there, here = f'{url}/out', tmp_path / 'here'
  args = arguments(f'{url}/*.txt', f'{there}/')
  assert prepare.main(args) == 0
  assert prepare.main(arguments(f'{url}/*.txt', here)) == 0
  assert {os.path.basename(p): fs.cat(p) for p in fs.find(there)} == files(here)
  capsys.readouterr()
  assert prepare.main(args) == 0
  assert 'Reusing' in capsys.readouterr().out
  assert prepare.main([*args, '--vocab_size=310']) == 1
  assert 'other arguments' in one_line(capsys)
  # What an interrupted command has left is no corpus, and is replaced.
  fs.rm(f'{there}/corpus.json')
  fs.pipe(f'{there}/train-00007-of-00009.tfrecord', b'old')
  assert prepare.main(args) == 0
  assert {os.path.basename(p): fs.cat(p) for p in fs.find(there)} == files(here)
  fs.rm(f'{there}/corpus.json')
  fs.pipe(f'{there}/notes.txt', b'mine')
  assert prepare.main(args) == 1
  assert 'not empty' in one_line(capsys)
  assert fs.cat(f'{there}/notes.txt') == b'mine'
  assert (
    prepare.main([*arguments(f'{url}/*.txt', f'{url}/bad'), '--vocab_size=9999']) == 1
  )
  assert not fs.exists(f'{url}/bad')


def command(*args):
  return [sys.executable, '-m', 'bart_t5x.prepare', *args]


# The smaller limit stops the compressed text, the larger one the shards.
@pytest.mark.parametrize('limit', [8192, 60_000])
def test_full_disk(text_file, tmp_path, limit):
  # A limit on file sizes acts like a full disk.
  text_file.write_text(''.join(f'{i} fjord.\n' for i in range(3000)))
  out = tmp_path / 'out'
  run = subprocess.run(
    command(*arguments(text_file, out)),
    capture_output=True,
    text=True,
    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'},
  )
  assert run.returncode == 1, run.stderr
  assert ('Tokenizing' in run.stderr) == (limit > 8192)
  assert run.stderr.splitlines()[-1].startswith(f"error: Cannot write to '{out}': ")
  assert os.listdir(tmp_path) == ['text.txt']


def kill_a_worker(*args):
  os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def test_worker_that_dies(text_file, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(corpus_build, '_BATCH_BYTES', 2000)
  monkeypatch.setattr(corpus_build.Totals, 'add', kill_a_worker)
  args = arguments(text_file, tmp_path / 'out', '--num_workers=2')
  assert prepare.main(args) == 1
  assert '--num_workers' in one_line(capsys)
  assert not (tmp_path / 'out').exists()


def test_interrupted(text_file, tmp_path):
  lines = [f'Linje {i}.' + ' Fjell og fjord.' * 40 for i in range(15_000)]
  text_file.write_text('\n'.join(lines))
  out = tmp_path / 'out'
  process = subprocess.Popen(
    command(*arguments(text_file, out, '--num_workers=2', '--overwrite')),
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
    # A shell that runs the tests in the background ignores it.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )
  for line in process.stderr:
    if line.startswith('Tokenizing'):
      break
  time.sleep(0.5)
  # As a terminal does, to the workers too.
  os.killpg(process.pid, signal.SIGINT)
  _, error = process.communicate(timeout=60)
  assert process.returncode == 130, error
  assert error.strip().splitlines()[-1].startswith('error: interrupted')
  assert os.listdir(tmp_path) == ['text.txt']


@pytest.mark.parametrize('kind', ['bytelevel', 'unigram'])
def test_corpora_share_a_tokenizer(text_file, tmp_path, capsys, kind):
  first, second = tmp_path / 'first', tmp_path / 'second'
  assert prepare.main(arguments(text_file, first, f'--tokenizer={kind}')) == 0
  other = tmp_path / 'nynorsk.txt'
  other.write_text(''.join(f'Ei anna bok {i} på nynorsk 中.\n' for i in range(300)))
  args = ['--source=text', f'--input={other}', f'--output_dir={second}']
  args += [f'--tokenizer_file={first}', '--num_workers=1']
  assert prepare.main(args) == 0
  corpora = [json.loads((f / 'corpus.json').read_text()) for f in (first, second)]
  for name in ('vocab_size', 'tokenizer', 'vocabulary_sha256'):
    assert corpora[0][name] == corpora[1][name], name
  one, two = (vocabularies.load_vocabulary(f) for f in (first, second))
  assert one == two and one.tokenizer.kind == kind
  # A moved tokenizer is the same one; another tokenizer makes another corpus.
  first.rename(tmp_path / 'moved')
  args[3] = f'--tokenizer_file={tmp_path / "moved"}'
  capsys.readouterr()
  assert prepare.main(args) == 0
  assert 'Reusing' in capsys.readouterr().out
  assert prepare.main([*args[:3], '--vocab_size=300', '--num_workers=1']) == 1
  assert 'holds a corpus made with other arguments' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('content', 'more', 'message'),
  [
    (None, [], 'given.json'),
    (b'{"a": 1}', [], 'given.json'),
    (b'{}', ['--vocab_size=300'], '--vocab_size'),
    ('folder', [], 'given.json'),
  ],
)
def test_bad_tokenizer_files(text_file, tmp_path, capsys, content, more, message):
  path = tmp_path / 'given.json'
  if content == 'folder':
    path.mkdir()
  elif content is not None:
    path.write_bytes(content)
  out = tmp_path / 'out'
  args = ['--source=text', f'--input={text_file}', f'--output_dir={out}']
  assert prepare.main([*args, f'--tokenizer_file={path}', *more]) == 1
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1
  assert not out.exists()


def test_help_imports_nothing_heavy():
  code = (
    "import sys; sys.argv=['prepare', '--help']\n"
    'from bart_t5x import prepare\n'
    'try:\n  prepare.main()\n'
    'finally:\n'
    "  heavy = {'tensorflow', 'seqio', 'jax', 'datasets', 'tokenizers'}\n"
    '  print(sorted(heavy & set(sys.modules)))'
  )
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert run.stdout.splitlines()[-1] == '[]'
  assert '--vocab_size' in run.stdout


def test_makes_a_corpus_without_tensorflow(text_file, tmp_path):
  code = (
    'import sys; from bart_t5x import prepare\n'
    'assert prepare.main(sys.argv[1:]) == 0\n'
    "print('tensorflow' in sys.modules)"
  )
  args = arguments(text_file, tmp_path / 'out', '--num_workers=1')
  run = subprocess.run(
    [sys.executable, '-c', code, *args], capture_output=True, text=True
  )
  assert run.stdout.splitlines()[-1] == 'False', run.stderr
