"""Properties of the noise, over random texts, inside `tf.data`.

The denoising objective has 22 properties. A test named `test_p07_…`, here or in another
file, proves P7; `pytest -k p07` runs all that do.

P1   The target is the clean sequence, bit for bit, whatever the noise.
P2   Every target counts in the loss, `<s>` and `</s>` included; padding does not.
P3   The decoder sees the start token and then the targets; no padding in between.
P4   The source is `<s>` … `</s>`; no noise touches a special token.
P5   Without random tokens and permutation, the source without masks is a subsequence.
P6   The lengths drawn sum to `ceil(ratio x units)` in each example.
P7   Each span and each insertion has a mask; adjacent spans keep theirs apart.
P8   Span lengths are Poisson, by chi-square.
P9   Coverage: the ratio exactly; 0.267 at 1,022 tokens where spans may overlap.
P10  With whole words, a word is masked whole or not at all.
P11  No span crosses a document's end or a packing segment, and none is lost there.
P12  Sentences are permuted whole, in every order equally often, the last one too.
P13  The target gives the text back, white space included.
P14  Random tokens are ordinary ones, at the same rate for insertions.
P15  Noise depends on (seed, epoch, example id, piece) and on nothing else.
P16  Hosts split the data disjointly, and together read what one host reads.
P17  A run resumed anywhere continues with the same batches and losses.
P18  Shapes are static; no source outgrows its encoder; what is cut off is counted.
P19  Packed examples have the loss that they have unpacked.
P20  Devices and microbatches change neither the reported loss nor the gradient.
P21  Edge cases: empty and tiny texts, ratios of 0 and 1, invalid recipes.
P22  Given the same draws, the result is that of a plain slow reference.
"""

import collections
import dataclasses
import functools
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from noise_cases import (
  COUNT,
  IDS,
  MASK,
  NONE,
  RECIPES,
  VOCABULARY,
  corrupted,
  each,
  random_cases,
  repeated,
  span_lengths,
  words,
)

from bart_t5x import noise


@functools.cache
def noised(name):
  """Pairs of a random case and its result."""
  cases = list(random_cases(COUNT))
  return list(zip(cases, corrupted(RECIPES[name], cases), strict=True))


def all_noised():
  return itertools.chain(*(noised(name) for name in RECIPES))


def share(ratio, count):
  return math.ceil(Fraction(str(ratio)) * int(count))


def drawn_lengths(recipe, cases):
  return each(lambda *case: span_lengths(*case, recipe), cases)


def test_p01_the_target_is_the_clean_text():
  for (tokens, _, _), result in all_noised():
    assert result.target.tolist() == [1, *tokens.tolist(), 2]


def test_p04_specials_are_never_touched():
  for _, result in all_noised():
    source = result.source
    assert source[0] == 1 and source[-1] == 2
    assert not np.isin(source[1:-1], [0, 1, 2, 3]).any()
    assert result.codes[0] == noise.COPIED and result.codes[-1] == noise.END


def is_subsequence(shorter, longer):
  longer = iter(longer)
  return all(element in longer for element in shorter)


def test_p05_source_without_masks_is_a_subsequence():
  for (tokens, _, _), result in noised('plain'):
    kept = result.source[result.source != MASK].tolist()
    assert is_subsequence(kept, [1, *tokens.tolist(), 2])


def test_p06_the_budget_is_exact_in_each_example():
  for (tokens, starts, _), result in noised('paper'):
    infilled = (result.codes == noise.INFILLED).sum()
    assert infilled == share(0.3, len(tokens))
  for (tokens, starts, _), result in noised('default'):
    infilled = (result.codes[1:-1] == noise.INFILLED).tolist()
    covered = [word for word in words(tokens, starts) if infilled[word[0]]]
    assert len(covered) == share(0.3, len(words(tokens, starts)))


@pytest.mark.parametrize('field', ['mask_ratio', 'delete_ratio', 'insert_ratio'])
def test_p06_token_noise_is_exact(field):
  recipe = noise.Recipe(**{**NONE, field: 0.15})
  cases = list(random_cases(COUNT, seed=8))
  for (tokens, _, _), result in zip(cases, corrupted(recipe, cases), strict=True):
    size, count = len(tokens), share(0.15, len(tokens))
    masks = (result.source == MASK).sum()
    assert (masks, (result.references > 0).sum()) == {
      'mask_ratio': (count, size - count),
      'delete_ratio': (0, size - count),
      'insert_ratio': (count, size),
    }[field]


