"""Every field that a configuration can set has a test that it acts or raises.

FIELDS names, for each configurable, the test of each of its fields, as
`module.test` without the `test_` of both. A field without one fails here, and so does
a test that is gone.
"""

import ast
import importlib
import inspect
import pathlib

import pytest

HERE = pathlib.Path(__file__).parent

# What several configurables pass on to one place, or what every run needs.
_RUN = 'train.a_run_leaves_its_files_behind'
_CALLED = 'what_the_caller_gives_is_called'
_SAVED = 'restore.save_settings_reach_the_manager'
_BEST = 'restore.save_best_checkpointer_reaches_the_manager'
_OLD = 'restore.the_interface_from_before_orbax'
_PREFIXES = 'decoding.the_model_is_told_positions_tokens_and_prefixes'
_TOLD = 'models.what_the_decoding_function_is_told'
_FORMULA = 'learning_rate.formula'
_REFUSED = 'data.airio_fields_are_refused'
_WRITTEN = 'infer_writer.predictions_are_text_beside_the_text_they_are_of'
_LOSS = 'models.smoothing_z_loss_and_normalisation_reach_the_loss'
_READS = 'interactive_model.it_reads_what_train_writes'
_OPTIONS = 'interactive_model.options_of_its_making'
_PIECES = 'adafactor.pieces_by_hand'
_LAYOUT = 'checkpoint_manager.layout_on_disk'

_DECODER_ONLY_LOSS = 'decoder_only.the_loss_is_that_of_the_weighted_targets'
_ALL_DECODES = 'decoder_only.scores_of_decodes_are_their_log_probabilities'
_MANAGER = {
  'save_dtype': 'restore.other_managers_may_be_given',
  'restore_dtype': 'restore.restore_dtype_acts_on_parameters_only',
  'keep': 'checkpoint_manager.keep_acts',
  'keep_dataset_checkpoints': 'checkpoint_manager.keep_dataset_checkpoints_acts',
}
_BY_METRIC = {
  'metric_name_to_monitor': 'checkpoint_manager.best_checkpoints_and_the_newest_stay',
  'metric_mode': 'checkpoint_manager.best_checkpoints_and_the_newest_stay',
  'keep_checkpoints_without_metrics': (
    'checkpoint_manager.keep_checkpoints_without_metrics_acts'
  ),
  'force_keep_period': 'checkpoint_manager.force_keep_period_acts',
}
_FROM_BEFORE_ORBAX = {
  'train_state': _OLD,
  'partitioner': _OLD,
  'checkpoints_dir': _OLD,
  'dataset_iterator': _OLD,
  **_MANAGER,
}
_DECODING = {
  'inputs': 'decoding.prompts_are_kept_and_cost_nothing',
  'cache': _PREFIXES,
  'tokens_to_logits': _PREFIXES,
  'initial_index': _PREFIXES,
}

