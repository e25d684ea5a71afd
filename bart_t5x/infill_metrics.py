"""Denoising by generation: what a model writes where the noise took text away.

The metrics of training compare token by token, with the true text given to the decoder.
Here the decoder has its own words, so its text and the true one must be aligned first:
the words that were not masked say where a masked span begins and ends.
"""

import difflib
import re
from collections.abc import Mapping, Sequence

import numpy as np
import sacrebleu
import seqio
from jaxtyping import Int

from bart_t5x import metrics, noise

# Parts of a text: (what it says, whether it was masked away).
Parts = list[tuple[str, bool]]

# Words, and every other character that is no blank.
_WORD = re.compile(r'\w+|[^\w\s]')


def parts_of(
  ids: Int[np.ndarray, ' n'], codes: Int[np.ndarray, ' n'], vocabulary: seqio.Vocabulary
) -> Parts:
  """A target as text, in runs of copied and of masked tokens.

  Args:
    ids: the target's tokens.
    codes: what became of each, see `noise`.
    vocabulary: of the target.

  Returns:
    Its parts, in order.
  """
  flags = np.asarray(codes) == noise.INFILLED
  edges = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(ids)]
  # By the length of what is decoded up to each edge: a run alone may be decoded
  # otherwise, without the blank it begins with.
  text = vocabulary.decode(ids.tolist())
  places = [len(vocabulary.decode(ids[:edge].tolist())) for edge in edges]
  return [
    (text[begin:end], bool(flags[edge]))
    for begin, end, edge in zip(places, places[1:], edges)
    if end > begin
  ]


def keep_parts(
  text: str,
  example: Mapping[str, np.ndarray],
  is_target: bool = False,
  *,
  vocabulary: seqio.Vocabulary,
) -> str | Parts:
  """Of a target its parts, of a prediction the text; for seqio's `postprocess_fn`."""
  if not is_target:
    return text
  return parts_of(example['targets'], example['targets_noised'], vocabulary)


def denoising(targets: Sequence[Parts], predictions: Sequence[str]) -> dict[str, float]:
  """How well a denoiser gives whole texts back, and the masked spans in them.

  A span's counterpart in the generated text lies between the nearest words that were
  not masked and that an alignment (difflib's, of words) finds there again. Words of
  which the noise took a part count as masked. Spans of blanks only do not count.

  Args:
    targets: parts of the clean texts.
    predictions: generated texts, in the same order.

  Returns:
    `exact_match` and `chrf` of whole texts; `infilled_exact_match`, the share of spans
    written word by word, and `infilled_chrf`, chrF of the spans (0 where there are
    none); all from 0 to 100. `infilled_spans`, how many there were.

  Raises:
    ValueError: there is nothing to compare.
  """
  whole = metrics.reconstruction([_joined(parts) for parts in targets], predictions)
  wanted, found = [], []
  for parts, prediction in zip(targets, predictions, strict=True):
    for span, counterpart in aligned_spans(parts, prediction):
      wanted.append(span)
      found.append(counterpart)
  right = sum(a == b for a, b in zip(wanted, found, strict=True))
  return {
    **whole,
    'infilled_exact_match': 100.0 * right / max(len(wanted), 1),
    'infilled_chrf': (sacrebleu.corpus_chrf(found, [wanted]).score if wanted else 0.0),
    'infilled_spans': float(len(wanted)),
  }


def aligned_spans(parts: Parts, prediction: str) -> list[tuple[str, str]]:
  """Pairs of each masked span and what stands in its place, words between blanks."""
  words, masked = _words(parts)
  guess = _WORD.findall(prediction)
  match = difflib.SequenceMatcher(None, words, guess, autojunk=False)
  place = {}  # of copied words in the prediction
  for a, b, size in match.get_matching_blocks():
    place |= {a + i: b + i for i in range(size) if not masked[a + i]}
  spans, at = [], 0
  while at < len(words):
    if not masked[at]:
      at += 1
      continue
    begin = at
    while at < len(words) and masked[at]:
      at += 1
    before = max((p for w, p in place.items() if w < begin), default=-1)
    after = min((p for w, p in place.items() if w >= at), default=len(guess))
    spans.append((' '.join(words[begin:at]), ' '.join(guess[before + 1 : after])))
  return spans


def _joined(parts: Parts) -> str:
  return ''.join(text for text, _ in parts)


def _words(parts: Parts) -> tuple[list[str], list[bool]]:
  """The words of a text, and which of them were masked, if only in part."""
  flags = [masked for text, masked in parts for _ in text]
  words, masked = [], []
  for word in _WORD.finditer(_joined(parts)):
    words.append(word.group())
    masked.append(any(flags[word.start() : word.end()]))
  return words, masked