@pytest.mark.parametrize('random_ratio', [0.0, 0.4])
def test_p07_a_mask_for_each_span_and_each_insertion(random_ratio):
  recipe = noise.Recipe(random_ratio=random_ratio)
  cases = list(random_cases(COUNT, seed=9))
  drawn = drawn_lengths(recipe, cases)
  adjacent = 0
  for result, lengths in zip(corrupted(recipe, cases), drawn, strict=True):
    new = result.references < 0
    assert new.sum() == len(lengths)
    adjacent += (new[1:] & new[:-1]).sum()
  assert adjacent > len(cases) / 4  # they do meet, and stay apart


@pytest.mark.parametrize('overlap', [False, True])
def test_p09_coverage(overlap):
  recipe = noise.Recipe(overlap=overlap)
  cases = repeated([9] * 1022, [0], COUNT)
  codes = [result.codes for result in corrupted(recipe, cases)]
  shares = (np.array(codes) == noise.INFILLED).sum(1) / 1022
  if overlap:
    assert abs(shares.mean() - 0.267) < 0.003
  else:
    assert set(shares) == {math.ceil(0.3 * 1022) / 1022}


@pytest.mark.parametrize('name', ['default', 'fairseq'])
def test_p10_words_are_masked_whole_or_not_at_all(name):
  partly = 0
  for (tokens, starts, _), result in noised(name):
    infilled = result.codes[1:-1] == noise.INFILLED
    for word in words(tokens, starts):
      assert infilled[word].all() or not infilled[word].any()
    partly += 0 < infilled.sum() < len(tokens)
  assert partly > COUNT / 2


def test_p11_no_mask_is_lost_at_the_ends_of_a_text():
  recipe = noise.Recipe(permute_ratio=0, infill_ratio=0.7)
  cases = list(random_cases(COUNT, seed=10))
  drawn = drawn_lengths(recipe, cases)
  both = 0
  for result, lengths in zip(corrupted(recipe, cases), drawn, strict=True):
    infilled = result.codes[1:-1] == noise.INFILLED
    if len(infilled) and infilled[0] and infilled[-1]:
      both += 1
      assert result.references[0] < 0 and result.references[-1] < 0
      assert (result.references < 0).sum() == len(lengths)
  assert both > COUNT / 4


def test_p12_permutation_keeps_sentences_whole():
  recipe = noise.Recipe(infill_ratio=0)
  cases = list(random_cases(COUNT, seed=11, longest=200))
  moved = 0
  for (tokens, starts, _), result in zip(cases, corrupted(recipe, cases), strict=True):
    refs = (result.references - 1).tolist()
    assert sorted(refs) == list(range(len(tokens)))
    moved += refs != sorted(refs)
    sentences = {a: b for a, b in itertools.pairwise([*starts.tolist(), len(tokens)])}
    at = 0
    while at < len(refs):
      begin = refs[at]
      size = sentences.pop(begin) - begin
      assert refs[at : at + size] == list(range(begin, begin + size))
      at += size
    assert not sentences
    assert (result.codes == noise.INFILLED).sum() == 0
  assert moved > len(cases) / 2


