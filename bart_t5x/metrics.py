"""Metrics of generated text, under seqio's `metric_fn` interface."""

import collections
import difflib
import importlib
import re
import string
import types
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import sacrebleu
import seqio
from jaxtyping import Int

from bart_t5x import noise


def _needs(module: str, package: str) -> Callable[[Callable], Callable]:
  """Marks a metric as one that needs a library of its own, which others do without."""

  def mark(metric_fn):
    metric_fn.needs = (module, package)
    return metric_fn

  return mark


def check_libraries(metric_fns: Sequence[Callable]) -> None:
  """Finds out before a run, not after its first steps, what its metrics lack.

  Args:
    metric_fns: of a task; of this module, or of anywhere.

  Raises:
    ImportError: a library that one of them needs is not installed.
  """
  for metric_fn in metric_fns:
    needs = getattr(getattr(metric_fn, 'func', metric_fn), 'needs', None)
    if needs:
      _library(*needs)


def reconstruction(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """How well a denoiser gives whole texts back.

  Args:
    targets: clean texts.
    predictions: generated texts, in the same order.

  Returns:
    `exact_match`, the share of texts given back letter by letter, and `chrf`
    (Popović 2015, as sacrebleu computes it), both from 0 to 100.

  Raises:
    ValueError: there is nothing to compare.
  """
  if not targets:
    raise ValueError('no examples to evaluate: the split is empty')
  same = sum(t == p for t, p in zip(targets, predictions, strict=True))
  return {
    'exact_match': 100.0 * same / len(targets),
    'chrf': sacrebleu.corpus_chrf(list(predictions), [list(targets)]).score,
  }


@_needs('sklearn.metrics', 'scikit-learn')
def classification(
  targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str] = ()
) -> dict[str, float]:
  """Scores of generated class names.

  A text that is no label is wrong, whatever it says; it is a class of its own for
  MCC and none for macro F1.

  Args:
    targets: labels.
    predictions: generated texts, in the same order.
    labels: all classes; empty for those in `targets`.

  Returns:
    `accuracy`, `macro_f1` (the unweighted mean of F1 over `labels`), `mcc` (Matthews'
    correlation, times 100, so from -100) and `unknown_labels`, the share of generated
    texts that are no label; all in per cent. By scikit-learn.

  Raises:
    ImportError: scikit-learn is not installed.
    ValueError: there is nothing to compare, or a target is no label.
  """
  sklearn_metrics = _library(*classification.needs)
  _check_pairs(targets, predictions)
  labels = sorted(labels or set(targets))
  unknown = sorted(set(targets) - set(labels))
  if unknown:
    raise ValueError(f'targets {unknown} are none of the labels {labels}')
  known = [p if p in labels else '' for p in predictions]
  f1 = sklearn_metrics.f1_score(
    targets, known, labels=labels, average='macro', zero_division=0
  )
  return {
    'accuracy': 100.0 * float(sklearn_metrics.accuracy_score(targets, known)),
    'macro_f1': 100.0 * float(f1),
    'mcc': 100.0 * float(sklearn_metrics.matthews_corrcoef(targets, known)),
    'unknown_labels': 100.0 * known.count('') / len(known),
  }


# Between the entities of a text, and what stands for no entity.
SPAN_SEPARATOR = ' | '
NO_SPAN = 'ingen'


