"""The feature converter: its features, and packing by first fit."""

import collections

import numpy as np
import pytest
import seqio
import tensorflow as tf

from bart_t5x import features
from bart_t5x.features import BartFeatureConverter


def examples(count, longest=40, seed=3, noised=True):
  """Examples whose tokens are all different, so that each slot can be traced."""
  random = np.random.default_rng(seed)
  made, token = [], 10
  for _ in range(count):
    size = int(random.integers(2, longest))
    targets = np.arange(token, token + size, dtype=np.int32)
    inputs = targets[random.random(size) < 0.8]
    codes = random.integers(1, 4, size).astype(np.int32)
    token += size
    made.append({'inputs': inputs, 'targets': targets})
    if noised:
      made[-1]['targets_noised'] = codes
  return made


def dataset(made):
  spec = {k: tf.TensorSpec([None], tf.int32) for k in made[0]}
  return tf.data.Dataset.from_generator(lambda: iter(made), output_signature=spec)


def converted(made, lengths, pack=True, converter=BartFeatureConverter):
  ds = converter(pack=pack)(dataset(made), lengths)
  return list(ds.as_numpy_iterator())


def unpacked(rows):
  """The examples in the rows, by their first target token."""
  found = {}
  for row in rows:
    for segment in range(1, row['decoder_segment_ids'].max() + 1):
      at = {s: row[f'{s}_segment_ids'] == segment for s in ('encoder', 'decoder')}
      example = {
        'inputs': row['encoder_input_tokens'][at['encoder']],
        'targets': row['decoder_target_tokens'][at['decoder']],
        'positions': row['decoder_positions'][at['decoder']],
        'encoder_positions': row['encoder_positions'][at['encoder']],
      }
      if 'decoder_targets_noised' in row:
        example['codes'] = row['decoder_targets_noised'][at['decoder']]
      assert example['targets'][0] not in found
      found[int(example['targets'][0])] = example
  return found


@pytest.mark.parametrize('noised', [True, False])
@pytest.mark.parametrize(('count', 'window'), [(1, 4), (7, 4), (200, 4), (200, 64)])
def test_packing_loses_and_mixes_nothing(count, window, noised, monkeypatch):
  monkeypatch.setattr(features, 'WINDOW', window)
  made = examples(count, noised=noised)
  rows = converted(made, {'inputs': 64, 'targets': 64})
  found = unpacked(rows)
  assert len(found) == count
  for example in made:
    got = found[int(example['targets'][0])]
    size = len(example['targets'])
    np.testing.assert_array_equal(got['inputs'], example['inputs'])
    np.testing.assert_array_equal(got['targets'], example['targets'])
    np.testing.assert_array_equal(got['positions'], np.arange(size))
    np.testing.assert_array_equal(
      got['encoder_positions'], np.arange(len(example['inputs']))
    )
    if noised:
      np.testing.assert_array_equal(got['codes'], example['targets_noised'])


@pytest.mark.parametrize('pack', [True, False])
def test_p02_every_target_counts_and_padding_does_not(pack):
  seen = 0
  for row in converted(examples(1500), {'inputs': 64, 'targets': 64}, pack):
    real = row['decoder_target_tokens'] != 0
    np.testing.assert_array_equal(row['decoder_loss_weights'], real)
    np.testing.assert_array_equal(row['decoder_targets_noised'] != 0, real)
    seen += real.sum()
  assert seen == sum(len(example['targets']) for example in examples(1500))


@pytest.mark.parametrize('pack', [True, False])
def test_p03_the_decoder_sees_the_start_and_then_the_targets(pack):
  begun = 0
  for row in converted(examples(1500), {'inputs': 64, 'targets': 64}, pack):
    targets = row['decoder_target_tokens']
    size = np.count_nonzero(targets)
    assert (targets[:size] != 0).all()  # no padding inside
    positions = row['decoder_positions'][:size] if pack else np.arange(size)
    previous = np.concatenate([[0], targets[: size - 1]])
    want = np.where(positions == 0, 0, previous)
    np.testing.assert_array_equal(row['decoder_input_tokens'][:size], want)
    begun += (positions == 0).sum()
  assert begun == 1500


@pytest.mark.parametrize('pack', [True, False])
def test_p18_shapes_are_static(pack):
  lengths = {'inputs': 48, 'targets': 64}
  ds = BartFeatureConverter(pack=pack)(dataset(examples(20)), lengths)
  for name, spec in ds.element_spec.items():
    assert spec.shape == [48 if name.startswith('encoder') else 64], name
    assert spec.dtype == tf.int32


