"""Who may import whom, and how long a file and a function may be."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
RUNTIME = ROOT / 'runtime' / 'src' / 't5x'

# The runtime's levels, lowest first. A module imports from its own level or
# from a lower one, and nobody imports the facade `utils`.
LEVELS = (
  {
    'config_utils', 'gin_bindings', 'gin_utils', 'hlo_costs', 'hlo_loops', 'hlo_text',
    'jaxpr_costs',
    'lazy_arrays', 'learning_rate', 'losses', 'metrics', 'multihost', 'params_axes',
    'preemption', 'quiet', 'run_schedule', 'run_setup', 'save_schedule', 'state_utils',
    'topologies',
  },
  {'adafactor', 'factor_rules', 'optimizer_base', 'optimizers', 'train_state'},
  {'mesh', 'partitioning', 'sharding'},
  {
    'base_model', 'beams', 'best_metrics', 'checkpoint_formats', 'checkpoint_importer',
    'checkpoint_reading', 'checkpoint_utils', 'checkpoints_utils', 'data',
    'data_iterators', 'decoder_only', 'decoding', 'infer_writer', 'model_info',
    'model_metrics', 'models', 'sampling', 'task_vocabularies',
  },
  {
    'abstract_steps', 'actions', 'base_trainer', 'checkpoint_configs',
    'checkpoint_manager', 'checkpoint_retention', 'checkpoint_writing',
    'checkpoints', 'dataset_checkpoint', 'fast_imports', 'feeding',
    'health', 'inference', 'launch', 'legacy_checkpointing', 'progress', 'restore',
    'step_costs', 'summaries', 'train_step', 'trainer', 'trainer_types',
  },
  {
    'eval', 'infer', 'interactive_data', 'interactive_metrics', 'interactive_model',
    'interactive_state', 'main', 'plan_report', 'precompile',
    'step_plan', 'tfexample_task',
    'train', 'training_loop', 'utils',
  },
)  # fmt: skip

# What a module of bart_t5x may import of the project's own; a name not listed
# here is a new module, which needs a line.
ALLOWED = {
  'bart_t5x.attention': {'dropout'},
  'bart_t5x.attention_cores': {'attention', 'config', 'cudnn', 'flash', 'placement'},
  'bart_t5x.blocks': {'attention_cores', 'config', 'dropout', 'layers'},
  'bart_t5x.config': set(),
  'bart_t5x.cudnn': {'attention', 'placement'},
  'bart_t5x.documents': {'sentences', 'tokenization'},
  'bart_t5x.dropout': set(),
  'bart_t5x.features': {'noise'},
  'bart_t5x.flash': {'dropout', 'flash_kernels', 'placement'},
  'bart_t5x.flash_kernels': {'attention', 'dropout'},
  'bart_t5x.infill_metrics': {'metrics', 'noise'},
  'bart_t5x.layers': {'attention', 'dropout'},
  'bart_t5x.loss': set(),
  'bart_t5x.metrics': set(),
  'bart_t5x.model': {'features', 'loss', 'network'},
  'bart_t5x.network': {
    'attention',
    'blocks',
    'config',
    'dropout',
    'layers',
    'loss',
  },
  'bart_t5x.noise': {'spans'},
  'bart_t5x.placement': set(),
  'bart_t5x.preprocessors': {'documents', 'noise', 'sources'},
  'bart_t5x.restack': {'hf'},
  'bart_t5x.restoring': set(),
  'bart_t5x.schedules': set(),
  'bart_t5x.sentences': set(),
  'bart_t5x.sources': {'noise'},
  'bart_t5x.spans': set(),
  'bart_t5x.tokenization': set(),
  'bart_t5x.vocabularies': {'tokenization'},
}

# Linear mains: long, but read from top to bottom.
LONG_FUNCTIONS = {
  'eval.evaluate',
  'infer.infer',
  'precompile.precompile',
  'train.train',
}


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
  # __version__ and the like are no modules.
  return {name for name in names - {path.stem} if (RUNTIME / f'{name}.py').exists()}


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
  ours = {n for n in imports(path) if n.split('.')[0] in ('bart_t5x', 'tasks')}
  assert {name.split('.')[1] for name in ours} <= allowed


def test_only_the_model_and_the_bridge_know_t5x():
  for path in python_files('bart_t5x', 'tasks'):
    if path.stem != 'model' and path.parent.name != 'hf':
      t5x = {n for n in imports(path) if n.split('.')[0] == 't5x'}
      assert not t5x, f'{path} imports {t5x}'


def test_the_low_levels_import_no_tensorflow():
  for name in LEVELS[0] | LEVELS[1]:
    path = RUNTIME / f'{name}.py'
    heavy = {n for n in imports(path) if n.split('.')[0] in ('tensorflow', 'seqio')}
    assert not heavy, f'{path} imports {heavy}'


def test_gin_is_no_package():
  assert not (ROOT / 'gin' / '__init__.py').exists()  # it would hide gin-config


SOURCES = python_files('bart_t5x', 'tasks', 'runtime', 'benchmarks', 'tests')


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
  text = path.read_text()
  assert text.count('\n') <= 500, f'{path} has {text.count(chr(10))} lines, over 500'
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef):
      length = node.end_lineno - node.lineno + 1
      name = f'{path.stem}.{node.name}'
      assert length <= 60 or name in LONG_FUNCTIONS, f'{name} has {length} lines'
