"""Which lines of a log are shown, and how."""

import logging
import os
import subprocess
import sys

import pytest

from t5x import quiet

SITE = os.path.join(os.sep, 'x', 'lib', 'python3.11', 'site-packages')


def record(path, level=logging.INFO, name='absl', text='hello'):
  return logging.LogRecord(name, level, path, 1, text, None, None)


@pytest.mark.parametrize(
  'path, level, shown',
  [
    (f'{SITE}/orbax/checkpoint/x.py', logging.INFO, False),
    (f'{SITE}/orbax/checkpoint/x.py', logging.WARNING, False),
    (f'{SITE}/orbax/checkpoint/x.py', logging.ERROR, True),
    (f'{SITE}/seqio/dataset_providers.py', logging.INFO, False),
    (f'{SITE}/seqio/loggers.py', logging.INFO, True),
    (f'{SITE}/t5x/train.py', logging.INFO, True),
    (f'{SITE}/somebodys_task/x.py', logging.INFO, True),
    ('/home/me/t5x/train.py', logging.INFO, True),
    ('/home/me/tasks.py', logging.WARNING, True),
  ],
)
def test_libraries_are_silent_and_others_are_not(path, level, shown):
  assert quiet._OwnLines().filter(record(path, level)) is shown


def test_a_librarys_own_logger_is_silent_wherever_it_lies():
  line = record('/home/me/jax/_src/x.py', logging.WARNING, name='jax._src.x')
  assert not quiet._OwnLines().filter(line)


def test_a_line_has_the_time_and_the_level_where_it_matters():
  line = quiet._Line('[1/2] ')
  assert line.format(record('a.py'))[8:] == ' [1/2] hello'
  warning = record('a.py', logging.WARNING)
  assert line.format(warning)[8:] == ' [1/2] WARNING: hello'


def test_stderr_is_hidden_and_shown_after_all_where_something_fails():
  code = (
    'import os\nfrom t5x import quiet\n'
    'with quiet.hidden_stderr(): os.write(2, b"chatter\\n")\n'
    'os.write(2, b"between\\n")\n'
    'try:\n'
    '  with quiet.hidden_stderr():\n'
    '    os.write(2, b"reason\\n")\n'
    '    raise ImportError("x")\n'
    'except ImportError: os.write(2, b"after\\n")\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stderr.splitlines() == ['between', 'reason', 'after']