@pytest.mark.parametrize('last', [True, False])
def test_p12_all_orders_occur_equally_often(last):
  recipe = noise.Recipe(infill_ratio=0, permute_last=last)
  cases = repeated([10, 11, 20, 30, 31, 40], [0, 2, 3, 5], 3 * COUNT)
  orders = collections.Counter(
    tuple(t // 10 for t in result.source if t in (10, 20, 30, 40))
    for result in corrupted(recipe, cases)
  )
  if not last:
    assert {order[-1] for order in orders} == {4}
  assert len(orders) == (24 if last else 6)
  assert scipy.stats.chisquare(list(orders.values())).pvalue > 1e-3


def test_p14_random_tokens_are_ordinary():
  ordinary = np.array([7, 8, 9, 300], np.int32)
  ids = dataclasses.replace(IDS, ordinary=ordinary)
  recipe = noise.Recipe(random_ratio=1.0, insert_ratio=0.2)
  cases = repeated(range(100, 200), [0], COUNT)
  seen = collections.Counter()
  for result in corrupted(recipe, cases, ids=ids):
    seen.update((-result.references[result.references < 0]).tolist())
  assert set(seen) == set(ordinary.tolist())
  assert scipy.stats.chisquare(list(seen.values())).pvalue > 1e-3


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'span_mean': 1.0},  # a third are insertions
    {'infill_ratio': 0, 'insert_ratio': 0.3},
    {'overlap': True},
  ],
  ids=str,
)
def test_p14_the_rate_holds_for_insertions_too(fields):
  cases = repeated([9] * 300, [0], COUNT)
  recipe = noise.Recipe(random_ratio=0.1, **fields)
  refs = np.concatenate([r.references for r in corrupted(recipe, cases)])
  new = (refs < 0).sum()
  random = new - (refs == -MASK).sum()
  assert abs(random / new - 0.1) < 4 * math.sqrt(0.09 / new)


