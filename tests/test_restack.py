"""Conversion of checkpoints between scanned and separate layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bart_t5x import checkpoints, network, restack
from t5x import optimizers, partitioning, utils

CONFIG = network.BartConfig(
    vocab_size=30, emb_dim=8, num_heads=2, num_encoder_layers=2, num_decoder_layers=3,
    mlp_dim=8, max_positions=8, vocab_multiple_of=8,
)  # fmt: skip


def test_stack_and_unstack_by_hand():
  written_out = {
    'a': {f'layers_{i}': {'w': np.full(3, i), 'b': None} for i in range(11)},
    'other': np.zeros(2),
    'empty': {},
  }
  joined = restack.stack_layers(written_out)
  np.testing.assert_array_equal(joined['a']['layers']['w'][:, 0], np.arange(11))
  assert joined.keys() == written_out.keys() and set(joined['a']) == {'layers'}
  again = restack.unstack_layers(joined)
  assert jax.tree.structure(again) == jax.tree.structure(written_out)
  jax.tree.map(np.testing.assert_array_equal, again, written_out)


class _Run:
  """A run's state, saved and restored as by `t5x.train`."""

  def __init__(self, scan_layers):
    module = network.Transformer(dataclasses.replace(CONFIG, scan_layers=scan_layers))

    def init(rng, input_shapes, input_types):
      del input_types
      tokens = jnp.ones(input_shapes['encoder_input_tokens'], jnp.int32)
      return module.init(rng, tokens, tokens, tokens, enable_dropout=False)

    self.partitioner = partitioning.PjitPartitioner(num_partitions=2)
    self.initializer = utils.TrainStateInitializer(
      optimizers.adamw(1e-3, weight_decay=0.1),
      init,
      {'encoder_input_tokens': (8, 4)},
      self.partitioner,
    )

  def open(self, folder, path=None):
    """Returns the state restored from path, and a manager that saves into folder."""
    return utils.create_checkpoint_manager_and_restore(
      self.initializer,
      self.partitioner,
      utils.RestoreCheckpointConfig(path=str(path), mode='specific') if path else None,
      str(path) if path else None,
      jax.random.PRNGKey(0),
      save_checkpoint_cfg=utils.SaveCheckpointConfig(period=1),
      model_dir=str(folder),
      use_orbax=True,
    )


def _write(run, folder):
  """Saves a checkpoint after one optimizer step; returns its state."""
  state = run.initializer.from_scratch(jax.random.PRNGKey(3))
  gradients = jax.tree.map(lambda p: jnp.cos(3 * p), state.params)
  state = jax.jit(lambda state: state.apply_gradient(gradients, 0.1))(state)
  _, manager = run.open(folder)
  manager.save(state)
  manager.wait_until_finished()
  manager.close()
  return state


@pytest.mark.slow
def test_each_form_restores_into_the_other(tmp_path, capsys):
  before = _write(_Run(scan_layers=False), tmp_path / 'a')
  first = tmp_path / 'a/checkpoint_1'
  command = [f'--checkpoint={first}', f'--output_dir={tmp_path / "b"}']
  assert restack.main(command) == 0
  assert 'scan_layers = True' in capsys.readouterr().out
  turned = tmp_path / 'b/checkpoint_1'
  restored, _ = _Run(scan_layers=True).open(tmp_path / 'b', turned)
  assert int(restored.step) == 1
  one, other = (
    restack.unstack_layers(jax.device_get(dict(state.state_dict())))
    for state in (before, restored)
  )
  one, other = (flatten_dict(state, sep='/') for state in (one, other))
  assert one.keys() == other.keys()
  moments = [name for name in one if '/mu/' in name and 'layers_2' in name]
  assert moments
  for name, value in one.items():
    np.testing.assert_array_equal(value, other[name], err_msg=name)
  # And back.
  assert restack.main([f'--checkpoint={turned}', f'--output_dir={tmp_path / "c"}']) == 0
  jax.tree.map(
    np.testing.assert_array_equal,
    checkpoints.read_state(tmp_path / 'c/checkpoint_1'),
    checkpoints.read_state(first),
  )


def test_dataset_state_and_first_step_are_kept(make_run, tmp_path):
  run = make_run(tmp_path / 'a')
  (run.checkpoint / 'dataset').mkdir()
  (run.checkpoint / 'dataset/iterator').write_text('7')
  (run.checkpoint.parent / 'first_step.txt').write_text('3')
  output, stacked = restack.restack(run.checkpoint, tmp_path / 'b')
  assert stacked
  assert (output / 'dataset/iterator').read_text() == '7'
  assert (tmp_path / 'b/first_step.txt').read_text() == '3'


def test_bad_arguments(make_run, tmp_path, capsys):
  run = make_run(tmp_path / 'a')
  arguments = [f'--checkpoint={run.checkpoint}', f'--output_dir={run.model_dir}']
  assert restack.main(arguments) == 1
  assert 'choose another --output_dir' in capsys.readouterr().err
  missing = [f'--checkpoint={tmp_path}/checkpoint_9', f'--output_dir={tmp_path}/b']
  assert restack.main(missing) == 1
  assert 'no checkpoint in' in capsys.readouterr().err
  assert not (tmp_path / 'b').exists()
