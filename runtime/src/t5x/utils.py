"""Names that T5X's users and gin files import from `utils`, defined elsewhere."""

# ruff: noqa: F401

from t5x.checkpoints import get_local_data
from t5x.data import (
  DatasetConfig,
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
  prepare_train_iter,
)
from t5x.inference import get_infer_fn
from t5x.optimizers import create_learning_rate_scheduler
from t5x.partitioning import override_params_axes_names
from t5x.restore import (
  CheckpointConfig,
  RestoreCheckpointConfig,
  SaveCheckpointConfig,
  TrainStateInitializer,
  create_checkpoint_manager_and_restore,
  create_orbax_checkpoint_manager,
  get_first_valid_restore_config_and_paths,
  log_model_info,
)
from t5x.state_utils import flatten_dict_string_keys
from t5x.trainer import set_hardware_rng_ops
