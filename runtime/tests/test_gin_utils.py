"""Gin files and bindings: what resolves, what is refused and what is recorded."""

import os
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
  """Modules made anew for each test, and forgotten by gin after it."""
  for name, source, says in (
    ('fakelib', LIBRARY, 'fakelib'),
    ('fakescript', SCRIPT, '__main__'),  # As a script's own functions do.
  ):
    module = types.ModuleType(name)
    vars(module)['__name__'] = says
    exec(source, vars(module))
    monkeypatch.setitem(sys.modules, name, module)
  gin.clear_config()
  registry, inverse = gin_config._REGISTRY, gin_config._INVERSE_REGISTRY
  selectors, objects = {name for name, _ in registry.items()}, dict(inverse)
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
  )
  model, _, _ = call_train()
  assert type(model).__name__ == 'Child' and model.size == 5


def test_command_line_reaches_runtime_modules_without_any_import():
  from t5x import optimizers

  gin_utils.parse_gin_flags(
    [], [], ['optimizers.adamw.b1 = 0.5'], finalize_config=False
  )
  assert gin.get_bindings(optimizers.adamw) == {'b1': 0.5}


def test_an_import_of_an_included_file_only_is_to_be_repeated(tmp_path):
  (tmp_path / 'model.gin').write_text(
    'from __gin__ import dynamic_registration\nimport fakelib\nfakelib.Model.size = 2\n'
  )
  (tmp_path / 'run.gin').write_text(
    'from __gin__ import dynamic_registration\nimport fakescript\n'
    f"include '{tmp_path}/model.gin'\nfakescript.train.model = @fakelib.Model()\n"
  )
  with pytest.raises(ValueError, match='Add `import fakelib` here'):
    gin_utils.parse_gin_flags([], [str(tmp_path / 'run.gin')], [])


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
  ('text', 'binding', 'message'),
  [
    ('', 'fakelib.Modle.size = 1', "Did you mean 'Model'"),
    ('', 'fakelib.Model.sizes = 1', "Did you mean 'size'"),
    ('', 'fakescript.train.x = @fakelib.optimiser()', "mean 'optimizer'"),
    ('fakelib.Model.sizes = 1', None, r"(?s)run.gin.*line 5.*Did you mean 'size'"),
    ('fakelib.Modle.size = 1', None, r"(?s)run.gin.*line 5.*Did you mean 'Model'"),
    ('fakelib.xyzzy.size = 1', None, r'(?s)no attribute xyzzy.*No name in it is near'),
    ('losses.f.x = 1', None, 'Add `from t5x import losses`'),
    ('STEPS = 1\nfakescript.train.steps = %STEPS', 'STEP = 2', "mean 'STEPS'"),
    ('fakescript.train.steps = %STEPS', None, 'never defined: STEPS'),
    ('', 'STEPS = /tmp/x', "'STEPS = /tmp/x' cannot be read.*text keeps quotes"),
  ],
)
def test_wrong_names_are_refused_with_the_nearest(tmp_path, text, binding, message):
  with pytest.raises(ValueError, match=message):
    parse(tmp_path, text, *([binding] if binding else []))


def test_a_run_file_of_another_script_is_told_from_a_misspelt_name(
  tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, '__main__', sys.modules['fakescript'])
  with pytest.raises(ValueError, match="(?s)no 'evaluate': .*for another script"):
    parse(tmp_path, 'fakescript.evaluate.steps = 2')
  with pytest.raises(ValueError, match="Did you mean 'train'"):
    parse(tmp_path, 'fakescript.trane.steps = 2')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (
      'from t5x import utils, losses',
      r'(?s)run.gin cannot be read.*line \d.*imports one',
    ),
    ('A = runs/x', r'(?s)run.gin cannot be read: mal.*line \d+\). A line'),
    ('A = [1, 2', 'run.gin cannot be read: .*EOF'),
  ],
)
def test_what_is_no_gin_is_shown_with_its_place(tmp_path, text, message):
  with pytest.raises(ValueError, match=message):
    parse(tmp_path, text)


def test_no_place_in_memory_is_shown(tmp_path):
  with pytest.raises(ValueError, match='cannot be read') as caught:
    parse(tmp_path, '', 'STEPS = runs/x')
  assert '0x' not in str(caught.value)


def test_an_included_file_that_is_no_gin_is_a_binding_that_cannot_be_read(tmp_path):
  (tmp_path / 'broken.gin').write_text('A = [1, 2')
  include = f"include '{tmp_path}/broken.gin'"
  with pytest.raises(ValueError, match='^The binding .include .* cannot be read.*EOF'):
    parse(tmp_path, '', include)


