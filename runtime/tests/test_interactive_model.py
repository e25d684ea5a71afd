"""The interactive model on what the tiny training run writes."""

import gin
import jax
import numpy as np
import pytest
import seqio
import tiny

from t5x import checkpoints, interactive_model, partitioning, restore, train

EXAMPLES = [{'input': f'{n} {n + 1}', 'target': str(n + 1)} for n in range(11)]
SHAPES = {
  'encoder_input_tokens': (8, tiny.LENGTHS['inputs']),
  'decoder_input_tokens': (8, tiny.LENGTHS['targets']),
}


def make(
  output_dir, checkpoint_path='', restore_mode='specific', dtype='float32', **options
):
  return interactive_model.InteractiveModel(
    batch_size=8,
    task_feature_lengths=tiny.LENGTHS,
    output_dir=str(output_dir),
    partitioner=partitioning.PjitPartitioner(
      num_partitions=1,
      logical_axis_rules=partitioning.standard_logical_axis_rules(),
    ),
    model=tiny.make_model(),
    dtype=dtype,
    restore_mode=restore_mode,
    checkpoint_path=checkpoint_path,
    input_shapes=SHAPES,
    **options,
  )


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The folder and the last state of a training run."""
  folder = tmp_path_factory.mktemp('trained')
  _, state = train.train(**tiny.train_arguments(folder, eval_period=0))
  return folder, jax.device_get(state.state_dict())


@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
  model = make(tmp_path_factory.mktemp('fresh') / 'new')
  yield model
  model.close()


def params_of(model):
  return jax.device_get(model.train_state.params)


@pytest.mark.parametrize('mode', ['specific', 'latest'])
def test_it_reads_what_train_writes(tmp_path, trained, mode):
  folder, state = trained
  path = (
    checkpoints.get_checkpoint_dir(str(folder), 10)
    if mode == 'specific'
    else (str(folder))
  )
  model = make(tmp_path, path, mode)
  assert model.step == 10
  restored = jax.device_get(model.train_state.state_dict())
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  model.train_step(EXAMPLES)
  assert model.step == 11
  model.close()
  # Its own checkpoint comes second: the caller named another one.
  assert make(tmp_path, path, mode).step == 10
  assert make(tmp_path).step == 11


def test_options_of_its_making(tmp_path, trained):
  model = make(
    tmp_path / 'one',
    dtype='bfloat16',
    init_random_seed=1,
    input_types=dict.fromkeys(SHAPES, np.int32),
    add_eos=False,
    eval_names=['mine'],
  )
  assert model.save_checkpoint_cfg.dtype == 'bfloat16'
  assert not model.features['inputs'].add_eos
  assert model.trainer.eval_metrics_managers.keys() == {'mine'}
  other = make(tmp_path / 'two', init_random_seed=2)
  assert other.features['inputs'].add_eos
  one, two = (params_of(each)['embedding'] for each in (model, other))
  assert not np.array_equal(one, two)
  restored = make(tmp_path / 'three', str(trained[0]), 'latest', dtype='bfloat16')
  assert restored.train_state.params['embedding'].dtype == 'bfloat16'


def test_several_checkpoints_are_refused(tmp_path, trained):
  with pytest.raises(ValueError, match="Got: 'all'"):
    make(tmp_path, str(trained[0]), 'all')


def test_a_step_trains_and_saves(tmp_path):
  model = make(tmp_path)
  with pytest.raises(ValueError, match='before the first training step'):
    _ = model.train_summary
  before = params_of(model)
  model.train_step(EXAMPLES)
  assert model.step == 1
  assert checkpoints.all_steps(str(tmp_path)) == [1]
  changed = jax.tree.map(lambda a, b: np.any(a != b), before, params_of(model))
  assert all(jax.tree.leaves(changed))
  assert np.isfinite(model.train_summary['loss'].value)
  with pytest.raises(ValueError, match='3 examples / a batch of 8'):
    model.train_step(EXAMPLES[:3])
  model.trainer.stop_training = True
  model.train_step(EXAMPLES)
  assert model.step == 1
  model.close()
  again = make(tmp_path)
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(again.train_state.state_dict()),
    jax.device_get(model.train_state.state_dict()),
  )


def test_a_step_learns_from_the_examples(tmp_path):
  model = make(tmp_path)
  first = np.mean([score for _, score in model.score(EXAMPLES[:8])])
  for _ in range(3):
    model.train_step(EXAMPLES)
  last = np.mean([score for _, score in model.score(EXAMPLES[:8])])
  assert last > first
  model.close()


def expected_features(examples):
  """Model features of examples, made with seqio's parts by hand."""
  encode = tiny.VOCABULARY.encode

  def row(text, length):
    ids = np.array([*encode(text)[: length - 1], tiny.VOCABULARY.eos_id])
    return np.pad(ids, (0, length - len(ids)))

  inputs = np.stack([row(e['input'], tiny.LENGTHS['inputs']) for e in examples])
  targets = np.stack([row(e['target'], tiny.LENGTHS['targets']) for e in examples])
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': targets,
    'decoder_loss_weights': (targets != 0).astype(np.float32),
  }