FIELDS = {
  'train.train': {
    'model': _RUN,
    'train_dataset_cfg': 'train.a_batch_that_does_not_divide_is_named',
    'train_eval_dataset_cfg': 'train.everything_happens_at_its_own_period',
    'infer_eval_dataset_cfg': 'train.everything_happens_at_its_own_period',
    'checkpoint_cfg': 'train.saving_is_what_was_asked_for',
    'partitioner': 'train.model_parallel_runs_reach_the_same_loss',
    'trainer_cls': f'train.{_CALLED}',
    'model_dir': 'train.a_model_dir_that_cannot_be_written_is_named',
    'total_steps': 'train.a_run_behind_its_end_is_an_error',
    'eval_steps': f'train.{_CALLED}',
    'eval_period': 'train.everything_happens_at_its_own_period',
    'relative_steps': 'train.relative_steps_count_from_where_the_run_began',
    'stats_period': 'train.everything_happens_at_its_own_period',
    'random_seed': 'train.without_a_seed_the_run_takes_the_clock',
    'use_hardware_rng': 'run_setup.hardware_numbers_are_used_on_request',
    'summarize_config_fn': f'train.{_CALLED}',
    'inference_evaluator_cls': f'train.{_CALLED}',
    'get_dataset_fn': f'train.{_CALLED}',
    'concurrent_metrics': 'train.actions_that_could_not_run_are_refused',
    'actions': 'train.an_action_stops_the_run_which_saves',
    'train_eval_get_dataset_fn': f'train.{_CALLED}',
    'run_eval_before_training': 'train.everything_happens_at_its_own_period',
    'train_state_initializer_cls': f'train.{_CALLED}',
    'use_orbax': 'restore.the_interface_from_before_orbax',
    'verify_matching_vocabs_fn': f'train.{_CALLED}',
    'gc_period': 'train.garbage_is_collected_by_hand_and_by_itself_again',
  },
  'eval.evaluate': {
    'model': 'eval.one_checkpoint',
    'dataset_cfg': 'eval.a_split_that_is_not_there_is_named',
    'restore_checkpoint_cfg': 'eval.all_checkpoints_once',
    'partitioner': 'eval.one_checkpoint',
    'output_dir': 'eval.one_checkpoint',
    'inference_evaluator_cls': 'eval.one_checkpoint',
    'training_evaluator_cls': 'eval.training_metrics_too',
    'summarize_config_fn': f'eval.{_CALLED}',
    'train_state_initializer_cls': f'eval.{_CALLED}',
    'train_eval_get_dataset_fn': 'eval.training_metrics_too',
    'fallback_init_rng': ('eval.parameters_that_the_checkpoint_lacks_come_from_a_seed'),
    'use_orbax': 'restore.the_interface_from_before_orbax',
  },
  'infer.infer': {
    'mode': 'infer.arguments_that_cannot_be_meant',
    'model': 'infer.scores_are_those_of_the_model',
    'dataset_cfg': 'infer.arguments_that_cannot_be_meant',
    'restore_checkpoint_cfg': 'infer.scores_are_those_of_the_model',
    'partitioner': 'infer.scores_are_those_of_the_model',
    'output_dir': 'infer.predictions_come_in_order_with_their_inputs',
    'checkpoint_period': 'infer.chunks_can_stay_apart',
    'shard_id': 'infer.shards_together_are_the_whole',
    'num_shards': 'infer.shards_together_are_the_whole',
    'merge_chunked_results': 'infer.chunks_can_stay_apart',
    'write_fn': 'infer.an_interrupted_run_goes_on_where_it_stopped',
    'checkpoint_ds_iter': 'infer.an_interrupted_run_goes_on_where_it_stopped',
    'train_state_initializer_cls': f'infer.{_CALLED}',
    'fallback_init_rng': (
      'infer.parameters_that_the_checkpoint_lacks_come_from_a_seed'
    ),
    'merge_fn': f'infer.{_CALLED}',
    'summarize_config_fn': f'infer.{_CALLED}',
    'verify_matching_vocabs_fn': f'infer.{_CALLED}',
    'output_vocab_feature_name': 'infer.the_feature_whose_vocabulary_decodes',
    'file_extension': f'infer.{_CALLED}',
    'keep_aux_as_numpy': 'inference.auxiliary_values_may_stay_arrays',
    'use_orbax': 'restore.the_interface_from_before_orbax',
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
    'precompile.its_arguments_make_the_program',
  ),
  'utils.DatasetConfig': {
    'mixture_or_task_name': 'data.bad_configs_say_what_is_wrong',
    'task_feature_lengths': 'data.trim_output_features_acts',
    'split': 'data.bad_configs_say_what_is_wrong',
    'batch_size': 'data.batch_size_must_be_positive',
    'shuffle': 'data.shuffle_acts',
    'seed': 'data.same_seed_same_batches_and_other_seed_others',
    'use_cached': 'data.use_cached_asks_for_the_cache',
    'pack': 'data.pack_acts',
    'use_custom_packing_ops': 'data.use_custom_packing_ops_reaches_the_converter',
    'module': 'data.module_is_imported',
    'use_memory_cache': 'data.memory_cache_acts',
    'trim_output_features': 'data.trim_output_features_acts',
    'runtime_preprocessors': _REFUSED,
    'num_prefetch_threads': _REFUSED,
    'num_workers': _REFUSED,
  },
  'utils.CheckpointConfig': {
    'save': 'train.saving_is_what_was_asked_for',
    'restore': 'train.two_starting_points_are_one_too_many',
  },
  'utils.SaveCheckpointConfig': {
    'dtype': 'restore.save_dtype_acts_on_parameters_only',
    'period': 'train.saving_is_what_was_asked_for',
    'checkpoint_steps': 'train.saving_is_what_was_asked_for',
    'keep': _SAVED,
    'keep_dataset_checkpoints': _SAVED,
    'save_dataset': 'restore.bad_save_configurations',
    'checkpointer_cls': 'restore.foreign_checkpointers_are_refused',
    'state_transformation_fns': 'restore.state_transformations_act_both_ways',
    'checkpoint_manager_cls': 'restore.other_managers_may_be_given',
  },
  'utils.RestoreCheckpointConfig': {
    'path': 'restore.folders_that_are_none',
    'mode': 'restore.modes',
    'assignment_map': 'restore.assignment_map_renames',
    'strict': 'restore.training_from_parameters_without_an_optimizer',
    'fallback_to_scratch': 'restore.fallback_to_scratch_initialises_what_is_dropped',
    'dtype': 'restore.restore_dtype_acts_on_parameters_only',
    'restore_dataset': 'data_iterators.saving_a_look_without_position_is_refused',
    'checkpointer_cls': 'restore.foreign_checkpointers_are_refused',
    'state_transformation_fns': 'restore.state_transformations_act_both_ways',
    'checkpoint_manager_cls': 'restore.other_managers_may_be_given',
  },
  'trainer.Trainer': {
    'model': 'trainer.training_is_plain_training',
    'train_state': 'trainer.training_is_plain_training',
    'partitioner': 'trainer.training_is_plain_training',
    'eval_names': 'trainer.evaluation_datasets_that_cannot_be',
    'summary_dir': 'trainer.a_loss_that_is_not_finite_stops_with_its_batch',
    'train_state_axes': 'trainer.training_is_plain_training',
    'rng': 'trainer.each_step_has_its_own_key',
    'learning_rate_fn': 'trainer.reports_of_a_stretch',
    'num_microbatches': 'trainer.microbatches_give_the_gradient_of_the_batch',
    'weight_metrics_computer': 'trainer.weight_metrics_are_averages_per_step',
  },
  'trainer.EarlyStoppingAction': dict.fromkeys(
    ('metric', 'mode', 'patience', 'atol', 'rtol'), 'actions.early_stopping'
  ),
  'trainer.TerminateOnNanAction': {'task': 'actions.nan', 'metric': 'actions.nan'},
  'partitioning.PjitPartitioner': {
    'num_partitions': 'mesh.num_partitions_gives_the_mesh_it_names',
    'model_parallel_submesh': 'mesh.submesh_without_a_torus',
    'params_on_devices': 'partitioning.params_on_devices_and_backend',
    'backend': 'partitioning.params_on_devices_and_backend',
    'ici_mesh_shape': 'partitioning.slices_split_the_batch_over_replica_and_data',
    'dcn_mesh_shape': 'partitioning.slices_split_the_batch_over_replica_and_data',
    'logical_axis_rules': (
      'partitioning.parameters_and_optimizer_states_lie_where_the_rules_say'
    ),
  },
  'partitioning.standard_logical_axis_rules': {
    'activation_partitioning_dims': 'partitioning.standard_rules',
    'parameter_partitioning_dims': 'partitioning.standard_rules',
    'additional_rules': 'partitioning.additional_rules_come_last',
  },
  'models.EncoderDecoderModel': {
    'module': 'models.the_module_is_called_by_its_contract',
    'input_vocabulary': 'models.vocabularies_and_decoding_function_are_properties',
    'output_vocabulary': 'models.vocabularies_and_decoding_function_are_properties',
    'optimizer_def': 'optimizers.named_optimizers_are_optax_own',
    'decode_fn': 'models.vocabularies_and_decoding_function_are_properties',
    'feature_converter_cls': 'models.what_a_subclass_overrides_is_what_is_used',
    'label_smoothing': _LOSS,
    'z_loss': _LOSS,
    'loss_normalizing_factor': _LOSS,
    'default_decoder_params': (
      'models.the_best_decode_is_returned_unless_all_are_wanted'
    ),
  },
  'models.EncoderDecoderModel.predict_batch_with_aux': {
    'params': _TOLD,
    'batch': _TOLD,
    'rng': _TOLD,
    'decoder_params': _TOLD,
    'return_all_decodes': 'models.the_best_decode_is_returned_unless_all_are_wanted',
    'num_decodes': _TOLD,
    'prompt_with_targets': _TOLD,
  },
  'models.EncoderDecoderModel.score_batch': {
    'params': 'models.a_score_is_the_sum_of_its_tokens_log_probabilities',
    'batch': 'models.a_score_is_the_sum_of_its_tokens_log_probabilities',
    'return_intermediates': 'models.a_score_comes_with_intermediates_on_request',
  },
  'models.DecoderOnlyModel': {
    'module': 'decoder_only.the_cache_is_filled_from_the_inputs',
    'vocabulary': 'decoder_only.a_converter_and_a_vocabulary_are_kept',
    'optimizer_def': 'optimizers.named_optimizers_are_optax_own',
    'decode_fn': _ALL_DECODES,
    'inputs_bidirectional_attention': 'decoder_only.a_prefix_may_be_seen_both_ways',
    'feature_converter_cls': 'decoder_only.a_converter_and_a_vocabulary_are_kept',
    'label_smoothing': 'losses.smoothing_by_hand',
    'z_loss': 'losses.by_hand',
    'loss_normalizing_factor': 'losses.weights_and_divisor',
  },
  'models.DecoderOnlyModel.predict_batch_with_aux': {
    'params': _ALL_DECODES,
    'batch': 'decoder_only.targets_are_not_looked_at',
    'rng': 'decoder_only.decoding_needs_inputs_and_one_key',
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
    'min_learning_rate': 'learning_rate.least_rate',
  },
  'decoding.beam_search': {
    **_DECODING,
    'eos_id': 'decoding.an_end_token_in_a_prompt_closes_nothing',
    'num_decodes': 'decoding.a_narrow_search_prunes_like_plain_python',
    'alpha': 'decoding.a_wide_search_finds_what_enumeration_finds',
    'max_decode_len': 'decoding.limits_of_steps_length_and_probability',
    'max_decode_step': 'decoding.limits_of_steps_length_and_probability',
    'min_log_prob': 'decoding.limits_of_steps_length_and_probability',
    'decode_rng': _TOLD,
    'cache_offset': 'beams.gathering_a_cache_keeps_its_layers_apart',
  },
  'decoding.temperature_sample': {
    **_DECODING,
    'eos_id': 'sampling.after_the_end_token_comes_padding',
    'decode_rng': 'sampling.draws_depend_on_the_key_alone',
    'num_decodes': 'sampling.decodes_of_one_example_are_independent',
    'temperature': 'sampling.sequences_are_drawn_with_the_models_probabilities',
    'topk': 'sampling.top_k_draws_from_k_tokens',
    'topp': 'sampling.reported_probabilities_with_and_without_rescaling',
    'cache_offset': 'sampling.the_cache_follows_the_rows_under_scanned_layers',
    'max_decode_steps': ('sampling.max_decode_steps_counts_from_the_end_of_the_prompt'),
    'max_decode_steps_hard_limit': 'sampling.options_may_be_traced',
    'rescale_log_probs': 'sampling.reported_probabilities_with_and_without_rescaling',
    'state_callback_fn': 'sampling.state_callbacks_may_write_tokens_and_end_rows',
    'logit_callback_fn': (
      'sampling.logit_callbacks_see_the_state_and_change_the_logits'
    ),
  },
  'adafactor.Adafactor': {
    'learning_rate': _PIECES,
    'factored': 'adafactor.factored_step_by_hand',
    'multiply_by_parameter_scale': _PIECES,
    'beta1': _PIECES,
    'decay_rate': 'adafactor.the_exponent_of_the_decay',
    'step_offset': 'adafactor.step_offset_restarts_the_decay',
    'clipping_threshold': _PIECES,
    'weight_decay_rate': _PIECES,
    'min_dim_size_to_factor': 'adafactor.factored_step_by_hand',
    'epsilon1': _PIECES,
    'epsilon2': _PIECES,
    'dtype_momentum': 'adafactor.momentum_may_be_kept_in_few_bits',
    'factor_map': 'adafactor.maps_by_path',
    'logical_factor_rules': 'adafactor.logical_rules_decide_shapes',
    'weight_decay_rate_lr_exponent': _PIECES,
    'global_norm_clip_threshold': 'adafactor.gradients_are_clipped_together',
    'max_parameter_scale': _PIECES,
    'skip_nan_updates': 'adafactor.nan_updates_can_be_skipped',
  },
  'optimizers.MultiOptimizer': {
    'traversals_and_optimizers': 'optimizers.multi_optimizer_of_adafactors'
  },
  'utils.get_training_eval_datasets': {
    'cfg': 'data.evaluation_covers_tasks_with_the_split_and_the_mixture',
    'shard_id': 'data.evaluation_deals_rows_to_hosts',
    'num_shards': 'data.evaluation_deals_rows_to_hosts',
    'eval_steps': 'data.evaluation_repeats_short_data_and_stops',
    'feature_converter_cls': (
      'data.evaluation_covers_tasks_with_the_split_and_the_mixture'
    ),
    'deterministic': 'data.deterministic_evaluation_is_refused',
    'model_dir': 'data.deterministic_evaluation_is_refused',
    'start_step': 'data.deterministic_evaluation_is_refused',
  },
  'interactive_model.InteractiveModel': {
    'batch_size': _READS,
    'task_feature_lengths': _READS,
    'output_dir': _READS,
    'partitioner': 'interactive_model.the_pieces_are_reachable',
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
    'partitioner': 'restore.a_checkpoint_is_read_on_other_meshes',
    'dataset_iterator': _LAYOUT,
    **_MANAGER,
    **_BY_METRIC,
    'period': 'checkpoint_manager.resumed_runs_save_at_the_same_steps',
    'checkpoint_steps': 'checkpoint_manager.checkpoint_steps_act',
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


def names_in(module):
  """Names of the tests in a file, without `test_`."""
  tree = ast.parse((HERE / f'test_{module}.py').read_text())
  return {
    node.name.removeprefix('test_')
    for node in tree.body
    if isinstance(node, ast.FunctionDef)
  }


@pytest.mark.parametrize('name', FIELDS)
def test_the_tests_are_there(name):
  for field, place in FIELDS[name].items():
    module, test = place.split('.')
    assert test in names_in(module), f'{name}.{field}: no {place}'