def test_p15_noise_follows_the_seed():
  cases = [case for case in random_cases(COUNT) if len(case[0]) > 40]
  others = [(t, s, seed + [0, 2**32]) for t, s, seed in cases]
  first, again, other = (
    [r.source.tolist() for r in corrupted(RECIPES['paper'], c)]
    for c in (cases, cases[::-1], others)
  )
  assert first == again[::-1]
  assert not any(a == b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize('room', [3, 60, 200])
def test_p18_source_fits_its_length(room):
  recipe = noise.Recipe(insert_ratio=0.3)
  cases = repeated(range(100, 190), range(0, 90, 25), COUNT // 5)
  cut, whole = (corrupted(recipe, cases, length) for length in (room, None))
  for a, b in zip(cut, whole, strict=True):
    assert len(a.source) == min(room, len(b.source))
    assert a.source[-1] == 2 and a.source[0] == 1
    assert a.dropped == len(b.source) - len(a.source)
    # What was cut off cannot be copied.
    assert (a.codes == noise.COPIED).sum() - 1 == (a.references > 0).sum()


@pytest.mark.parametrize('length', [64, 1024])
@pytest.mark.parametrize('name', ['paper', 'hf_compat', 'a mask a token', 'deleting'])
def test_p18_longest_source_is_estimated(name, length):
  longest = noise.longest_source(RECIPES[name], length)
  cases = repeated([5] * (length - 2), range(0, length - 2, 20), 2000, stream=9)
  lengths = [len(r.source) for r in corrupted(RECIPES[name], cases)]
  assert max(lengths) <= longest < max(lengths) + 0.02 * length + 4


@pytest.mark.parametrize('name', ['default', 'fairseq'])
def test_p18_texts_with_long_words_get_spans_of_tokens(name):
  # One word of 400 tokens among 110 of one token each.
  tokens = np.array([7] * 55 + [8] + [9] * 399 + [7] * 55, np.int32)
  begins = np.zeros(VOCABULARY, bool)
  begins[[7, 8]] = True
  ids = dataclasses.replace(IDS, word_start=begins)
  cases = repeated(tokens, [0], COUNT // 2)
  recipe = RECIPES[name]
  room = noise.longest_source(recipe, 512)
  finer = dataclasses.replace(recipe, whole_words=False)
  by_words, by_tokens = (corrupted(r, cases, ids=ids) for r in (recipe, finer))
  made = corrupted(recipe, cases, room, ids)

  def lengths_of(*case):
    in_tokens = noise.corrupt(*case, recipe, ids, room).in_tokens
    return span_lengths(*case, recipe, ids, in_tokens)

  drawn = each(lengths_of, cases)
  for result, words_, tokens_, lengths in zip(
    made, by_words, by_tokens, drawn, strict=True
  ):
    assert len(result.source) <= room and result.dropped == 0
    assert result.in_tokens == (len(words_.source) > room)
    want = tokens_ if result.in_tokens else words_
    np.testing.assert_array_equal(result.source, want.source)
    assert lengths.sum() == share(0.3, 510 if result.in_tokens else 111)
  assert 0 < sum(result.in_tokens for result in made) < len(made)


@pytest.mark.parametrize('name', RECIPES)
def test_p21_empty_and_tiny_texts(name):
  empty = corrupted(RECIPES[name], repeated([], [], 1))[0]
  assert empty.source.tolist() == empty.target.tolist() == [1, 2]
  assert empty.codes.tolist() == [noise.COPIED, noise.END]
  for size in (1, 2, 3):
    cases = repeated(range(9, 9 + size), [0], COUNT // 50, stream=2)
    for result in corrupted(RECIPES[name], cases):
      assert result.target.tolist() == [1, *range(9, 9 + size), 2]
      assert result.source[0] == 1 and result.source[-1] == 2


@pytest.mark.parametrize(
  'field',
  [
    field.name
    for field in dataclasses.fields(noise.Recipe)
    if field.name.endswith(('_ratio', '_probability'))
  ],
)
def test_p21_ratios_of_nothing_and_of_everything(field):
  text = list(range(10, 60))
  cases = repeated(text, [0, 20, 40], 5)
  for result in corrupted(noise.Recipe(**{**NONE, field: 0.0}), cases):
    assert result.source.tolist() == result.target.tolist()
  for result in corrupted(noise.Recipe(**{**NONE, field: 1.0}), cases):
    inner = result.source[1:-1].tolist()
    if field == 'mask_ratio':
      assert inner == [MASK] * 50
    elif field == 'delete_ratio':
      assert inner == []
    elif field == 'insert_ratio':
      assert inner.count(MASK) == 50 and is_subsequence(text, inner)
    elif field == 'infill_ratio':
      assert set(inner) == {MASK} and (result.codes[1:-1] == noise.INFILLED).all()
    else:
      assert sorted(inner) == text


def test_rotation_begins_anywhere():
  recipe = noise.Recipe(**NONE | {'rotate_probability': 1.0})
  text = list(range(10, 20))
  begins = collections.Counter()
  for result in corrupted(recipe, repeated(text, [0], COUNT)):
    inner = result.source[1:-1].tolist()
    begin = inner[0] - 10
    assert inner == text[begin:] + text[:begin]
    begins[begin] += 1
  assert len(begins) == 10
  assert scipy.stats.chisquare(list(begins.values())).pvalue > 1e-3


@pytest.mark.parametrize('field', ['mask_ratio', 'delete_ratio', 'insert_ratio'])
def test_token_noise_falls_anywhere(field):
  """Each of ten tokens, or eleven gaps, as often as any other."""
  recipe = noise.Recipe(**{**NONE, field: 0.1})
  cases = repeated(range(10, 20), [0], 3 * COUNT)
  places = collections.Counter()
  for result in corrupted(recipe, cases):
    refs = result.references.tolist()
    if field == 'delete_ratio':
      places.update(set(range(1, 11)) - set(refs))
    else:
      places[refs.index(-MASK)] += 1
  assert len(places) == (11 if field == 'insert_ratio' else 10)
  assert scipy.stats.chisquare(list(places.values())).pvalue > 1e-3


@pytest.mark.parametrize('overlap', [False, True])
def test_spans_fall_anywhere(overlap):
  """A budget of one token: its place is uniform."""
  recipe = noise.Recipe(**NONE | {'infill_ratio': 0.05, 'overlap': overlap})
  cases = repeated(range(10, 20), [0], COUNT)
  places = collections.Counter()
  for result in corrupted(recipe, cases):
    places.update(np.flatnonzero(result.codes[1:-1] == noise.INFILLED).tolist())
  assert sum(places.values()) == len(cases)
  assert len(places) == 10
  assert scipy.stats.chisquare(list(places.values())).pvalue > 1e-3


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('span_mean', 0.9),
    ('infill_ratio', 1.1),
    ('rotate_probability', -0.1),
    ('replace_length', 2),
    ('merge_adjacent', True),
  ],
)
def test_p21_invalid_recipes(field, value):
  with pytest.raises(ValueError, match=field):
    noise.Recipe(**{field: value})
