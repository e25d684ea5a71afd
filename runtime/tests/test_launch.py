"""Command lines, as a user gives them, and how a program ends."""

import os
import subprocess
import sys
import types
import weakref

import gin
import pytest
import tensorflow as tf

from t5x import checkpoints, launch
from t5x.training import health


def call(script, *args):
  """Runs `python -m t5x.<script>` and returns (exit code, stdout, stderr)."""
  done = subprocess.run(
    [sys.executable, '-m', f't5x.{script}', *args],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('script', ['train', 'eval', 'infer', 'main'])
def test_help_explains_itself_without_heavy_imports(script):
  code, out, err = call(script, '--help')
  assert (code, err) == (0, '')
  assert f'python -m t5x.{script}' in out
  for flag in ('gin_file', 'gin.NAME=VALUE', 'gin_search_paths', 'tfds_data_dir'):
    assert f'--{flag}' in out
  assert ('--shard_id' in out) == (script in ('infer', 'main'))
  assert '--process_count' in out


def test_help_imports_neither_jax_nor_tensorflow():
  code = (
    'import sys, runpy\n'
    'sys.argv = ["t5x.train", "--help"]\n'
    'try:\n  runpy.run_module("t5x.train", run_name="__main__")\n'
    'except SystemExit: pass\n'
    'sys.exit(any(name in sys.modules for name in ("jax", "tensorflow", "seqio")))'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, check=False)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  'args, message',
  [
    ((), 'at least one --gin_file'),
    (('--gin_fil=x.gin',), "Unknown command line flag 'gin_fil'"),
    (('--gin_file=x.gin',), 'x.gin is not there. Looked in: .,'),
    (('--gin_file=x.gin', 'extra'), 'Unexpected arguments: extra'),
  ],
)
def test_a_wrong_command_line_is_one_message_and_no_traceback(args, message):
  code, out, err = call('train', *args)
  assert code != 0
  assert out == ''
  assert err.startswith('ERROR: ') and message in err
  assert 'Traceback' not in err
  assert len(err.splitlines()) <= 2


@pytest.fixture
def ended(monkeypatch):
  """Catches the exit code that the program would end with."""
  codes = []
  monkeypatch.setattr(launch, 'leave', codes.append)
  if not launch.FLAGS.is_parsed():
    launch.FLAGS(['test'])
  monkeypatch.delenv(launch.TRACEBACK_VARIABLE, raising=False)
  return codes


def fail_with(error):
  with launch.reported_errors():
    raise error


def test_wrong_input_is_one_message(ended, capsys):
  fail_with(ValueError("batch_size is 3.\n  In call to configurable 'train' (<x>)"))
  err = capsys.readouterr().err
  assert ended == [1]
  assert err.startswith('ERROR: batch_size is 3.\n(raised in test_launch.py:')
  assert 'configurable' not in err and 'Traceback' not in err


@pytest.mark.parametrize(
  'error, text',
  [
    (KeyError('inputs'), 'KeyError: inputs'),
    (FileNotFoundError(2, 'No such file', 'a/b'), "No such file: 'a/b'"),
    (ValueError(), 'ValueError'),
  ],
)
def test_messages_say_what_the_exception_knows(ended, capsys, error, text):
  fail_with(error)
  assert text in capsys.readouterr().err.splitlines()[0]


def test_a_traceback_where_asked_for_or_the_code_is_at_fault(
  ended, capsys, monkeypatch
):
  fail_with(AttributeError('no x'))
  err = capsys.readouterr().err
  assert 'Traceback' in err and 'ERROR: AttributeError: no x' in err
  monkeypatch.setenv(launch.TRACEBACK_VARIABLE, '1')
  fail_with(ValueError('bad'))
  assert 'Traceback' in capsys.readouterr().err
  assert ended == [1, 1]


def test_a_fault_of_the_code_that_gin_calls_gets_its_traceback(ended, capsys):
  gin.clear_config()
  broken = gin.external_configurable(
    lambda part: part.missing, 'broken', module='launch_test'
  )
  with launch.reported_errors():
    broken('x')
  err = capsys.readouterr().err
  assert 'Traceback' in err and "ERROR: AttributeError: 'str' object has" in err
  assert ended == [1]


def test_an_argument_that_gin_misses_is_one_message(ended, capsys):
  gin.clear_config()
  needy = gin.external_configurable(lambda part: part, 'needy', module='launch_test')
  with launch.reported_errors():
    needy()
  err = capsys.readouterr().err
  assert 'Traceback' not in err
  assert err.startswith('ERROR: TypeError:') and 'missing 1 required' in err
  assert ended == [1]


@pytest.mark.parametrize(
  'error',
  [
    tf.errors.NotFoundError(None, None, 'a/b is gone'),
    checkpoints.DamagedCheckpointError('a/b is unreadable'),
    checkpoints.CheckpointSaveError('a/b is full'),
    health.NonFiniteLossError(3, None),
  ],
)
def test_what_the_libraries_say_of_files_and_losses_is_one_message(
  ended, capsys, error
):
  fail_with(error)
  assert 'Traceback' not in capsys.readouterr().err
  assert ended == [1]


def test_interrupting_ends_with_130(capsys):
  with pytest.raises(SystemExit) as end:
    fail_with(KeyboardInterrupt())
  assert end.value.code == 130


def test_the_gin_files_of_the_package_are_found_from_anywhere():
  (root,) = launch.GIN_SEARCH_PATHS
  for name in ('pretrain', 'finetune', 'eval', 'infer', 'precompile'):
    assert os.path.isfile(os.path.join(root, f't5x/configs/runs/{name}.gin'))


def test_gin_files_are_found_in_other_packages_too(tmp_path, monkeypatch, capsys):
  package = tmp_path / 'fakemodels' / 'configs'
  package.mkdir(parents=True)
  (package.parent / '__init__.py').touch()
  (package / 'base.gin').write_text('A = 1\n')
  monkeypatch.syspath_prepend(tmp_path)

  def check(name):
    given = types.SimpleNamespace(gin_file=[name], gin_search_paths=['.'])
    monkeypatch.setattr(launch, 'FLAGS', given)
    launch._check_gin_files()

  check('fakemodels/configs/base.gin')
  with pytest.raises(SystemExit):
    check('fakemodels/configs/absent.gin')
  assert 'absent.gin is not there' in capsys.readouterr().err


def test_what_is_kept_to_the_end_is_not_taken_apart(ended, monkeypatch):
  """Outside of a script nothing is kept: a library would only leak it."""

  class Thing:
    pass

  alive = []

  def main(argv):
    thing = Thing()
    alive.append(weakref.ref(thing))
    launch.keep_to_the_end(thing)

  monkeypatch.setattr(launch, '_kept', None)
  main([])
  monkeypatch.setattr(launch, '_configure_seqio', lambda: None)
  launch.run_main(main)
  assert ended == [0]
  assert [ref() is None for ref in alive] == [True, False]
