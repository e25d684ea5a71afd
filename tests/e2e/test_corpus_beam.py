"""A corpus made through Apache Beam equals the one made without, on each runner."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import fsspec
import psutil
import pytest

import bart_t5x.prepare

pytest.importorskip('apache_beam')
pytestmark = pytest.mark.slow

TWO_PROCESSES = '--direct_running_mode=multi_processing,--direct_num_workers=2'
# Workers are started as `python`.
ENVIRONMENT = {
  **os.environ,
  'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}',
}


@pytest.fixture(scope='module')
def text_file(tmp_path_factory, helpers):
  lines = helpers.made_up_norwegian(1400)
  lines += lines[:100]
  path = tmp_path_factory.mktemp('text') / 'text.txt'
  path.write_text('\n'.join([*lines, '', ' ', '']))
  return path


def command(text_file, folder, *more):
  arguments = ['--source=text', f'--input={text_file}', f'--output_dir={folder}']
  arguments += ['--vocab_size=330', '--num_shards=8', *more]
  return [sys.executable, '-m', 'bart_t5x.prepare', *arguments]


def prepare(*args):
  run = subprocess.run(command(*args), env=ENVIRONMENT, capture_output=True, text=True)
  return run.returncode, run.stderr


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope='module')
def without_beam(text_file, tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpus') / 'out'
  assert bart_t5x.prepare.main(command(text_file, folder)[3:]) == 0
  return contents(folder)


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


@contextlib.contextmanager
def job_service():
  """Yields options of a job service and its workers, with the protocol of Flink."""
  job, worker = free_port(), free_port()
  with contextlib.ExitStack() as stack:
    for module, option in (
      ('portability.local_job_service_main', f'--port={job}'),
      ('worker.worker_pool_main', f'--service_port={worker}'),
    ):
      service = [sys.executable, '-m', f'apache_beam.runners.{module}', option]
      process = subprocess.Popen(service, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
      stack.callback(process.wait)
      stack.callback(process.kill)
    for port in (job, worker):
      wait_for(port)
    yield (
      f'--runner=PortableRunner,--job_endpoint=localhost:{job},'
      f'--environment_type=EXTERNAL,--environment_config=localhost:{worker}'
    )


def wait_for(port):
  for _ in range(600):
    with contextlib.suppress(ConnectionRefusedError):
      socket.create_connection(('localhost', port)).close()
      return
    time.sleep(0.1)
  raise TimeoutError(port)


def test_portable_runner(text_file, without_beam, tmp_path):
  with job_service() as options:
    options = f'--pipeline_options={options}'
    code, error = prepare(text_file, tmp_path / 'out', '--beam', options)
  assert code == 0, error
  assert contents(tmp_path / 'out') == without_beam


def test_local_runner_with_unigram_from_jsonl_in_a_bucket(text_file, tmp_path):
  fs = fsspec.filesystem('memory')
  url = f'memory:///{tmp_path.name}'
  rows = [json.dumps({'text': line}) for line in text_file.read_text().splitlines()]
  fs.pipe(f'{url}/a.jsonl', '\n'.join(rows[:900]).encode())
  fs.pipe(f'{url}/b.jsonl', '\n'.join(rows[900:]).encode())
  args = ['--source=jsonl', f'--input={url}/*.jsonl', '--vocab_size=330']
  args += ['--tokenizer=unigram', '--tokenizer_bytes=20000']
  assert bart_t5x.prepare.main([*args, f'--output_dir={tmp_path}/out']) == 0
  assert bart_t5x.prepare.main([*args, f'--output_dir={url}/out', '--beam']) == 0
  there = {os.path.basename(path): fs.cat(path) for path in fs.find(f'{url}/out')}
  assert there == contents(tmp_path / 'out')


def test_an_error_in_a_worker_names_file_and_line(text_file, tmp_path):
  path = tmp_path / 'bad.txt'
  path.write_bytes(text_file.read_bytes() + b'bl\xe5\n')
  options = ['--beam', f'--pipeline_options={TWO_PROCESSES}']
  code, error = prepare(path, tmp_path / 'out', *options)
  assert code == 1
  assert f'error: {path}, line 1503: byte 0xe5' in error.splitlines()[-1]
  assert os.listdir(tmp_path) == ['bad.txt']


def test_two_processes_and_a_killed_worker(text_file, without_beam, tmp_path):
  options = ['--beam', f'--pipeline_options={TWO_PROCESSES}']
  process = subprocess.Popen(
    # Enough files for some to be missing when the workers are killed.
    command(text_file, tmp_path / 'out', *options, '--num_shards=1000'),
    env=ENVIRONMENT,
    stderr=subprocess.PIPE,
    text=True,
  )
  unfinished = tmp_path / '.out.unfinished'
  while not (unfinished.exists() and any(unfinished.iterdir())):  # its first file
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.01)
  for worker in psutil.Process(process.pid).children(recursive=True):
    worker.kill()
  _, error = process.communicate()
  assert process.returncode == 1 and 'error: ' in error
  assert not any(tmp_path.iterdir())
  assert prepare(text_file, tmp_path / 'out', *options)[0] == 0
  assert contents(tmp_path / 'out') == without_beam
