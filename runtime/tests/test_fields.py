"""Every field that a configuration can set has a test that it acts or raises.

FIELDS names, for each configurable, the test of each of its fields, without `test_`. A
field without one fails here, and so does a test that is gone.
"""

import ast
import importlib
import inspect
import pathlib

import pytest

HERE = pathlib.Path(__file__).parent

# What several configurables pass on to one place, or what every run needs.
_RUN = 'a_run_leaves_its_files_behind'
_SAVED = 'save_settings_reach_the_manager'
_OLD = 'the_interface_from_before_orbax'
_PREFIXES = 'the_model_is_told_positions_tokens_and_prefixes'
_TOLD = 'what_the_decoding_function_is_told'
_FORMULA = 'formula'
_REFUSED = 'airio_fields_are_refused'
_LOSS = 'smoothing_z_loss_and_normalisation_reach_the_loss'
_READS = 'it_reads_what_train_writes'
_OPTIONS = 'options_of_its_making'
_PIECES = 'pieces_by_hand'
_LAYOUT = 'layout_on_disk'

_ALL_DECODES = 'scores_of_decodes_are_their_log_probabilities'
_MANAGER = {
  'save_dtype': 'other_managers_may_be_given',
  'restore_dtype': 'restore_dtype_acts_on_parameters_only',
  'keep': 'keep_acts',
  'keep_dataset_checkpoints': 'keep_dataset_checkpoints_acts',
}
_BY_METRIC = {
  'metric_name_to_monitor': 'best_checkpoints_and_the_newest_stay',
  'metric_mode': 'best_checkpoints_and_the_newest_stay',
  'keep_checkpoints_without_metrics': 'keep_checkpoints_without_metrics_acts',
  'force_keep_period': 'force_keep_period_acts',
}
_FROM_BEFORE_ORBAX = {
  'train_state': _OLD,
  'partitioner': _OLD,
  'checkpoints_dir': _OLD,
  'dataset_iterator': _OLD,
  **_MANAGER,
}
_DECODING = {
  'inputs': 'prompts_are_kept_and_cost_nothing',
  'cache': _PREFIXES,
  'tokens_to_logits': _PREFIXES,
  'initial_index': _PREFIXES,
}