def test_every_missing_macro_is_named_at_once(tmp_path):
  text = 'A = %gin.REQUIRED\nB = %gin.REQUIRED\nC = 1\nfakescript.train.steps = %A\n'
  with pytest.raises(ValueError, match='not set: A, B'):
    parse(tmp_path, text + 'fakescript.train.extra = %B')


@pytest.mark.parametrize('order', [1, -1])
@pytest.mark.parametrize('on_command_line', [False, True])
def test_binding_on_a_parents_method_is_refused_where_a_subclass_is_used(
  tmp_path, order, on_command_line
):
  lines = [
    'fakescript.train.model = @fakelib.Child()',
    'fakelib.Model.predict.num_decodes = 4',
  ][::order]
  text, bindings = (lines[0], [lines[1]]) if on_command_line else ('\n'.join(lines), [])
  with pytest.raises(ValueError, match='Bind (fakelib.)?Child.predict instead'):
    parse(tmp_path, text, *bindings)


def test_binding_on_the_class_in_use_reaches_an_inherited_method(tmp_path):
  parse(
    tmp_path,
    'fakescript.train.model = @fakelib.Child()\n',
    'fakelib.Child.predict.num_decodes = 4',
  )
  assert call_train()[0].predict() == 4


def test_command_line_binding_that_nothing_refers_to_is_refused(tmp_path):
  used = 'fakescript.train.model = @fakelib.Child()\n'
  # In a file it is normal: a model's file, replaced by another.
  parse(tmp_path, used + 'fakelib.Model.size = 3\n')
  gin.clear_config()
  with pytest.raises(ValueError, match='The class in use is Child'):
    parse(tmp_path, used, 'fakelib.Model.size = 3')


def test_command_line_binding_in_a_scope_that_nothing_opens_is_refused(tmp_path):
  used = 'fakescript.train.extra = @train/fakelib.optimizer()\n'
  parse(tmp_path, used, 'train/fakelib.optimizer.rate = 3.0')
  assert call_train()[2] == 3.0
  gin.clear_config()
  with pytest.raises(ValueError, match="Did you mean 'train'"):
    parse(tmp_path, used, 'trian/fakelib.optimizer.rate = 3.0')
  gin.clear_config()
  # A reference without a scope may run in any.
  parse(
    tmp_path,
    'fakescript.train.extra = @fakelib.optimizer()\n',
    'some/fakelib.optimizer.rate = 3.0',
  )


def test_includes_resolve_in_packages_wherever_one_stands(tmp_path, monkeypatch):
  (tmp_path / 'elsewhere').mkdir()
  package = tmp_path / 'site' / 'fakepackage' / 'no_init_here'
  package.mkdir(parents=True)
  (package.parent / '__init__.py').touch()
  (package / 'base.gin').write_text('A = 1\n')
  monkeypatch.syspath_prepend(tmp_path / 'site')
  monkeypatch.chdir(tmp_path / 'elsewhere')
  parse(
    tmp_path,
    "include 'fakepackage/no_init_here/base.gin'\nfakescript.train.steps = %A\n",
  )
  assert call_train()[1] == 1
  assert gin_utils.in_packages('t5x/configs/runs/pretrain.gin')
  with pytest.raises(OSError, match='Unable to open file'):
    gin_utils.parse_gin_flags([], ['fakepackage/nowhere.gin'], [])


def test_files_of_the_working_folder_come_first(tmp_path, monkeypatch):
  (tmp_path / 'gin').mkdir()
  (tmp_path / 'gin' / 'a.gin').write_text("include 'gin/b.gin'\n")
  (tmp_path / 'gin' / 'b.gin').write_text('A = 2\n')
  monkeypatch.chdir(tmp_path)
  gin_utils.parse_gin_flags([], ['gin/a.gin'], [], finalize_config=False)
  assert gin.query_parameter('A/gin.macro.value') == 2


def test_search_paths_are_added_once(tmp_path):
  (tmp_path / 'c.gin').write_text('A = 3\n')
  before = len(gin_utils.gin_config._LOCATION_PREFIXES)
  for _ in range(2):
    gin.clear_config()
    gin_utils.parse_gin_flags([str(tmp_path)], ['c.gin'], [], finalize_config=False)
  assert len(gin_utils.gin_config._LOCATION_PREFIXES) == before + 1


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


def test_show_provenance_is_not_ignored():
  with pytest.raises(ValueError, match='show_provenance'):
    gin_utils.get_gin_config_str(show_provenance=True)


def test_functions_for_gin_files():
  assert gin_utils.sum_fn(1, 2) == 3
  assert gin_utils.bool_fn('') is False
  assert gin_utils.string_split_fn('a,b,c', ',') == ['a', 'b', 'c']
  assert gin_utils.string_split_fn('a,b,c', ',', maxsplit=1, index=-1) == 'b,c'


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
    'multihost state_utils losses metrics gin_utils learning_rate '
    'optimizers adafactor train_state'
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
