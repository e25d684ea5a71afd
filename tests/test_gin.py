"""Every file in gin/ resolves, alone and with the files that may follow it."""

import pathlib
import sys

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning as flax_partitioning
from gin import config_parser

from bart_t5x import model, network, noise, schedules
from t5x import eval as eval_script
from t5x import gin_utils, launch, optimizers, partitioning
from t5x import infer as infer_script
from t5x import train as train_script

ROOT = pathlib.Path(__file__).parent.parent
GIN = ROOT / 'gin'

SCRIPTS = {
  'train': train_script.train,
  'eval': eval_script.evaluate,
  'infer': infer_script.infer,
}
# Run files, the script of each, and what a user still has to name.
RUNS = {
  'bart_base_no': ('train', ()),
  'bart_large_no': ('train', ()),
  'bart_mini_no': ('train', ()),
  'eval': ('eval', ("CHECKPOINT_PATH = 'run/checkpoint_1'",)),
  'finetune': (
    'train',
    ("MIXTURE_OR_TASK_NAME = 'norne_nb'", "INITIAL_CHECKPOINT_PATH = ''"),
  ),
  'finetune_eval': (
    'eval',
    ("MIXTURE_OR_TASK_NAME = 'norne_nb'", "CHECKPOINT_PATH = 'run/checkpoint_1'"),
  ),
  'finetune_infer': (
    'infer',
    (
      "MIXTURE_OR_TASK_NAME = 'norec'",
      "CHECKPOINT_PATH = 'run/checkpoint_1'",
      "INPUT_FILE = 'reviews.txt'",
    ),
  ),
  'infer': ('infer', ("CHECKPOINT_PATH = 'c'", "INPUT_FILE = 'sentences.txt'")),
}
# Included by run files, which define what these use.
PARTS = ('adamw',)
# Given after a run's file.
ADDITIONS = ('from_checkpoint', 'push_to_hub')
# Set by run files for model files.
FOR_A_MODEL = (
  "MIXTURE_OR_TASK_NAME = 'norwegian_denoising'",
  'MIXTURE_OR_TASK_MODULE = None',
  'OPTIMIZER = None',
  'LOSS_NORMALIZING_FACTOR = None',
  "COMPUTE_DTYPE = 'bfloat16'",
  'DROPOUT_RATE = 0.1',
)

# Name: (vocabulary, width, heads, layers on each side, MLP width, positions).
SIZES = {
  'tiny': (512, 32, 2, 1, 64, 64),
  'mini': (2000, 128, 4, 2, 512, 128),
  'base': (50265, 768, 12, 6, 3072, 1024),
  'large': (50265, 1024, 16, 12, 4096, 1024),
}
# Of facebook/bart-base and facebook/bart-large, without the buffer
# `final_logits_bias`.
PUBLISHED_PARAMETERS = {'base': 139_420_416, 'large': 406_291_456}


@pytest.fixture(autouse=True)
def clean_gin(monkeypatch):
  """The gin files call the running script `__main__`; here that is pytest."""
  for function in SCRIPTS.values():
    monkeypatch.setattr(
      sys.modules['__main__'], function.__name__, function, raising=False
    )
  gin.clear_config()
  yield
  gin.clear_config()


def parse(*names, bindings=()):
  """Reads files of gin/ as a script reads them."""
  for function in SCRIPTS.values():
    gin.configurable(function, module='__main__')
  gin_utils.parse_gin_flags(
    [str(ROOT), *launch.GIN_SEARCH_PATHS], [f'gin/{n}.gin' for n in names], bindings
  )


def configured(function):
  """A function with its bindings, which dynamic registration gives to a copy."""
  return gin.get_configurable(function)


def config_of(size):
  parse(f'models/{size}', bindings=FOR_A_MODEL)
  return configured(network.BartConfig)()


def abstract_variables(config, length=8):
  tokens = jnp.ones((2, length), jnp.int32)
  module = network.Transformer(config)
  return jax.eval_shape(lambda: module.init(jax.random.key(0), tokens, tokens, tokens))


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


# ---- All files ----


def test_every_file_is_in_this_test():
  found = {str(p.relative_to(GIN).with_suffix('')) for p in GIN.rglob('*.gin')}
  noises = {name for name in found if name.startswith('noise/')}
  models = {f'models/{size}' for size in SIZES} | {'models/bart'}
  assert found == {*RUNS, *PARTS, *ADDITIONS} | models | noises
  assert noises


