"""Who may import whom, and how long a file and a function may be."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
RUNTIME = ROOT / 'runtime' / 'src' / 't5x'

# The runtime's levels, lowest first. A module imports from its own level or
# from a lower one, and nobody imports the facade `utils`.
LEVELS = (
    {'multihost', 'state_utils', 'losses', 'metrics', 'gin_utils', 'config_utils',
     'learning_rate'},
    {'optimizers', 'adafactor', 'train_state'},
    {'mesh', 'partitioning'},
    {'decoding', 'sampling', 'models', 'decoder_only', 'data', 'checkpoint_formats',
     'checkpoint_utils'},
    {'checkpoints', 'restore', 'inference', 'summaries', 'actions', 'trainer'},
    {'train', 'eval', 'infer', 'precompile', 'main', 'utils', 'interactive_model'},
)

# What a module of bart_t5x may import of the project's own; a name not listed
# here is a new module, which needs a line.
ALLOWED = {
    'bart_t5x.noise': {'bart_t5x.spans', 'bart_t5x.spans.ceil_share',
                       'bart_t5x.spans.uniform_draws'},
    'bart_t5x.spans': set(),
    'bart_t5x.layers': set(),
    'bart_t5x.sentences': set(),
    'bart_t5x.schedules': set(),
}

# Linear mains: long, but read from top to bottom.
LONG_FUNCTIONS = set()


def python_files(*folders):
  return [p for folder in folders for p in sorted((ROOT / folder).rglob('*.py'))]


def imports(path):
  """The modules that a file imports, 'a.b' for `from a import b`."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def runtime_imports(path):
  names = {name.split('.')[1] for name in imports(path) if name.startswith('t5x.')}
  return names - {path.stem}


@pytest.mark.parametrize(
    'path', sorted(RUNTIME.glob('*.py')), ids=lambda path: path.stem
)
def test_runtime_imports_run_downwards(path):
  if path.stem == '__init__':
    return
  level = [i for i, names in enumerate(LEVELS) if path.stem in names]
  assert level, f'{path.stem} has no level: add it to LEVELS'
  allowed = set().union(*LEVELS[: level[0] + 1])
  assert runtime_imports(path) <= allowed - {'utils'}


def test_runtime_knows_nothing_of_the_model():
  for path in python_files('runtime/src'):
    foreign = {n for n in imports(path) if n.split('.')[0] in ('bart_t5x', 'tasks')}
    assert not foreign, f'{path} imports {foreign}'


@pytest.mark.parametrize(('module', 'allowed'), ALLOWED.items())
def test_model_side_imports(module, allowed):
  path = ROOT / (module.replace('.', '/') + '.py')
  ours = {n for n in imports(path) if n.split('.')[0] in ('bart_t5x', 'tasks', 't5x')}
  assert ours <= allowed


def test_the_low_levels_import_no_tensorflow():
  for name in LEVELS[0] | LEVELS[1]:
    path = RUNTIME / f'{name}.py'
    heavy = {n for n in imports(path) if n.split('.')[0] in ('tensorflow', 'seqio')}
    assert not heavy, f'{path} imports {heavy}'


def test_gin_is_no_package():
  assert not (ROOT / 'gin' / '__init__.py').exists()  # it would hide gin-config


SOURCES = python_files('bart_t5x', 'tasks', 'runtime/src', 'benchmarks', 'tests')


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
  text = path.read_text()
  assert text.count('\n') <= 500, f'{path} has {text.count(chr(10))} lines, over 500'
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef):
      length = node.end_lineno - node.lineno + 1
      name = f'{path.stem}.{node.name}'
      assert length <= 60 or name in LONG_FUNCTIONS, f'{name} has {length} lines'
