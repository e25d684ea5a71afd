"""Gin files and bindings: resolution, errors and the recorded configuration."""

import importlib
import os
import re
import subprocess
import sys
import types
from unittest import mock

import gin
import pytest
from gin import config as gin_config
from gin import selector_map

import t5x
from t5x import gin_utils

LIBRARY = """
class Model:
  def __init__(self, size=1, z_loss=0.0):
    self.size = size
    self.z_loss = z_loss

  def predict(self, num_decodes=1):
    return num_decodes

class Child(Model):
  pass

def optimizer(rate=0.1):
  return rate
"""

SCRIPT = """
def train(model=None, steps=1, extra=None):
  return model, steps, extra
"""


@pytest.fixture(autouse=True)
def fake_modules(monkeypatch):
  """Makes modules for each test, which gin forgets after it."""
  for name, source in (('fakelib', LIBRARY), ('fakescript', SCRIPT)):
    module = types.ModuleType(name)
    exec(source, vars(module))
    monkeypatch.setitem(sys.modules, name, module)
  gin.clear_config()
  # Without the scripts that other tests made configurable.
  registry, inverse = selector_map.SelectorMap(), {}
  for name, configurable in gin_config._REGISTRY.items():
    if not name.startswith('__main__.'):
      registry[name] = inverse[configurable.wrapped] = configurable
  monkeypatch.setattr(gin_config, '_REGISTRY', registry)
  monkeypatch.setattr(gin_config, '_INVERSE_REGISTRY', inverse)
  # As a script does with its own function.
  gin.configurable(sys.modules['fakescript'].train, module='__main__')
  yield
  gin.clear_config()
  gin_config._RENAMED_SELECTORS.clear()


HEAD = """
from __gin__ import dynamic_registration
import fakelib
import fakescript
"""


def parse(tmp_path, text, *bindings, **kwargs):
  path = tmp_path / 'run.gin'
  path.write_text(HEAD + text)
  gin_utils.parse_gin_flags([], [str(path)], list(bindings), **kwargs)


def call_train():
  return gin.get_configurable(sys.modules['fakescript'].train)()


def test_rewrite_gin_args():
  args = ['prog', '--gin.train/Foo.x=a=b', '--gin_file=x.gin', '--other']
  assert gin_utils.rewrite_gin_args(args) == [
    'prog',
    '--gin_bindings=train/Foo.x = a=b',
    '--gin_file=x.gin',
    '--other',
  ]
  with pytest.raises(ValueError, match='equals sign'):
    gin_utils.rewrite_gin_args(['--gin.STEPS'])


def test_command_line_wins_over_files(tmp_path):
  parse(tmp_path, 'STEPS = 3\nfakescript.train.steps = %STEPS\n', 'STEPS = 7')
  assert call_train()[1] == 7


def test_command_line_binds_names_that_no_file_binds(tmp_path):
  # Gin itself raises "No configurable matching".
  parse(
    tmp_path,
    'fakescript.train.model = @fakelib.Model()\n',
    'fakelib.Model.predict.num_decodes = 4',
  )
  model, _, _ = call_train()
  assert model.predict() == 4


def test_command_line_may_refer_to_new_classes(tmp_path):
  parse(
    tmp_path,
    'fakescript.train.steps = 2\n',
    'fakescript.train.model = @fakelib.Child()',
    'fakelib.Child.size = 5',
    'fakelib.Child.predict.num_decodes = 3',  # An inherited method.
  )
  model, _, _ = call_train()
  assert type(model).__name__ == 'Child' and model.size == 5
  assert model.predict() == 3


def test_command_line_binds_runtime_modules_without_imports():
  from t5x import optimizers

  gin_utils.parse_gin_flags(
    [], [], ['optimizers.adamw.b1 = 0.5'], finalize_config=False
  )
  assert gin.get_bindings(optimizers.adamw) == {'b1': 0.5}