@pytest.mark.parametrize('run', RUNS)
def test_runs_resolve(run):
  script, bindings = RUNS[run]
  parse(run, bindings=bindings)
  text = gin.config_str()
  assert f'{SCRIPTS[script].__name__}.model = %MODEL' in text
  # What the file refers to is callable with what is bound; data is not touched.
  partitioner = configured(partitioning.PjitPartitioner)()
  assert partitioner.logical_axis_rules


@pytest.mark.parametrize(('run', 'left_out'), [('eval', 0), ('infer', 0), ('infer', 1)])
def test_missing_macros_are_named(run, left_out):
  bindings = list(RUNS[run][1])
  name = bindings.pop(left_out).split()[0]
  with pytest.raises(ValueError, match=rf'{name}\. Set .*--gin\.{name}=VALUE'):
    parse(run, bindings=bindings)


@pytest.mark.parametrize('noise_file', sorted(p.stem for p in GIN.glob('noise/*.gin')))
@pytest.mark.parametrize('run', ['bart_base_no', 'bart_mini_no'])
def test_noise_files_follow_a_run(run, noise_file):
  parse(run, f'noise/{noise_file}')
  recipe = noise.Recipe()
  assert recipe.infill_ratio == 0.3
  assert recipe.whole_words == (noise_file in ('default', 'fairseq', 'infilling'))


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('run', RUNS)
def test_model_files_follow_a_run(run, size):
  parse(run, f'models/{size}', bindings=RUNS[run][1])
  config = configured(network.BartConfig)()
  assert config.emb_dim == SIZES[size][1]
  assert config.init_std == (0.05 if size == 'mini' else 0.02)


@pytest.mark.parametrize(
  'run', ['bart_base_no', 'bart_large_no', 'bart_mini_no', 'finetune']
)
def test_one_seed_moves_parameters_and_data(run):
  parse(run, bindings=(*RUNS[run][1], 'RANDOM_SEED = 7'))
  for parameter in ('__main__.train.random_seed', 'train/DatasetConfig.seed'):
    seed = gin.query_parameter(parameter)
    assert str(seed) == '%RANDOM_SEED', parameter


def test_one_number_of_fine_tuning_steps():
  parse('finetune', bindings=RUNS['finetune'][1])
  for parameter in ('__main__.train.relative_steps', 'linear_warmup.total_steps'):
    assert str(gin.query_parameter(parameter)) == '%TRAIN_STEPS_RELATIVE'


@pytest.mark.parametrize('run', ['bart_base_no', 'bart_mini_no', 'finetune'])
def test_push_to_hub_follows_a_run(run):
  bindings = (*RUNS[run][1], "HUB_REPO = 'org/name'")
  parse(run, 'push_to_hub', bindings=bindings)
  actions = gin.query_parameter('__main__.train.actions')
  assert list(actions) == ['TRAIN_EVAL']
  assert 'PushToHub' in str(actions['TRAIN_EVAL'][0])
  folder = gin.query_parameter('PushToHub.model_dir')
  assert str(folder) == '%MODEL_DIR'


def test_no_file_binds_a_parameter_twice():
  """The second binding would hide the first."""

  class Names(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name, evaluate):
      return scoped_configurable_name

    def macro(self, macro_name):
      return macro_name

  for path in sorted(GIN.rglob('*.gin')):
    seen = set()
    for statement in config_parser.ConfigParser(path.read_text(), Names()):
      if isinstance(statement, config_parser.BindingStatement):
        key = statement.scope, statement.selector, statement.arg_name
        assert key not in seen, f'{path}: {key}'
        seen.add(key)


# ---- Models ----


@pytest.mark.parametrize('size', SIZES)
def test_model_dimensions(size):
  config = config_of(size)
  assert (
      config.vocab_size, config.emb_dim, config.num_heads, config.num_encoder_layers,
      config.mlp_dim, config.max_positions,
  ) == SIZES[size]  # fmt: skip
  assert config.num_decoder_layers == config.num_encoder_layers
  assert config.dtype == jnp.bfloat16
  assert (
    config.dropout_rate
    == config.attention_dropout_rate
    == config.activation_dropout_rate
    == 0.1
  )


@pytest.mark.parametrize('size', PUBLISHED_PARAMETERS)
def test_parameters_are_those_of_the_published_models(size):
  config = config_of(size)
  params = abstract_variables(config)['params']
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  assert config.padded_vocab_size == 50304
  padding = (50304 - 50265) * config.emb_dim
  bias = params['final_logits_bias'].size
  assert bias == 50304
  # The two tables of positions have the 1024 + 2 rows of the published ones.
  assert count(params) == PUBLISHED_PARAMETERS[size] + padding + bias