@pytest.mark.parametrize('noised', [True, False])
def test_codes_are_the_only_addition_to_seqio(noised):
  made = examples(50, noised=noised)
  lengths = {'inputs': 64, 'targets': 64}
  ours = converted(made, lengths, pack=False)
  stock = converted(made, lengths, False, seqio.EncDecFeatureConverter)
  for a, b in zip(ours, stock, strict=True):
    assert set(a) - set(b) == ({'decoder_targets_noised'} if noised else set())
    for name in b:
      np.testing.assert_array_equal(a[name], b[name])
  packed = BartFeatureConverter(pack=True)(dataset(made), lengths).element_spec
  stock = seqio.EncDecFeatureConverter(pack=True)(dataset(made), lengths).element_spec
  assert {name: packed[name] for name in stock} == stock


def first_fit(sizes, caps):
  """The plain algorithm: rows of (used inputs, used targets, examples)."""
  rows = []
  for i, size in enumerate(sizes):
    for row in rows:
      if all(u + s <= c for u, s, c in zip(row[0], size, caps, strict=True)):
        break
    else:
      row = ([0, 0], [])
      rows.append(row)
    row[0][0] += size[0]
    row[0][1] += size[1]
    row[1].append(i)
  return [row[1] for row in rows]


def test_same_as_plain_first_fit():
  made = examples(300, longest=60)
  lengths = {'inputs': 54, 'targets': 64}
  firsts = {int(e['targets'][0]): i for i, e in enumerate(made)}
  rows = features.pack_first_fit(
    dataset(made), {**lengths, 'targets_noised': 64}, window=300, open_rows=1000
  )
  got = []
  for row in rows.as_numpy_iterator():
    begins = row['targets'][(row['targets_positions'] == 0) & (row['targets'] > 0)]
    got.append([firsts[int(token)] for token in begins])
  sizes = [(len(e['inputs']), len(e['targets'])) for e in made]
  assert got == first_fit(sizes, (54, 64))


def test_rows_close_in_order():
  # 40 and 30 do not fit together: with two open rows the third closes the first.
  made = [
    {'inputs': np.ones(1, np.int32), 'targets': np.full(n, n, np.int32)}
    for n in (40, 41, 42, 10, 11)
  ]
  rows = features.pack_first_fit(
    dataset(made), {'inputs': 64, 'targets': 64}, window=1, open_rows=2
  )
  got = [collections.Counter(r['targets'].tolist()) for r in rows.as_numpy_iterator()]
  assert got == [{40: 40, 0: 24}, {41: 41, 10: 10, 11: 11, 0: 2}, {42: 42, 0: 22}]


@pytest.mark.parametrize(('mean', 'spread'), [(3.3, 0.6), (5.0, 0.8), (5.5, 1.0)])
def test_rows_are_97_percent_full(mean, spread):
  sizes = np.exp(np.random.default_rng(1).normal(mean, spread, 3000))
  ones = [np.ones(int(size), np.int32) for size in np.clip(sizes, 4, 1024)]
  made = [{'inputs': one[: int(len(one) * 0.82)], 'targets': one} for one in ones]
  rows = features.pack_first_fit(
    dataset(made),
    {'inputs': 1024, 'targets': 1024},
    features.WINDOW,
    features.OPEN_ROWS,
  )
  full = [(row['targets'] > 0).mean() for row in rows.as_numpy_iterator()]
  # The last rows may be less full.
  assert np.mean(full[:-2]) > 0.97


def test_examples_longer_than_the_rows_raise():
  pattern = 'targets are longer than TASK_FEATURE_LENGTHS.* = 16'
  with pytest.raises(tf.errors.InvalidArgumentError, match=pattern):
    converted(examples(20), {'inputs': 64, 'targets': 16})


def test_codes_of_another_length_raise():
  made = examples(20)
  made[7]['targets_noised'] = made[7]['targets_noised'][1:]
  with pytest.raises(tf.errors.InvalidArgumentError, match='same length'):
    converted(made, {'inputs': 64, 'targets': 64})


def test_an_empty_dataset_gives_no_rows():
  made = examples(1)
  ds = dataset(made).take(0)
  rows = BartFeatureConverter(pack=True)(ds, {'inputs': 64, 'targets': 64})
  assert list(rows) == []
