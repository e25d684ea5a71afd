"""P22: the noise against a slow reference in plain Python, given the same draws.

The reference works on lists of elements. It shares with the implementation only the
uniform random numbers and the order in which they are used.
"""

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import tensorflow as tf
from noise_cases import IDS, MASK, VOCABULARY, corrupted, random_cases
from noise_cases import RECIPES as SHARED

from bart_t5x import noise, spans

RECIPES = {
  **SHARED,
  'half permuted': noise.Recipe(permute_ratio=0.5, infill_ratio=0),
  'half permuted, not the last': noise.Recipe(permute_ratio=0.5, permute_last=False),
  'no insertions': noise.Recipe(insertions=False),
  'a random token per token': noise.Recipe(replace_length=-1, random_ratio=0.5),
  'overlap, deleted': noise.Recipe(overlap=True, replace_length=0),
  'overlap, a mask a token': noise.Recipe(overlap=True, replace_length=-1),
  'half infilled, mean 1': noise.Recipe(infill_ratio=0.5, span_mean=1.0),
  'all infilled': noise.Recipe(infill_ratio=1.0),
  'masks': noise.Recipe(permute_ratio=0, infill_ratio=0, mask_ratio=0.15),
  'deletion': noise.Recipe(permute_ratio=0, infill_ratio=0, delete_ratio=0.15),
  'insertion': noise.Recipe(infill_ratio=0, insert_ratio=0.2, random_ratio=0.3),
  'rotation': noise.Recipe(infill_ratio=0, rotate_probability=0.5),
}


class Reference:
  """A text under noise: elements are positions from 1, or minus a new token's id."""

  def __init__(self, tokens, starts, seed, recipe):
    self.tokens, self.starts = tokens, starts
    self.seed, self.recipe = seed, recipe
    self.elements = list(range(1, len(tokens) + 1))

  def draws(self, count, stream, shift=0):
    seed = tf.constant([self.seed[0] + shift, self.seed[1] + stream], tf.int64)
    return spans.uniform_draws(count, seed).numpy()

  def share(self, ratio, count):
    return math.ceil(Fraction(str(ratio)) * count)

  def best(self, draws, count):
    return sorted(range(len(draws)), key=lambda i: (-draws[i], i))[:count]

  def permute(self):
    bounds = [*self.starts, len(self.tokens)]
    sentences = [self.elements[a:b] for a, b in itertools.pairwise(bounds)]
    movable = len(sentences) - (0 if self.recipe.permute_last else 1)
    movable = max(movable, 0)
    count = self.share(self.recipe.permute_ratio, movable)
    chosen = self.best(self.draws(movable, noise._PERMUTE), count)
    order = list(range(len(sentences)))
    for place, sentence in zip(sorted(chosen), chosen, strict=True):
      order[place] = sentence
    self.elements = [e for i in order for e in sentences[i]]

  def units(self):
    """The elements, a list for each unit."""
    if not self.recipe.whole_words:
      return [[e] for e in self.elements]
    units = []
    for e in self.elements:
      begins = IDS.word_start[self.tokens[e - 1]] or e - 1 in self.starts
      if begins:
        units.append([])
      units[-1].append(e)
    return units

  def span_lengths(self, budget, draws):
    lengths = []
    for draw in draws:
      if sum(lengths) >= budget:
        break
      length, total, term = 0, 0.0, math.exp(-self.recipe.span_mean)
      while draw >= np.float32(total + term):
        total += term
        length += 1
        term *= self.recipe.span_mean / length
      lengths.append(min(length, budget - sum(lengths)))
    if not self.recipe.insertions:
      lengths = [length for length in lengths if length]
    return lengths

  def places(self, draws, kept):
    gaps = [kept - int(np.float32(d) * np.float32(kept + 1)) for d in draws]
    return sorted(gaps)

  def infill(self):
    units = self.units()
    budget = self.share(self.recipe.infill_ratio, len(units))
    count = (2 * budget + 40) // math.floor(self.recipe.span_mean) + 1
    draws = self.draws(2 * count, noise._INFILL)
    lengths = self.span_lengths(budget, draws[:count])
    if self.recipe.overlap:
      self.infill_overlapping(units, lengths)
      return
    gaps = self.places(draws[count : count + len(lengths)], len(units) - budget)
    out, left, kept = [], list(units), 0
    for gap, length in zip(gaps, lengths, strict=True):
      while kept < gap:
        out += left.pop(0)
        kept += 1
      out += self.replacement([left.pop(0) for _ in range(length)])
    self.elements = out + [e for unit in left for e in unit]

  def replacement(self, span):
    if not span or self.recipe.replace_length == 1:
      return [-MASK]
    return [-MASK for unit in span for _ in unit] if self.recipe.replace_length else []

  def infill_overlapping(self, units, lengths):
    inserts = lengths.count(0)
    lengths = [length for length in lengths if length]
    draws = self.draws(len(units) + inserts, noise._INFILL, shift=1)
    begins = self.best(draws[: len(units)], len(lengths))
    covers = [set() for _ in units]
    for begin, length in zip(begins, lengths, strict=True):
      for unit in range(begin, min(begin + length, len(units))):
        covers[unit].add(begin)
    out = []
    for i, unit in enumerate(units):
      if not covers[i]:
        out += unit
      elif self.recipe.replace_length == -1:
        out += [-MASK] * len(unit)
      elif self.recipe.replace_length == 1:
        if self.recipe.merge_adjacent:
          leads = i == 0 or not covers[i - 1]
        else:
          leads = covers[i] == {i}
        out += [-MASK] if leads else []
    self.elements = out
    self.insert(self.places(draws[len(units) :], len(out)))

  def insert(self, gaps):
    for gap in reversed(gaps):
      self.elements.insert(gap, -MASK)

  def chosen(self, ratio, stream):
    draws = self.draws(len(self.elements), stream)
    clean = [i for i, e in enumerate(self.elements) if e > 0]
    count = self.share(ratio, len(clean))
    return {clean[i] for i in self.best([draws[i] for i in clean], count)}

  def finish(self):
    recipe = self.recipe
    if recipe.mask_ratio:
      chosen = self.chosen(recipe.mask_ratio, noise._MASK)
      self.elements = [-MASK if i in chosen else e for i, e in enumerate(self.elements)]
    if recipe.delete_ratio:
      chosen = self.chosen(recipe.delete_ratio, noise._DELETE)
      self.elements = [e for i, e in enumerate(self.elements) if i not in chosen]
    if recipe.insert_ratio:
      size = len(self.elements)
      draws = self.draws(self.share(recipe.insert_ratio, size), noise._INSERT)
      self.insert(self.places(draws, size))
    if recipe.random_ratio:
      masks = [i for i, e in enumerate(self.elements) if e == -MASK]
      draws = self.draws(2 * len(masks), noise._RANDOM).reshape(2, -1)
      for i, whether, which in zip(masks, *draws, strict=True):
        if whether < np.float32(recipe.random_ratio):
          drawn = IDS.ordinary[int(which * np.float32(len(IDS.ordinary)))]
          self.elements[i] = -int(drawn)
    if recipe.rotate_probability:
      whether, where = self.draws(2, noise._ROTATE)
      if whether < np.float32(recipe.rotate_probability):
        begin = int(where * np.float32(len(self.elements)))
        self.elements = self.elements[begin:] + self.elements[:begin]

  def noised(self):
    if self.recipe.permute_ratio:
      self.permute()
    if self.recipe.infill_ratio:
      self.infill()
    self.finish()
    return self.elements


