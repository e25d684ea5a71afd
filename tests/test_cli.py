"""Helpers of the command lines: quiet imports, warnings, errors."""

import logging
import pathlib
import re
import subprocess
import sys

import pytest

from bart_t5x import __main__ as console
from bart_t5x import cli


def test_tensorflow_import_prints_nothing():
  code = (
    'import sys; from bart_t5x import cli\n'
    'cli.set_up_libraries(); cli.import_tensorflow()\n'
    'assert "tensorflow" in sys.modules\n'
    'sys.stderr.write("after")'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr) == (0, '', 'after')


def test_output_of_a_failed_import_is_shown(tmp_path):
  (tmp_path / 'tensorflow.py').write_text(
    'import os; os.write(2, b"why\\n"); raise ImportError("broken")'
  )
  code = (
    f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n'
    'from bart_t5x import cli\n'
    'try: cli.import_tensorflow()\n'
    'except ImportError as e: sys.exit(cli.fail(e))'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (1, 'why\nerror: broken\n')


def test_warnings_are_logged_once_and_none_of_seqio(caplog, monkeypatch):
  logger = logging.getLogger('absl')
  monkeypatch.setattr(logger, 'filters', [])
  caplog.set_level(logging.INFO, 'absl')
  cli.quiet_warnings()
  cli.quiet_warnings()
  for path, level, text in (
    ('/x/seqio/dataset_providers.py', logging.WARNING, 'cache it'),
    ('/x/seqio/dataset_providers.py', logging.ERROR, 'broken'),
    ('/x/tasks/text_to_text.py', logging.WARNING, '1 left out'),
    ('/x/tasks/text_to_text.py', logging.WARNING, '1 left out'),
    ('/x/tasks/text_to_text.py', logging.WARNING, '2 left out'),
  ):
    logger.handle(logging.LogRecord('absl', level, path, 1, text, None, None))
  shown = [r.getMessage() for r in caplog.records if r.name == 'absl']
  assert shown == ['broken', '1 left out', '2 left out']


@pytest.mark.parametrize(
  'command', ['prepare', 'inspect', 'report', 'restack', 'convert']
)
def test_the_console_command_runs_the_modules(command, capsys):
  with pytest.raises(SystemExit) as end:
    console.main([command, '--help'])
  assert end.value.code == 0
  assert re.search(rf'bart_t5x\.(hf\.)?{command}', capsys.readouterr().out)


def test_distributions_and_citation_have_the_version_of_the_changelog():
  root = pathlib.Path(__file__).parent.parent
  version = re.search('^## (.*)', (root / 'CHANGELOG.md').read_text(), re.M)[1]
  for file in ('setup.py', 'runtime/pyproject.toml', 'CITATION.cff'):
    text = (root / file).read_text()
    assert re.search(r'^ *version *[=:] *(.*)', text, re.M)[1].strip('\'",') == version
  assert f"'bart-t5x-runtime=={version}'" in (root / 'setup.py').read_text()