def test_scores_are_those_of_the_model(fresh):
  scored = fresh.score(EXAMPLES)
  assert [f['inputs_pretokenized'].decode() for f, _ in scored] == [
    e['input'] for e in EXAMPLES
  ]
  expected = fresh.model.score_batch(params_of(fresh), expected_features(EXAMPLES))
  np.testing.assert_allclose([s for _, s in scored], expected, rtol=1e-5)


def test_predictions_are_those_of_the_model_as_text(fresh):
  texts = [example['input'] for example in EXAMPLES]
  predicted, aux = fresh.predict_with_aux(texts)
  batch = expected_features([{'input': text, 'target': ''} for text in texts])
  predict = jax.jit(fresh.model.predict_batch_with_aux)
  ids, expected_aux = predict(params_of(fresh), batch)
  expected = [tiny.VOCABULARY.decode(row.tolist()).encode() for row in np.asarray(ids)]
  assert [text for _, text in predicted] == expected
  np.testing.assert_allclose(aux['scores'], expected_aux['scores'], rtol=1e-5)


def test_options_reach_the_model(fresh):
  predicted, aux = fresh.infer_with_preprocessors(
    interactive_model.InferenceType.PREDICT_WITH_AUX,
    EXAMPLES[:3],
    [seqio.preprocessors.tokenize],
    num_decodes=2,
    return_all_decodes=True,
  )
  assert np.shape(aux['scores']) == (3, 2)
  assert all(len(texts) == 2 and isinstance(texts[0], bytes) for _, texts in predicted)
  # The examples have no end token, since no preprocessor put one there.
  assert predicted[0][0]['inputs'][-1] != tiny.VOCABULARY.eos_id
  with pytest.raises(ValueError, match="Got: 'predict'"):
    fresh.infer_with_preprocessors('predict', EXAMPLES, [])


def test_preprocessors_that_leave_no_example_are_told(fresh):
  with pytest.raises(
    ValueError, match=r'of 11 examples the preprocessors leave none\.'
  ):
    fresh.infer_with_preprocessors(
      interactive_model.InferenceType.SCORE,
      EXAMPLES,
      [seqio.preprocessors.tokenize, lambda examples: examples.take(0)],
    )


def test_compiled_steps_are_kept(fresh):
  predict = interactive_model.InferenceType.PREDICT_WITH_AUX

  def step(**options):
    return fresh._infer_fn(predict, options)

  assert step() is step()
  assert step(num_decodes=2) is step(num_decodes=2) is not step()
  # What cannot be a key is compiled anew.
  assert step(decoder_params={}) is not step(decoder_params={})
  with pytest.raises(ValueError, match='no_such'):
    step(no_such=1)


def equal_texts(targets, predictions):
  assert all(isinstance(text, str) for text in (*targets, *predictions))
  return {'count': len(targets), 'targets': targets}


def lengths_of_scores(targets, predictions, aux_values):
  return {'scores': len(aux_values['scores'])}


def mean_score(targets, scores):
  return {'mean': float(np.mean(scores))}