def wanted(tokens, starts, seed, recipe, encoder_length=None):
  """What `noise.corrupt` should return, field by field."""
  room = math.inf if encoder_length is None else encoder_length - 2
  elements = Reference(tokens, starts, seed, recipe).noised()
  in_tokens = recipe.whole_words and len(elements) > room
  if in_tokens:
    finer = dataclasses.replace(recipe, whole_words=False)
    elements = Reference(tokens, starts, seed, finer).noised()
  dropped = max(len(elements) - room, 0)
  elements = elements[: len(elements) - dropped]
  source = [tokens[e - 1] if e > 0 else -e for e in elements]
  codes = [1 if i in elements else 2 for i in range(1, len(tokens) + 1)]
  return {
    'source': [1, *source, 2],
    'target': [1, *tokens, 2],
    'codes': [1, *codes, 3],
    'references': elements,
    'dropped': dropped,
    'in_tokens': in_tokens,
  }


def long_words(count):
  """Texts of about 100 tokens, most of them in one to three words."""
  random = np.random.default_rng(12)
  ordinary = np.arange(5, VOCABULARY)
  begins = ordinary[IDS.word_start[5:]]
  inside = ordinary[~IDS.word_start[5:]]
  for i in range(count):
    sizes = random.choice([1, 1, 2], 20)
    sizes[random.integers(0, 20, 3)] = random.integers(10, 35, 3)
    words = [[random.choice(begins), *random.choice(inside, n - 1)] for n in sizes]
    tokens = np.array([token for word in words for token in word])
    starts = np.unique([0, *random.integers(0, len(tokens), 4)])
    yield tokens, starts, np.array([random.integers(2**62), i])


def check(cases, recipe, eager, encoder_length=None):
  """Compares with the reference; yields the expected result of each case."""
  found = corrupted(recipe, cases, encoder_length, eager=eager)
  for case, noised in zip(cases, found, strict=True):
    want = wanted(*(part.tolist() for part in case), recipe, encoder_length)
    assert set(want) == set(noised._fields)
    for field, values in want.items():
      assert getattr(noised, field).tolist() == values, (field, case)
    yield want


in_each_mode = pytest.mark.parametrize('eager', [False, True], ids=['tf.data', 'eager'])


@in_each_mode
@pytest.mark.parametrize('name', RECIPES)
def test_p22_same_as_the_reference(name, eager):
  cases = list(random_cases(60 if eager else 160, longest=120))
  assert not any(want['dropped'] for want in check(cases, RECIPES[name], eager))


@in_each_mode
@pytest.mark.parametrize('name', ['default', 'fairseq', 'strong', 'paper'])
def test_p22_long_words_in_a_short_encoder(name, eager):
  """Texts that fit by words, by tokens only, and not at all."""
  cases = list(long_words(40 if eager else 160))
  made = list(check(cases, RECIPES[name], eager, encoder_length=74))
  kinds = {(want['in_tokens'], want['dropped'] > 0) for want in made}
  if name == 'paper':  # its units are tokens
    assert kinds == {(False, False), (False, True)}
  else:
    assert kinds == {(False, False), (True, False), (True, True)}