# ---- bart_base_no ----


def test_base_learning_rate():
  parse('bart_base_no')
  schedule = configured(schedules.linear_warmup_linear_decay)()
  rates = [float(schedule(step)) for step in (0, 1000, 2000, 7000, 12000)]
  np.testing.assert_allclose(rates, [0, 5e-5, 1e-4, 5e-5, 0], rtol=1e-6, atol=1e-12)
  # The logged one is the one that acts.
  logged = gin.query_parameter('t5x.trainer.Trainer.learning_rate_fn')
  acting = gin.query_parameter('t5x.optimizers.adamw.learning_rate')
  assert logged.configurable.wrapped is acting.configurable.wrapped
  assert logged.scopes == acting.scopes


def adamw_step(params, gradients, rate, decay):
  """One first step of AdamW (Loshchilov and Hutter 2019, algorithm 2) by hand."""
  b1, b2, eps = 0.9, 0.999, 1e-8

  def step(value, gradient, decayed):
    first = (1 - b1) * gradient / (1 - b1)
    second = (1 - b2) * gradient**2 / (1 - b2)
    return value - rate * (first / (np.sqrt(second) + eps) + decay * decayed * value)

  return {
    name: step(params[name], gradients[name], float(name == 'kernel'))
    for name in params
  }


@pytest.mark.parametrize('decay', [0.0, 0.01])
def test_base_optimizer_is_adamw(decay):
  """Two steps, as the first has learning rate 0; moments do not change between."""
  bindings = (f'WEIGHT_DECAY = {decay}',) if decay else ()
  parse('bart_base_no', bindings=bindings)
  definition = configured(optimizers.adamw)()
  params = {'kernel': np.array([[0.5, -2.0]]), 'bias': np.array([1.0, 1e-3])}
  gradients = {'kernel': np.array([[3.0, -1e-4]]), 'bias': np.array([1e-9, -0.2])}
  params, gradients = jax.tree.map(np.float32, (params, gradients))
  state = definition.init_state(params)
  start, state = definition.apply_gradient({}, params, state, gradients)
  jax.tree.map(np.testing.assert_array_equal, start, params)
  end, _ = definition.apply_gradient({}, start, state, gradients)
  expected = adamw_step(params, gradients, 1e-4 / 2000, decay)
  moved = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, end, params)
  wanted = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, expected, params)
  # Float32 keeps 6e-8 of the parameter.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2.5e-7), moved, wanted
  )


def axes_used(bart, monkeypatch):
  """Logical axes of parameters, and of activations in a training step."""
  used = set()

  def record(x, axes, *rest, **kwargs):
    assert len(axes) == x.ndim, axes
    used.update(axis for axis in axes if axis is not None)
    return x

  monkeypatch.setattr(flax_partitioning, 'with_sharding_constraint', record)
  tokens = jnp.ones((8, 16), jnp.int32)
  batch = {
    f'{name}_tokens': tokens
    for name in ('encoder_input', 'decoder_input', 'decoder_target')
  }
  shapes = {name: array.shape for name, array in batch.items()}
  types = dict.fromkeys(shapes, jnp.int32)
  variables = jax.eval_shape(
    lambda: bart.get_initial_variables(jax.random.key(0), shapes, types)
  )
  for metadata in jax.tree.leaves(
    variables['params_axes'],
    is_leaf=lambda x: isinstance(x, flax_partitioning.AxisMetadata),
  ):
    used.update(metadata.names)
  gradient = jax.grad(bart.loss_fn, has_aux=True)
  jax.eval_shape(gradient, variables['params'], batch, jax.random.key(1))
  return used


@pytest.mark.parametrize('scan', [False, True])
def test_base_rules_name_every_axis(scan, monkeypatch):
  parse(
    'bart_base_no',
    bindings=(
      f'network.BartConfig.scan_layers = {scan}',
      'network.BartConfig.num_encoder_layers = 2',
      'network.BartConfig.num_decoder_layers = 2',
    ),
  )
  partitioner = configured(partitioning.PjitPartitioner)()
  rules = dict(partitioner.logical_axis_rules)
  assert len(rules) == len(partitioner.logical_axis_rules)
  used = axes_used(configured(model.BartModel)(), monkeypatch)
  assert {'batch', 'length', 'embed', 'vocab', 'mlp', 'heads'} <= used
  assert ('layers' in used) == scan
  assert used <= set(rules), used - set(rules)
  assert set(rules.values()) == {'data', 'model', None}
