"""The names that T5X's users and gin files look for in `utils`, and nothing else.

Each is defined in the module of its subject, where the runtime itself takes it from.
"""

from jax.sharding import PartitionSpec
from jaxtyping import PyTree
from seqio import TensorBoardLogger

from t5x import multihost
from t5x.checkpoints import get_local_data
from t5x.data import (
  DatasetConfig,
  EvaluatorConstructor,
  GetDatasetCallable,
  GetEvalDatasetCallable,
  get_dataset,
  get_dataset_inner,
  get_training_eval_datasets,
  get_vocabulary,
  import_module,
  round_vocab_size_to_multiple,
  verify_matching_vocabs,
)
from t5x.data_iterators import (
  ShardedDatasetIterator,
  get_zeros_batch_like_dataset,
  get_zeros_batch_like_spec,
  prepare_train_iter,
)
from t5x.gin_utils import run_main
from t5x.inference import InferFnCallable, InferStepCallable, get_infer_fn
from t5x.optimizers import LearningRateCallable, create_learning_rate_scheduler
from t5x.params_axes import override_params_axes_names
from t5x.restore import (
  CheckpointConfig,
  InitFnCallable,
  RestoreCheckpointConfig,
  SaveCheckpointConfig,
  TrainStateInitializer,
  create_checkpoint_manager_and_restore,
  create_orbax_checkpoint_manager,
  get_first_valid_restore_config_and_paths,
  log_model_info,
)
from t5x.run_setup import set_hardware_rng_ops
from t5x.state_utils import flatten_dict_string_keys

__all__ = [
  'CheckpointConfig',
  'DatasetConfig',
  'EvaluatorConstructor',
  'GetDatasetCallable',
  'GetEvalDatasetCallable',
  'InferFnCallable',
  'InferStepCallable',
  'InitFnCallable',
  'LearningRateCallable',
  'PartitionSpec',
  'PyTree',
  'RestoreCheckpointConfig',
  'SaveCheckpointConfig',
  'ShardedDatasetIterator',
  'TensorBoardLogger',
  'TrainStateInitializer',
  'create_checkpoint_manager_and_restore',
  'create_learning_rate_scheduler',
  'create_orbax_checkpoint_manager',
  'flatten_dict_string_keys',
  'get_dataset',
  'get_dataset_inner',
  'get_first_valid_restore_config_and_paths',
  'get_infer_fn',
  'get_local_data',
  'get_training_eval_datasets',
  'get_vocabulary',
  'get_zeros_batch_like_dataset',
  'get_zeros_batch_like_spec',
  'import_module',
  'log_model_info',
  'multihost_assert_equal',
  'override_params_axes_names',
  'prepare_train_iter',
  'round_vocab_size_to_multiple',
  'run_main',
  'set_hardware_rng_ops',
  'sync_global_devices',
  'verify_matching_vocabs',
]


def sync_global_devices(name: str) -> None:
  """Waits until every process has come here; `multihost.sync`."""
  multihost.sync(name)


def multihost_assert_equal(input_tree: PyTree, fail_message: str = '') -> None:
  """Checks that all processes passed equal values; `multihost.assert_same`.

  Raises:
    ValueError: they did not.
  """
  multihost.assert_same(input_tree, fail_message or 'What was passed')
