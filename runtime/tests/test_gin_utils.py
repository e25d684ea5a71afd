"""Gin files and bindings: what resolves, what is an error and what is recorded."""

import os
import re
import subprocess
import sys
import types

import gin
import pytest
from gin import config as gin_config

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

def matrices(params):
  return {name: value.ndim > 1 for name, value in params.items()}
"""

SCRIPT = """
def train(model=None, steps=1, extra=None):
  return model, steps, extra
"""


@pytest.fixture(autouse=True)
def fake_modules(monkeypatch):
  """Fresh modules for each test, which gin forgets after it."""
  for name, source in (('fakelib', LIBRARY), ('fakescript', SCRIPT)):
    module = types.ModuleType(name)
    exec(source, vars(module))
    monkeypatch.setitem(sys.modules, name, module)
  gin.clear_config()
  registry, inverse = gin_config._REGISTRY, gin_config._INVERSE_REGISTRY
  selectors, objects = {name for name, _ in registry.items()}, dict(inverse)
  # As a script does with its own function.
  gin.configurable(sys.modules['fakescript'].train, module='__main__')
  yield
  gin.clear_config()
  for selector in [name for name, _ in registry.items() if name not in selectors]:
    registry.pop(selector)
  inverse.clear()
  inverse.update(objects)
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


def test_command_line_reaches_what_no_file_has_bound(tmp_path):
  # The binding that fails with "No configurable matching" in gin itself.
  parse(
    tmp_path,
    'fakescript.train.model = @fakelib.Model()\n',
    'fakelib.Model.predict.num_decodes = 4',
  )
  model, _, _ = call_train()
  assert model.predict() == 4


def test_command_line_may_refer_to_new_things(tmp_path):
  parse(
    tmp_path,
    'fakescript.train.steps = 2\n',
    'fakescript.train.model = @fakelib.Child()',
    'fakelib.Child.size = 5',
    'fakelib.Child.predict.num_decodes = 3',
  )
  model, _, _ = call_train()
  assert type(model).__name__ == 'Child' and model.size == 5
  assert model.predict() == 3


def test_command_line_reaches_runtime_modules_without_any_import():
  from t5x import optimizers

  gin_utils.parse_gin_flags(
    [], [], ['optimizers.adamw.b1 = 0.5'], finalize_config=False
  )
  assert gin.get_bindings(optimizers.adamw) == {'b1': 0.5}


def test_command_line_takes_imports_as_lines(tmp_path):
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
  ],
)
def test_a_wrong_name_or_value_is_an_error_that_names_it(tmp_path, text, binding, part):
  with pytest.raises(ValueError, match=re.escape(part)):
    parse(tmp_path, text, *([binding] if binding else []))


def test_a_syntax_error_reports_file_and_line(tmp_path):
  with pytest.raises(SyntaxError) as caught:
    parse(tmp_path, 'A = runs/x')
  assert caught.value.filename.endswith('run.gin') and caught.value.lineno == 5


def test_every_missing_macro_is_named_at_once(tmp_path):
  text = 'A = %gin.REQUIRED\nB = %gin.REQUIRED\nC = 1\nfakescript.train.steps = %A\n'
  with pytest.raises(ValueError, match='A, B'):
    parse(tmp_path, text + 'fakescript.train.extra = %B')


def test_a_binding_on_the_class_in_use_reaches_an_inherited_method(tmp_path):
  parse(
    tmp_path,
    'fakescript.train.model = @fakelib.Child()\n',
    'fakelib.Child.predict.num_decodes = 4',
  )
  assert call_train()[0].predict() == 4


@pytest.mark.parametrize(
  'binding', ['fakelib.Model.size = 3', 'fakelib.Model.predict.num_decodes = 4']
)
def test_a_command_line_binding_on_a_class_that_is_not_used_is_an_error(
  tmp_path, binding
):
  used = 'fakescript.train.model = @fakelib.Child()\n'
  with pytest.raises(ValueError, match='fakelib.Model'):
    parse(tmp_path, used, binding)
  gin.clear_config()
  # In a file it is normal: a model's file, replaced by another.
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


def test_files_of_the_working_folder_come_first(tmp_path, monkeypatch):
  (tmp_path / 'gin').mkdir()
  (tmp_path / 'gin' / 'a.gin').write_text("include 'gin/b.gin'\n")
  (tmp_path / 'gin' / 'b.gin').write_text('A = 2\n')
  monkeypatch.chdir(tmp_path)
  gin_utils.parse_gin_flags([], ['gin/a.gin'], [], finalize_config=False)
  assert gin.query_parameter('A/gin.macro.value') == 2


class Writer:
  """Keeps what a summary writer is given."""

  def __init__(self):
    self.calls = []

  def write_texts(self, step, texts):
    """Records a call."""
    self.calls.append((step, texts))

  def flush(self):
    """Records a call."""
    self.calls.append('flush')


def test_config_is_written_and_can_be_read_again(tmp_path):
  parse(tmp_path, 'STEPS = 3\n', 'fakescript.train.steps = %STEPS')
  writer = Writer()
  gin_utils.summarize_gin_config(tmp_path / 'new' / 'run', writer, 5)
  written = tmp_path / 'new' / 'run' / 'config.gin'
  assert 'STEPS = 3' in written.read_text()
  (step, texts), flush = writer.calls
  assert step == 5 and 'STEPS = 3' in texts['config'] and flush == 'flush'

  gin.clear_config()
  gin_utils.parse_gin_flags([], [str(written)], [])
  assert call_train()[1] == 3
  gin_utils.summarize_gin_config(tmp_path, None, 0)
  assert (tmp_path / 'config.gin').read_text() == written.read_text()


def test_adamw_with_a_mask_from_gin(tmp_path):
  import jax.numpy as jnp

  from t5x import optimizers

  text = """
from t5x import optimizers
fakescript.train.extra = @optimizers.adamw()
optimizers.adamw.learning_rate = 1.0
optimizers.adamw.weight_decay = 0.5
optimizers.adamw.mask = @fakelib.matrices
"""
  parse(tmp_path, text)
  rule = call_train()[2]
  assert isinstance(rule, optimizers.OptaxWrapper)
  params = {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}
  zero = {name: jnp.zeros_like(value) for name, value in params.items()}
  updated = rule.create(params).apply_gradient(zero, learning_rate=None).target
  assert updated['kernel'].tolist() == [[0.5, 0.5], [0.5, 0.5]]
  assert updated['bias'].tolist() == [1.0, 1.0]

  gin.clear_config()
  with pytest.raises(ValueError, match="Did you mean 'weight_decay'"):
    parse(tmp_path, text, 'optimizers.adamw.weight_decey = 0.1')


def test_no_tensorflow_in_the_lower_levels():
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