FIELDS = {
  'train.train': {
    'model': _RUN,
    'train_dataset_cfg': 'a_batch_that_does_not_divide_is_named',
    'train_eval_dataset_cfg': 'everything_happens_at_its_own_period',
    'infer_eval_dataset_cfg': 'everything_happens_at_its_own_period',
    'checkpoint_cfg': 'saving_is_what_was_asked_for',
    'partitioner': 'model_parallel_runs_reach_the_same_loss',
    'trainer_cls': 'what_the_caller_of_train_gives_is_called',
    'model_dir': 'a_model_dir_that_cannot_be_written_is_named',
    'total_steps': 'a_run_behind_its_end_is_an_error',
    'eval_steps': 'what_the_caller_of_train_gives_is_called',
    'eval_period': 'everything_happens_at_its_own_period',
    'relative_steps': 'relative_steps_count_from_where_the_run_began',
    'stats_period': 'everything_happens_at_its_own_period',
    'random_seed': 'without_a_seed_the_run_takes_the_clock',
    'use_hardware_rng': 'hardware_numbers_are_used_on_request',
    'summarize_config_fn': 'what_the_caller_of_train_gives_is_called',
    'inference_evaluator_cls': 'what_the_caller_of_train_gives_is_called',
    'get_dataset_fn': 'what_the_caller_of_train_gives_is_called',
    'concurrent_metrics': 'actions_that_could_not_run_are_refused',
    'actions': 'an_action_stops_the_run_which_saves',
    'train_eval_get_dataset_fn': 'what_the_caller_of_train_gives_is_called',
    'run_eval_before_training': 'everything_happens_at_its_own_period',
    'train_state_initializer_cls': 'what_the_caller_of_train_gives_is_called',
    'use_orbax': 'the_interface_from_before_orbax',
    'verify_matching_vocabs_fn': 'what_the_caller_of_train_gives_is_called',
    'gc_period': 'garbage_is_collected_by_hand_and_by_itself_again',
  },
  'eval.evaluate': {
    'model': 'one_checkpoint',
    'dataset_cfg': 'a_split_that_is_not_there_is_named',
    'restore_checkpoint_cfg': 'all_checkpoints_once',
    'partitioner': 'one_checkpoint',
    'output_dir': 'one_checkpoint',
    'inference_evaluator_cls': 'one_checkpoint',
    'training_evaluator_cls': 'training_metrics_too',
    'summarize_config_fn': 'what_the_caller_of_eval_gives_is_called',
    'train_state_initializer_cls': 'what_the_caller_of_eval_gives_is_called',
    'train_eval_get_dataset_fn': 'training_metrics_too',
    'fallback_init_rng': 'missing_parameters_come_from_a_seed_in_eval',
    'use_orbax': 'the_interface_from_before_orbax',
  },
  'infer.infer': {
    'mode': 'arguments_that_cannot_be_meant',
    'model': 'scores_are_those_of_the_model',
    'dataset_cfg': 'arguments_that_cannot_be_meant',
    'restore_checkpoint_cfg': 'scores_are_those_of_the_model',
    'partitioner': 'scores_are_those_of_the_model',
    'output_dir': 'predictions_come_in_order_with_their_inputs',
    'checkpoint_period': 'chunks_can_stay_apart',
    'shard_id': 'shards_together_are_the_whole',
    'num_shards': 'shards_together_are_the_whole',
    'merge_chunked_results': 'chunks_can_stay_apart',
    'write_fn': 'an_interrupted_run_goes_on_where_it_stopped',
    'checkpoint_ds_iter': 'an_interrupted_run_goes_on_where_it_stopped',
    'train_state_initializer_cls': 'what_the_caller_of_infer_gives_is_called',
    'fallback_init_rng': 'missing_parameters_come_from_a_seed_in_infer',
    'merge_fn': 'what_the_caller_of_infer_gives_is_called',
    'summarize_config_fn': 'what_the_caller_of_infer_gives_is_called',
    'verify_matching_vocabs_fn': 'what_the_caller_of_infer_gives_is_called',
    'output_vocab_feature_name': 'the_feature_whose_vocabulary_decodes',
    'file_extension': 'what_the_caller_of_infer_gives_is_called',
    'keep_aux_as_numpy': 'auxiliary_values_may_stay_arrays',
    'use_orbax': 'the_interface_from_before_orbax',
  },
  'precompile.precompile': dict.fromkeys(
    (
      'model',
      'train_dataset_cfg',
      'partitioner',
      'model_dir',
      'random_seed',
      'get_dataset_fn',
      'verify_matching_vocabs_fn',
    ),
    'its_arguments_make_the_program',
  ),
  'utils.DatasetConfig': {
    'mixture_or_task_name': 'bad_configs_say_what_is_wrong',
    'task_feature_lengths': 'trim_output_features_acts',
    'split': 'bad_configs_say_what_is_wrong',
    'batch_size': 'batch_size_must_be_a_positive_whole_number',
    'shuffle': 'shuffle_acts',
    'seed': 'same_seed_same_batches_and_other_seed_others',
    'use_cached': 'use_cached_asks_for_the_cache',
    'pack': 'pack_acts',
    'use_custom_packing_ops': 'use_custom_packing_ops_reaches_the_converter',
    'module': 'module_is_imported',
    'use_memory_cache': 'memory_cache_acts',
    'trim_output_features': 'trim_output_features_acts',
    'runtime_preprocessors': _REFUSED,
    'num_prefetch_threads': _REFUSED,
    'num_workers': _REFUSED,
  },
  'utils.CheckpointConfig': {
    'save': 'saving_is_what_was_asked_for',
    'restore': 'two_starting_points_are_one_too_many',
  },
  'utils.SaveCheckpointConfig': {
    'dtype': 'save_dtype_acts_on_parameters_only',
    'period': 'saving_is_what_was_asked_for',
    'checkpoint_steps': 'saving_is_what_was_asked_for',
    'keep': _SAVED,
    'keep_dataset_checkpoints': _SAVED,
    'save_dataset': 'bad_save_configurations',
    'checkpointer_cls': 'foreign_checkpointers_are_refused',
    'state_transformation_fns': 'state_transformations_act_both_ways',
    'checkpoint_manager_cls': 'other_managers_may_be_given',
  },
  'utils.RestoreCheckpointConfig': {
    'path': 'folders_that_are_none',
    'mode': 'modes',
    'assignment_map': 'assignment_map_renames',
    'strict': 'training_from_parameters_without_an_optimizer',
    'fallback_to_scratch': 'fallback_to_scratch_initialises_what_is_dropped',
    'dtype': 'restore_dtype_acts_on_parameters_only',
    'restore_dataset': 'saving_a_look_without_position_is_refused',
    'checkpointer_cls': 'foreign_checkpointers_are_refused',
    'state_transformation_fns': 'state_transformations_act_both_ways',
    'checkpoint_manager_cls': 'other_managers_may_be_given',
  },
  'trainer.Trainer': {
    'model': 'training_is_plain_training',
    'train_state': 'training_is_plain_training',
    'partitioner': 'training_is_plain_training',
    'eval_names': 'evaluation_datasets_that_cannot_be',
    'summary_dir': 'a_loss_that_is_not_finite_stops_with_its_batch',
    'train_state_axes': 'training_is_plain_training',
    'rng': 'each_step_has_its_own_key',
    'learning_rate_fn': 'reports_of_a_stretch',
    'num_microbatches': 'microbatches_give_the_gradient_of_the_batch',
    'weight_metrics_computer': 'weight_metrics_are_averages_per_step',
  },
  'trainer.EarlyStoppingAction': dict.fromkeys(
    ('metric', 'mode', 'patience', 'atol', 'rtol'), 'early_stopping'
  ),
  'trainer.TerminateOnNanAction': {'task': 'nan', 'metric': 'nan'},
  'partitioning.PjitPartitioner': {
    'num_partitions': 'num_partitions_gives_the_mesh_it_names',
    'model_parallel_submesh': 'submesh_without_a_torus',
    'params_on_devices': 'params_on_devices_and_backend',
    'backend': 'params_on_devices_and_backend',
    'ici_mesh_shape': 'slices_split_the_batch_over_replica_and_data',
    'dcn_mesh_shape': 'slices_split_the_batch_over_replica_and_data',
    'logical_axis_rules': 'parameters_and_optimizer_states_lie_where_the_rules_say',
  },
  'partitioning.standard_logical_axis_rules': {
    'activation_partitioning_dims': 'standard_rules',
    'parameter_partitioning_dims': 'standard_rules',
    'additional_rules': 'additional_rules_come_last',
  },
  'models.EncoderDecoderModel': {
    'module': 'the_module_is_called_by_its_contract',
    'input_vocabulary': 'vocabularies_and_decoding_function_are_properties',
    'output_vocabulary': 'vocabularies_and_decoding_function_are_properties',
    'optimizer_def': 'named_optimizers_are_optax_own',
    'decode_fn': 'vocabularies_and_decoding_function_are_properties',
    'feature_converter_cls': 'what_a_subclass_overrides_is_what_is_used',
    'label_smoothing': _LOSS,
    'z_loss': _LOSS,
    'loss_normalizing_factor': _LOSS,
    'default_decoder_params': 'the_best_decode_is_returned_unless_all_are_wanted',
  },
  'models.EncoderDecoderModel.predict_batch_with_aux': {
    'params': _TOLD,
    'batch': _TOLD,
    'rng': _TOLD,
    'decoder_params': _TOLD,
    'return_all_decodes': 'the_best_decode_is_returned_unless_all_are_wanted',
    'num_decodes': _TOLD,
    'prompt_with_targets': _TOLD,
  },
  'models.EncoderDecoderModel.score_batch': {
    'params': 'a_score_is_the_sum_of_its_tokens_log_probabilities',
    'batch': 'a_score_is_the_sum_of_its_tokens_log_probabilities',
    'return_intermediates': 'a_score_comes_with_intermediates_on_request',
  },
  'models.DecoderOnlyModel': {
    'module': 'the_cache_is_filled_from_the_inputs',
    'vocabulary': 'a_converter_and_a_vocabulary_are_kept',
    'optimizer_def': 'named_optimizers_are_optax_own',
    'decode_fn': _ALL_DECODES,
    'inputs_bidirectional_attention': 'a_prefix_may_be_seen_both_ways',
    'feature_converter_cls': 'a_converter_and_a_vocabulary_are_kept',
    'label_smoothing': 'smoothing_by_hand',
    'z_loss': 'by_hand',
    'loss_normalizing_factor': 'weights_and_divisor',
  },
  'models.DecoderOnlyModel.predict_batch_with_aux': {
    'params': _ALL_DECODES,
    'batch': 'targets_are_not_looked_at',
    'rng': 'decoding_needs_inputs_and_one_key',
    'return_all_decodes': _ALL_DECODES,
    'num_decodes': _ALL_DECODES,
    'decoder_params': _ALL_DECODES,
  },
  'utils.create_learning_rate_scheduler': {
    'factors': _FORMULA,
    'base_learning_rate': _FORMULA,
    'warmup_steps': _FORMULA,
    'decay_factor': _FORMULA,
    'steps_per_decay': _FORMULA,
    'steps_per_cycle': _FORMULA,
    'step_offset': _FORMULA,
    'min_learning_rate': 'least_rate',
  },
  'decoding.beam_search': {
    **_DECODING,
    'eos_id': 'an_end_token_in_a_prompt_closes_nothing',
    'num_decodes': 'a_narrow_search_prunes_like_plain_python',
    'alpha': 'a_wide_search_finds_what_enumeration_finds',
    'max_decode_len': 'limits_of_steps_length_and_probability',
    'max_decode_step': 'limits_of_steps_length_and_probability',
    'min_log_prob': 'limits_of_steps_length_and_probability',
    'decode_rng': _TOLD,
    'cache_offset': 'gathering_a_cache_keeps_its_layers_apart',
  },
  'decoding.temperature_sample': {
    **_DECODING,
    'eos_id': 'after_the_end_token_comes_padding',
    'decode_rng': 'draws_depend_on_the_key_alone',
    'num_decodes': 'decodes_of_one_example_are_independent',
    'temperature': 'sequences_are_drawn_with_the_models_probabilities',
    'topk': 'top_k_draws_from_k_tokens',
    'topp': 'reported_probabilities_with_and_without_rescaling',
    'cache_offset': 'the_cache_follows_the_rows_under_scanned_layers',
    'max_decode_steps': 'max_decode_steps_counts_from_the_end_of_the_prompt',
    'max_decode_steps_hard_limit': 'options_may_be_traced',
    'rescale_log_probs': 'reported_probabilities_with_and_without_rescaling',
    'state_callback_fn': 'state_callbacks_may_write_tokens_and_end_rows',
    'logit_callback_fn': 'logit_callbacks_see_the_state_and_change_the_logits',
  },
  'adafactor.Adafactor': {
    'learning_rate': _PIECES,
    'factored': 'factored_step_by_hand',
    'multiply_by_parameter_scale': _PIECES,
    'beta1': _PIECES,
    'decay_rate': 'the_exponent_of_the_decay',
    'step_offset': 'step_offset_restarts_the_decay',
    'clipping_threshold': _PIECES,
    'weight_decay_rate': _PIECES,
    'min_dim_size_to_factor': 'factored_step_by_hand',
    'epsilon1': _PIECES,
    'epsilon2': _PIECES,
    'dtype_momentum': 'momentum_may_be_kept_in_few_bits',
    'factor_map': 'maps_by_path',
    'logical_factor_rules': 'logical_rules_decide_shapes',
    'weight_decay_rate_lr_exponent': _PIECES,
    'global_norm_clip_threshold': 'gradients_are_clipped_together',
    'max_parameter_scale': _PIECES,
    'skip_nan_updates': 'nan_updates_can_be_skipped',
  },
  'optimizers.MultiOptimizer': {
    'traversals_and_optimizers': 'multi_optimizer_of_adafactors'
  },
  'utils.get_training_eval_datasets': {
    'cfg': 'evaluation_covers_tasks_with_the_split_and_the_mixture',
    'shard_id': 'evaluation_deals_rows_to_hosts',
    'num_shards': 'evaluation_deals_rows_to_hosts',
    'eval_steps': 'evaluation_repeats_short_data_and_stops',
    'feature_converter_cls': 'evaluation_covers_tasks_with_the_split_and_the_mixture',
    'deterministic': 'deterministic_evaluation_is_refused',
    'model_dir': 'deterministic_evaluation_is_refused',
    'start_step': 'deterministic_evaluation_is_refused',
  },
  'interactive_model.InteractiveModel': {
    'batch_size': _READS,
    'task_feature_lengths': _READS,
    'output_dir': _READS,
    'partitioner': 'the_pieces_are_reachable',
    'model': _READS,
    'dtype': _OPTIONS,
    'restore_mode': _READS,
    'checkpoint_path': _READS,
    'input_shapes': _READS,
    'input_types': _OPTIONS,
    'init_random_seed': _OPTIONS,
    'add_eos': _OPTIONS,
    'eval_names': _OPTIONS,
  },
  'checkpoints.OrbaxCheckpointManagerInterface': {
    'directory': _LAYOUT,
    'train_state': _LAYOUT,
    'partitioner': 'a_checkpoint_is_read_on_other_meshes',
    'dataset_iterator': _LAYOUT,
    **_MANAGER,
    **_BY_METRIC,
    'period': 'resumed_runs_save_at_the_same_steps',
    'checkpoint_steps': 'checkpoint_steps_act',
  },
  'checkpoints.Checkpointer': _FROM_BEFORE_ORBAX,
  'checkpoints.SaveBestCheckpointer': {**_FROM_BEFORE_ORBAX, **_BY_METRIC},
}


def configurable(name):
  """The function or class that gin calls so, e.g. train.train."""
  module, *path = name.split('.')
  found = importlib.import_module(f't5x.{module}')
  for part in path:
    found = getattr(found, part)
  return found


@pytest.mark.parametrize('name', FIELDS)
def test_every_field_has_its_test(name):
  parameters = inspect.signature(configurable(name)).parameters
  assert {*parameters} - {'self'} == {*FIELDS[name]}


@pytest.fixture(scope='module')
def names():
  """Names of all tests here, without `test_`."""
  return {
    node.name.removeprefix('test_')
    for path in HERE.rglob('test_*.py')
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef)
  }


@pytest.mark.parametrize('name', FIELDS)
def test_the_tests_are_there(name, names):
  for field, test in FIELDS[name].items():
    assert test in names, f'{name}.{field}: there is no test_{test}'