def entity_spans(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """Exact span F1 of entities written as text: `PER: Kari Dahl | LOC: Oslo`.

  An entity is right if its type and all its words are. Texts have no offsets, so one
  that occurs twice must be named twice. What is not of this form counts as an entity
  that is wrong.

  Args:
    targets: entities of each sentence; 'ingen' where there is none.
    predictions: generated texts, in the same order.

  Returns:
    `span_f1`, `span_precision`, `span_recall`, micro-averaged over all entities, in
    per cent; 0 where there is nothing to divide by.

  Raises:
    ValueError: there is nothing to compare.
  """
  _check_pairs(targets, predictions)
  right = found = wanted = 0
  for target, prediction in zip(targets, predictions, strict=True):
    gold, guess = _spans(target), _spans(prediction)
    right += (gold & guess).total()
    found += guess.total()
    wanted += gold.total()
  return {
    'span_f1': 200.0 * right / max(found + wanted, 1),
    'span_precision': 100.0 * right / max(found, 1),
    'span_recall': 100.0 * right / max(wanted, 1),
  }


def _spans(text: str) -> collections.Counter:
  """How often each entity is named."""
  parts = [' '.join(part.split()) for part in text.split(SPAN_SEPARATOR.strip())]
  return collections.Counter(part for part in parts if part and part != NO_SPAN)


def question_answering(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Exact match and F1 of SQuAD (Rajpurkar et al. 2016, version 1.1 of the data).

  Letters are made small; ASCII punctuation and the words a, an, the (SQuAD is English;
  kept so that figures compare) are removed. F1 is over the bag of words between blanks.
  The best of a question's answers counts.

  Args:
    targets: the right answers to each question.
    predictions: generated answers, in the same order.

  Returns:
    `em` and `f1`, means over the questions, in per cent.

  Raises:
    ValueError: there is nothing to compare, or a question has no answer.
  """
  _check_pairs(targets, predictions)
  exact = overlap = 0.0
  for answers, prediction in zip(targets, predictions, strict=True):
    if not answers:
      raise ValueError('a question has no right answer to compare with')
    guess = _answer_words(prediction)
    right = [_answer_words(answer) for answer in answers]
    exact += guess in right
    overlap += max(_bag_f1(words, guess) for words in right)
  return {'em': 100.0 * exact / len(targets), 'f1': 100.0 * overlap / len(targets)}


def _answer_words(text: str) -> list[str]:
  kept = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
  return [word for word in kept.split() if word not in ('a', 'an', 'the')]


def _bag_f1(target: Sequence[str], prediction: Sequence[str]) -> float:
  if not target or not prediction:
    return float(target == prediction)
  common = (collections.Counter(target) & collections.Counter(prediction)).total()
  return 2.0 * common / (len(target) + len(prediction))


def translation(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
  """BLEU (Papineni et al. 2002) and chrF (Popović 2015) with sacrebleu's settings.

  Args:
    targets: one reference translation each.
    predictions: generated texts, in the same order.

  Returns:
    `bleu` (13a tokens, exponential smoothing) and `chrf` (chrF2, six letters, no
    words), of the whole corpus, from 0 to 100.

  Raises:
    ValueError: there is nothing to compare.
  """
  _check_pairs(targets, predictions)
  texts, references = list(predictions), [list(targets)]
  return {
    'bleu': sacrebleu.corpus_bleu(texts, references).score,
    'chrf': sacrebleu.corpus_chrf(texts, references).score,
  }


@_needs('rouge_score.rouge_scorer', 'rouge-score')
def summarisation(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """ROUGE-L F1 (Lin 2004) by rouge-score, as the Norwegian benchmarks compute it.

  The library's own tokenizer is kept, so that figures compare: it makes letters small
  and lets every one but a to z part words, also æ, ø and å.

  Args:
    targets: the right summaries of each text.
    predictions: generated summaries, in the same order.

  Returns:
    Means over the texts, in per cent. NorSumm's `rouge_lsum_max` and `rouge_lsum_avg`:
    the best of a text's summaries and their mean, sentences (lines, and what ends with
    a full stop between blanks) compared one by one. EuroEval's `rouge_l`, with the
    summary as one line; of several summaries the best.

  Raises:
    ImportError: rouge-score is not installed.
    ValueError: there is nothing to compare, or a text has no summary.
  """
  rouge_scorer = _library(*summarisation.needs)
  _check_pairs(targets, predictions)
  scorer = rouge_scorer.RougeScorer(['rougeL', 'rougeLsum'])

  def f1(kind, reference, text):
    if kind == 'rougeLsum':
      reference, text = (t.replace(' . ', '.\n') for t in (reference, text))
    return 100.0 * scorer.score(reference, text)[kind].fmeasure

  found: dict[str, list[float]] = collections.defaultdict(list)
  for references, prediction in zip(targets, predictions, strict=True):
    if not references:
      raise ValueError('a text has no right summary to compare with')
    by_sentence = [f1('rougeLsum', one, prediction) for one in references]
    found['rouge_lsum_max'].append(max(by_sentence))
    found['rouge_lsum_avg'].append(sum(by_sentence) / len(by_sentence))
    found['rouge_l'].append(max(f1('rougeL', one, prediction) for one in references))
  return {name: sum(values) / len(values) for name, values in found.items()}


# Denoising by generation. Training metrics compare token by token, with the true text
# given to the decoder. Here the decoder writes its own text, so the two are aligned
# first: the words that were not masked show where a masked span begins and ends.

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
  whole = reconstruction([_joined(parts) for parts in targets], predictions)
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


def _library(module: str, package: str) -> types.ModuleType:
  """The module; an ImportError that says how to install its package."""
  try:
    return importlib.import_module(module)
  except ImportError as e:
    raise ImportError(
      f"these scores need {package}: pip install -e '.[finetune]'"
    ) from e


def _check_pairs(targets: Sequence, predictions: Sequence):
  if not targets:
    raise ValueError('no examples to evaluate: the split is empty')
  if len(targets) != len(predictions):
    raise ValueError(
      f'{len(targets)} targets, but {len(predictions)} predictions: there must be one '
      'for each'
    )
