"""The base run, reduced by gin bindings, on eight devices."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.slow

STEPS = 4
# Fewer layers, a smaller vocabulary, and fewer and shorter rows; widths, heads,
# optimizer, dropout, dtypes and partitioning rules are those of the file.
CUT = {
  'network.BartConfig.vocab_size': 512,
  'network.BartConfig.num_encoder_layers': 1,
  'network.BartConfig.num_decoder_layers': 1,
  'TASK_FEATURE_LENGTHS': {'inputs': 64, 'targets': 64},
  'BATCH_SIZE': 16,
  'LOSS_NORMALIZING_FACTOR': 16 * 64,
  'TRAIN_STEPS': STEPS,
  'WARMUP_STEPS': 1,
  'train.stats_period': 1,
  'train.eval_period': STEPS,
  'train.eval_steps': 1,
  # 200 MB per checkpoint; saving is tested elsewhere.
  'utils.SaveCheckpointConfig.period': None,
}


def test_trains_on_eight_devices(call_script, helpers, in_process_task, tmp_path):
  from t5x import train as script

  assert jax.device_count() == 8
  changes = {
    **CUT,
    'MIXTURE_OR_TASK_NAME': in_process_task,
    'MODEL_DIR': str(tmp_path / 'run'),
    'partitioning.PjitPartitioner.num_partitions': 2,
  }
  outcome = call_script(script.train, ['gin/bart_base_no.gin'], changes)
  assert outcome.code == 0, outcome.text
  step, state = outcome.result
  assert step == STEPS

  mlp = state.params['encoder']['layers_0']['mlp']['wi']['kernel']
  assert (mlp.shape, mlp.dtype) == ((768, 3072), np.float32)
  assert len(mlp.sharding.device_set) == 8
  assert mlp.sharding.shard_shape(mlp.shape) == (768, 3072 // 2)
  table = state.params['token_embedder']['embedding']
  assert table.sharding.shard_shape(table.shape) == (512 // 2, 768)

  found = helpers.scalars(tmp_path / 'run' / 'train')
  assert sorted(found) == [1, 2, 3, 4]
  values = [found[step] for step in sorted(found)]
  # Worse than chance at first, as tied embeddings of width 768 repeat the input token.
  assert values[0] > np.log(512)
  assert np.isfinite(values).all()