def test_command_line_may_import_modules(tmp_path):
  parse(
    tmp_path,
    'fakescript.train.steps = 2\n',
    'from __gin__ import dynamic_registration',
    'import fakelib',
    'import fakescript',
    'fakescript.train.model = @fakelib.Model()',
  )
  assert type(call_train()[0]).__name__ == 'Model'


@pytest.mark.parametrize(
  ('text', 'binding', 'part'),
  [
    ('', 'fakelib.Modle.size = 1', "'Model'"),
    ('', 'fakelib.Model.sizes = 1', "'size'"),
    ('', 'fakescript.train.step = 1', "'steps'"),
    ('', 'fakescript.train.extra = @fakelib.optimiser()', "'optimizer'"),
    ('STEPS = 1\nfakescript.train.steps = %STEPS', 'STEP = 2', "'STEPS'"),
    ('fakescript.train.steps = %STEPS', None, 'STEPS'),
    ('', 'STEPS = /tmp/x', "'STEPS = /tmp/x'"),
    ('A = [1, 2', None, 'run.gin'),
    ('fakelib.Model.sizes = 1', None, 'run.gin", line 5'),
    ('A = %gin.REQUIRED\nB = %gin.REQUIRED\nC = 1', None, 'A, B'),
  ],
)
def test_wrong_names_and_values_are_errors(tmp_path, text, binding, part):
  with pytest.raises(ValueError, match=re.escape(part)):
    parse(tmp_path, text, *([binding] if binding else []))


def test_syntax_error_reports_file_and_line(tmp_path):
  with pytest.raises(SyntaxError) as caught:
    parse(tmp_path, 'A = runs/x')
  assert caught.value.filename.endswith('run.gin') and caught.value.lineno == 5


@pytest.mark.parametrize('content', [b'A = (1,', b'A = "\xe5"'])
def test_unreadable_file_is_named(tmp_path, content):
  (tmp_path / 'part.gin').write_bytes(content)
  with pytest.raises(ValueError, match='part.gin'):
    gin_utils.parse_gin_flags([], [str(tmp_path / 'part.gin')], [])


@pytest.mark.parametrize(
  'binding', ['fakelib.Model.size = 3', 'fakelib.Model.predict.num_decodes = 4']
)
def test_command_line_binding_of_an_unused_class_is_an_error(tmp_path, binding):
  used = 'fakescript.train.model = @fakelib.Child()\n'
  with pytest.raises(ValueError, match='fakelib.Model'):
    parse(tmp_path, used, binding)
  gin.clear_config()
  # A file may bind it: another file may replace the model.
  parse(tmp_path, used + 'fakelib.Model.size = 3\n')


def test_includes_are_found_in_packages(tmp_path, monkeypatch):
  package = tmp_path / 'site' / 'fakepackage' / 'configs'
  package.mkdir(parents=True)
  for folder in (package, package.parent):
    (folder / '__init__.py').touch()
  (package / 'base.gin').write_text('A = 1\n')
  monkeypatch.syspath_prepend(tmp_path / 'site')
  monkeypatch.chdir(tmp_path)
  parse(
    tmp_path, "include 'fakepackage/configs/base.gin'\nfakescript.train.steps = %A\n"
  )
  assert call_train()[1] == 1
  with pytest.raises(OSError, match='fakepackage/nowhere.gin'):
    gin_utils.parse_gin_flags([], ['fakepackage/nowhere.gin'], [])


def test_includes_are_found_in_the_working_folder(tmp_path, monkeypatch):
  (tmp_path / 'gin').mkdir()
  (tmp_path / 'gin' / 'a.gin').write_text("include 'gin/b.gin'\n")
  (tmp_path / 'gin' / 'b.gin').write_text('A = 2\n')
  monkeypatch.chdir(tmp_path)
  gin_utils.parse_gin_flags([], ['gin/a.gin'], [], finalize_config=False)
  assert gin.query_parameter('A/gin.macro.value') == 2


