"""Who may import whom, and how long a file and a function may be."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
RUNTIME = ROOT / 'runtime' / 'src' / 't5x'

# The runtime's levels, lowest first ('planning.report' is t5x/planning/report.py). A
# module imports from its own level or from a lower one, and nobody imports the facade
# `utils`.
LEVELS = (
  {
    'checkpointing.lazy_arrays', 'checkpointing.save_schedule', 'config_utils',
    'gin_bindings', 'gin_utils', 'learning_rate', 'losses', 'metrics', 'multihost',
    'params_axes', 'planning.hlo_costs', 'planning.hlo_loops', 'planning.hlo_text',
    'planning.jaxpr_costs', 'planning.live_arrays', 'planning.topologies', 'quiet',
    'run_setup', 'whole_files',
    'state_utils', 'training.preemption', 'training.run_schedule',
  },
  {
    'adafactor', 'factor_rules', 'optimizer_base', 'optimizers', 'train_state',
  },
  {
    'mesh', 'partitioning', 'sharding',
  },
  {
    'base_model', 'beams', 'checkpoint_importer', 'checkpoint_utils',
    'checkpointing.best_metrics', 'checkpointing.old_layout', 'checkpointing.reading',
    'checkpoints_utils', 'data', 'data_damage', 'data_iterators', 'data_source',
    'decoder_only', 'decoding', 'infer_writer', 'model_info', 'model_metrics', 'models',
    'sampling', 'task_lookup', 'task_vocabularies',
  },
  {
    'checkpointing.configs', 'checkpointing.dataset_position',
    'checkpointing.manager', 'checkpointing.old_interface', 'checkpointing.retention',
    'checkpointing.writing', 'checkpoints', 'fast_imports', 'inference', 'launch',
    'planning.abstract_steps', 'planning.step_costs', 'restore', 'trainer',
    'training.actions', 'training.base_trainer', 'training.feeding',
    'training.health', 'training.progress', 'training.summaries',
    'training.train_step', 'training.trainer_types',
  },
  {
    'eval', 'infer', 'infer_settings', 'interactive_data', 'interactive_metrics',
    'interactive_model', 'interactive_state', 'main', 'planning.planner',
    'planning.refusal', 'planning.report', 'precompile', 'tfexample_task',
    'train', 'training.loop', 'utils',
  },
)  # fmt: skip

# What a module of bart_t5x may import of the project's own; a name not listed
# here is a new module, which needs a line.
ALLOWED = {
  'bart_t5x.attention': {'dropout'},
  'bart_t5x.attention_cores': {'attention', 'config', 'cudnn', 'flash', 'placement'},
  'bart_t5x.blocks': {'attention_cores', 'config', 'dropout', 'flash', 'layers'},
  'bart_t5x.byte_bpe': {'tensors'},
  'bart_t5x.command_line': set(),
  'bart_t5x.config': set(),
  'bart_t5x.cudnn': {'attention', 'placement'},
  'bart_t5x.documents': {'sentences', 'tokenization'},
  'bart_t5x.dropout': set(),
  'bart_t5x.features': {'tensors'},
  'bart_t5x.flash': {'dropout', 'flash_kernels', 'placement'},
  'bart_t5x.flash_kernels': {'attention', 'dropout'},
  'bart_t5x.infill_metrics': {'metrics', 'noise'},
  'bart_t5x.inspect': {
    'command_line',
    'features',
    'inspect_table',
    'noise',
    'preprocessors',
    'sources',
    'vocabularies',
  },
  'bart_t5x.inspect_table': set(),
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
  'bart_t5x.noise': {'spans', 'tensors'},
  'bart_t5x.placement': set(),
  'bart_t5x.preprocessors': {'documents', 'noise', 'sources', 'tensors'},
  'bart_t5x.restack': {'command_line', 'hf'},
  'bart_t5x.restoring': set(),
  'bart_t5x.schedules': set(),
  'bart_t5x.sentences': set(),
  'bart_t5x.sources': {'output_folder', 'tensors'},
  'bart_t5x.spans': {'tensors'},
  'bart_t5x.tensors': set(),
  'bart_t5x.tokenization': set(),
  'bart_t5x.vocabularies': {'byte_bpe', 'tensors', 'tokenization'},
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


# A name for each module of the runtime: 'train', 'planning.report'.
MODULES = {
  '.'.join(path.relative_to(RUNTIME).with_suffix('').parts): path
  for path in sorted(RUNTIME.rglob('*.py'))
  if path.stem != '__init__'
}


def runtime_imports(path):
  """Names of the runtime's modules that a file imports, or takes something from."""
  names = set()
  for dotted in imports(path):
    parts = dotted.split('.')
    if parts[0] == 't5x':
      names |= {'.'.join(parts[1:end]) for end in range(2, len(parts) + 1)}
  return names & MODULES.keys()


@pytest.mark.parametrize('name', MODULES)
def test_runtime_imports_run_downwards(name):
  level = [i for i, names in enumerate(LEVELS) if name in names]
  assert level, f'{name} has no level: add it to LEVELS'
  allowed = set().union(*LEVELS[: level[0] + 1])
  assert runtime_imports(MODULES[name]) - {name} <= allowed - {'utils'}


def test_levels_name_modules_that_are_there():
  assert set().union(*LEVELS) == MODULES.keys()
  assert sum(map(len, LEVELS)) == len(MODULES)


def test_packages_hold_no_code_of_their_own():
  """Importing a module of a package must not load the rest of it."""
  for path in RUNTIME.rglob('__init__.py'):
    assert not imports(path), f'{path} imports'
  for folder in {path.parent for path in MODULES.values()}:
    assert (folder / '__init__.py').exists(), f'{folder} would not be packaged'


def test_runtime_knows_nothing_of_the_model():
  for path in python_files('runtime/src'):
    foreign = {n for n in imports(path) if n.split('.')[0] in ('bart_t5x', 'tasks')}
    assert not foreign, f'{path} imports {foreign}'


@pytest.mark.parametrize(('module', 'allowed'), ALLOWED.items())
def test_model_side_imports(module, allowed):
  path = ROOT / (module.replace('.', '/') + '.py')
  ours = {n for n in imports(path) if n.split('.')[0] in ('bart_t5x', 'tasks')}
  assert {name.split('.')[1] for name in ours} <= allowed


def test_only_the_model_inspect_and_the_bridge_know_t5x():
  for path in python_files('bart_t5x', 'tasks'):
    # `inspect` reads gin files and bindings as the scripts do.
    if path.stem not in ('model', 'inspect') and path.parent.name != 'hf':
      t5x = {n for n in imports(path) if n.split('.')[0] == 't5x'}
      assert not t5x, f'{path} imports {t5x}'


def test_the_low_levels_import_no_tensorflow():
  for name in LEVELS[0] | LEVELS[1]:
    path = MODULES[name]
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