def test_metrics_get_what_they_name(fresh):
  metrics = fresh.evaluate(EXAMPLES, [equal_texts, lengths_of_scores, mean_score])
  assert metrics['count'] == metrics['scores'] == len(EXAMPLES)
  assert metrics['targets'] == [e['target'] for e in EXAMPLES]
  expected = np.mean([score for _, score in fresh.score(EXAMPLES)])
  assert metrics['mean'] == pytest.approx(expected)


def test_postprocessors_see_targets_and_predictions(fresh):
  seen = []

  def postprocess(text, example, is_target):
    seen.append(is_target)
    return example['inputs_pretokenized'].decode() + text

  def firsts(targets, predictions):
    return {
      'targets': targets,
      'inputs': [p[: len(t) - 1] for t, p in zip(targets, predictions, strict=True)],
    }

  metrics = fresh.evaluate_with_preprocessors(
    EXAMPLES[:3],
    [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    [firsts],
    postprocess,
  )
  assert metrics['targets'] == ['0 11', '1 22', '2 33']
  assert metrics['inputs'] == ['0 1', '1 2', '2 3']
  assert seen == [True] * 3 + [False] * 3


def test_metrics_that_do_not_fit_are_refused(fresh):
  with pytest.raises(ValueError, match=r"Got: \('targets', 'guesses'\)"):
    fresh.evaluate(EXAMPLES, [lambda targets, guesses: {}])
  with pytest.raises(ValueError, match=r"same names: \['mean'\]"):
    fresh.evaluate(EXAMPLES, [mean_score, mean_score])


def test_a_loop_trains_and_looks_every_few_steps(tmp_path):
  model = make(tmp_path)
  looked = []

  def remember(targets, scores):
    looked.append(model.step)
    return {'seen': len(targets)}

  predictions, scores, metrics = model.train_loop(
    num_steps=3,
    eval_period=2,
    train_batches=[EXAMPLES, EXAMPLES[2:]],
    predict_batches=EXAMPLES[:2],
    score_batches=[EXAMPLES[:2], EXAMPLES[:3]],
    eval_batches=EXAMPLES[:4],
    metrics_fns=[remember],
  )
  assert model.step == 3 and looked == [1, 3]
  assert (len(predictions), len(scores), metrics) == (2, 3, {'seen': 4})
  assert model.train_loop(2, predict_batches=None) == (None, None, None)
  assert model.step == 3
  model.close()


def test_the_pieces_are_reachable(fresh):
  assert fresh.trainer.train_state is fresh.train_state
  assert isinstance(fresh.partitioner, partitioning.PjitPartitioner)
  assert fresh.train_state_axes.params.keys() == fresh.train_state.params.keys()
  assert isinstance(fresh.save_checkpoint_cfg, restore.SaveCheckpointConfig)
  assert fresh.restore_checkpoint_cfg is None


def test_the_gin_file_of_a_model_is_gin(fresh, tmp_path, trained):
  restored = make(tmp_path, str(trained[0]), 'latest')
  scripts = interactive_model.T5XScriptType
  for model, script, binding in (
    (fresh, scripts.PRETRAINING, ('MODEL_DIR', fresh.output_dir)),
    (restored, scripts.FINETUNING, ('TRAIN_STEPS', 7)),
    # No step is trained behind the one that the script starts from.
    (fresh, scripts.EVALUATION, ('TRAIN_STEPS', 0)),
    (restored, scripts.EVALUATION, ('TRAIN_STEPS', 10)),
    (restored, scripts.INFERENCE, ('CHECKPOINT_PATH', str(trained[0]))),
  ):
    text = interactive_model.get_gin_config_from_interactive_model(
      model, script, 'my_task', 'PARTITIONS = 1', 'MODEL = None', train_steps=7
    )
    statements = gin.config_parser.ConfigParser(text, gin.config.ParserDelegate())
    values = {s.selector: s.value for s in statements if hasattr(s, 'value')}
    assert values[binding[0]] == binding[1]
    assert values['MIXTURE_OR_TASK_NAME'] == 'my_task'
    assert values['TASK_FEATURE_LENGTHS'] == tiny.LENGTHS
  with pytest.raises(ValueError, match='give InteractiveModel a checkpoint_path'):
    interactive_model.get_gin_config_from_interactive_model(
      fresh, scripts.INFERENCE, 'my_task', '', ''
    )