def test_config_is_written_and_can_be_read_again(tmp_path):
  parse(tmp_path, 'STEPS = 3\n', 'fakescript.train.steps = %STEPS')
  writer = mock.Mock()
  gin_utils.summarize_gin_config(tmp_path / 'new' / 'run', writer, 5)
  written = tmp_path / 'new' / 'run' / 'config.gin'
  assert 'STEPS = 3' in written.read_text()
  step, texts = writer.write_texts.call_args.args
  assert step == 5 and 'STEPS = 3' in texts['config']

  gin.clear_config()
  gin_utils.parse_gin_flags([], [str(written)], [])
  assert call_train()[1] == 3
  gin_utils.summarize_gin_config(tmp_path, None, 0)
  assert (tmp_path / 'config.gin').read_text() == written.read_text()


def test_basic_modules_do_not_import_tensorflow():
  modules = (
    'multihost state_utils losses metrics gin_utils optimizers adafactor train_state'
  ).split()
  code = (
    f'import sys; from t5x import {", ".join(modules)}\n'
    "print([m for m in sys.modules if m in ('tensorflow', 'seqio', 'tensorstore')])"
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  assert done.stdout.strip() == '[]'


def test_a_clone_of_t5x_supplies_examples(tmp_path, monkeypatch):
  folder = tmp_path / 't5x/examples/mine'
  folder.mkdir(parents=True)
  for package in (folder, folder.parent, folder.parent.parent):
    (package / '__init__.py').touch()
  (folder.parent.parent / 'gin_utils.py').write_text('raise AssertionError')
  (folder / 'network.py').write_text('def size(n): return n')
  uses = 'from t5x.examples.mine import network\n'
  (folder / 'base.gin').write_text(f'{HEAD}{uses}network.size.n = 3')
  include = "include 't5x/examples/mine/base.gin'\n"
  for text in (include, uses):
    with pytest.raises((OSError, ImportError), match='clone .*google-research/t5x'):
      parse(tmp_path, text)
  gin.clear_config()

  monkeypatch.setattr(t5x, '__path__', list(t5x.__path__))
  monkeypatch.setattr(sys, 'path', [*sys.path, str(tmp_path)])
  importlib.reload(t5x)
  try:
    parse(tmp_path, include)
    assert gin.get_configurable(sys.modules['t5x.examples.mine.network'].size)() == 3
  finally:
    for name in [name for name in sys.modules if name.startswith('t5x.examples')]:
      del sys.modules[name]


@pytest.mark.parametrize(
  'script, file',
  [
    ('train', 'pretrain'),
    ('train', 'finetune'),
    ('eval', 'eval'),
    ('infer', 'infer'),
    ('infer', 'infer_from_tfexample_file'),
  ],
)
def test_run_files_need_only_their_required_macros(monkeypatch, script, file):
  module = importlib.import_module(f't5x.{script}')
  monkeypatch.setitem(sys.modules, '__main__', module)
  root = os.path.dirname(t5x.__file__)
  with open(f'{root}/configs/runs/{file}.gin', encoding='utf-8') as opened:
    names = re.findall(r'(?m)^(\w+) = %gin.REQUIRED', opened.read())
  values = {
    'TRAIN_STEPS': 8,
    'TASK_FEATURE_LENGTHS': {'inputs': 8},
    'FEATURE_LENGTHS': {'inputs': 8},
    'TF_EXAMPLE_FILE_PATHS': ['x'],
  }
  bindings = [f'{name} = {values.get(name, "x")!r}' for name in ['MODEL', *names]]
  gin_utils.parse_gin_flags([root], [f'configs/runs/{file}.gin'], bindings)


def test_cyclic_macros():
  with pytest.raises(ValueError, match='FIRST.*SECOND|SECOND.*FIRST'):
    gin_utils.parse_gin_flags([], [], ['FIRST = %SECOND', 'SECOND = [%FIRST]'])


def test_a_file_that_includes_itself(tmp_path):
  path = tmp_path / 'own.gin'
  path.write_text(f"include '{path}'\n")
  with pytest.raises(ValueError, match=re.escape(str(path))):
    gin_utils.parse_gin_flags([], [str(path)], [])
