"""Metrics of generated text, as seqio's `metric_fns`. Scores are in per cent."""

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

# The separator of entities, and the text for no entity.
SPAN_SEPARATOR = ' | '
NO_SPAN = 'ingen'


def check_libraries(metric_fns: Sequence[Callable]) -> None:
  """Raises an ImportError if a metric needs a library that is not installed."""
  for metric_fn in metric_fns:
    metric_fn = getattr(metric_fn, 'func', metric_fn)
    if metric_fn in _LIBRARIES:
      _library(metric_fn)


def _library(metric_fn: Callable) -> types.ModuleType:
  module, package = _LIBRARIES[metric_fn]
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
    raise ValueError(f'{len(targets)} targets, but {len(predictions)} predictions')


def reconstruction(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """`exact_match`, and `chrf` (Popović 2015, by sacrebleu)."""
  _check_pairs(targets, predictions)
  same = sum(t == p for t, p in zip(targets, predictions))
  return {
    'exact_match': 100.0 * same / len(targets),
    'chrf': sacrebleu.corpus_chrf(list(predictions), [list(targets)]).score,
  }


def classification(
  targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str] = ()
) -> dict[str, float]:
  """Scores generated class names by scikit-learn.

  A prediction that is not a label is wrong; it is a class of its own for MCC, but not
  for macro F1.

  Args:
    labels: all classes; empty for those in `targets`.

  Returns:
    `accuracy`, `macro_f1` (the unweighted mean over `labels`), `mcc` (Matthews'
    correlation, -100 to 100) and `unknown_labels` (predictions that are not labels).
  """
  sklearn_metrics = _library(classification)
  _check_pairs(targets, predictions)
  labels = sorted(labels or set(targets))
  unknown = sorted(set(targets) - set(labels))
  if unknown:
    raise ValueError(f'targets {unknown} are not among the labels {labels}')
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


def entity_spans(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """Exact span F1 of entities written as text: `PER: Kari Dahl | LOC: Oslo`.

  An entity is right if its type and all its words are. An entity that occurs twice must
  be named twice. Text of another form is a wrong entity; `ingen` is none.

  Returns:
    `span_f1`, `span_precision`, `span_recall`, micro-averaged; 0 for a division by 0.
  """
  _check_pairs(targets, predictions)
  right = found = wanted = 0
  for target, prediction in zip(targets, predictions):
    gold, guess = _entities(target), _entities(prediction)
    right += (gold & guess).total()
    found += guess.total()
    wanted += gold.total()
  return {
    'span_f1': 200.0 * right / max(found + wanted, 1),
    'span_precision': 100.0 * right / max(found, 1),
    'span_recall': 100.0 * right / max(wanted, 1),
  }


def _entities(text: str) -> collections.Counter:
  parts = [' '.join(part.split()) for part in text.split(SPAN_SEPARATOR.strip())]
  return collections.Counter(part for part in parts if part and part != NO_SPAN)


def question_answering(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """`em` and `f1` of SQuAD 1.1 (Rajpurkar et al. 2016), for the best of all answers.

  As in SQuAD, texts are lower-cased, ASCII punctuation and the words a, an, the are
  removed, and F1 is of bags of words.
  """
  _check_pairs(targets, predictions)
  exact = overlap = 0.0
  for answers, prediction in zip(targets, predictions):
    if not answers:
      raise ValueError('a question has no reference answer')
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
  """Corpus `bleu` (Papineni et al. 2002) and `chrf`, by sacrebleu's defaults."""
  _check_pairs(targets, predictions)
  texts, references = list(predictions), [list(targets)]
  return {
    'bleu': sacrebleu.corpus_bleu(texts, references).score,
    'chrf': sacrebleu.corpus_chrf(texts, references).score,
  }


def summarisation(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """ROUGE-L F1 (Lin 2004) by rouge-score, as the Norwegian benchmarks compute it.

  To be comparable it keeps the library's tokenizer, which lower-cases and splits words
  at everything but a to z and digits, even at æ, ø and å.

  Args:
    targets: all reference summaries of each text.

  Returns:
    Means over the texts. NorSumm's `rouge_lsum_max` and `rouge_lsum_avg`: the best and
    the mean over a text's references, by sentences (split at lines and at ` . `).
    EuroEval's `rouge_l`: of the whole summary, the best of the references.
  """
  rouge_scorer = _library(summarisation)
  _check_pairs(targets, predictions)
  scorer = rouge_scorer.RougeScorer(['rougeL', 'rougeLsum'])

  def f1(kind, reference, text):
    if kind == 'rougeLsum':
      reference, text = (t.replace(' . ', '.\n') for t in (reference, text))
    return 100.0 * scorer.score(reference, text)[kind].fmeasure

  found: dict[str, list[float]] = collections.defaultdict(list)
  for references, prediction in zip(targets, predictions):
    if not references:
      raise ValueError('a text has no reference summary')
    by_sentence = [f1('rougeLsum', one, prediction) for one in references]
    found['rouge_lsum_max'].append(max(by_sentence))
    found['rouge_lsum_avg'].append(sum(by_sentence) / len(by_sentence))
    found['rouge_l'].append(max(f1('rougeL', one, prediction) for one in references))
  return {name: sum(values) / len(values) for name, values in found.items()}


# Imported on use: (module, package).
_LIBRARIES = {
  classification: ('sklearn.metrics', 'scikit-learn'),
  summarisation: ('rouge_score.rouge_scorer', 'rouge-score'),
}


# Denoising by generation. The generated text is aligned with the target: the words that
# were not masked show where a masked span begins and ends.

# A text in parts: (text, whether it was masked).
Parts = list[tuple[str, bool]]

# Words and single punctuation marks.
_WORD = re.compile(r'\w+|[^\w\s]')


def parts_of(
  ids: Int[np.ndarray, ' n'], codes: Int[np.ndarray, ' n'], vocabulary: seqio.Vocabulary
) -> Parts:
  """Decodes a target in runs of copied and masked tokens, by its `noise` codes."""
  flags = np.asarray(codes) == noise.INFILLED
  edges = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(ids)]
  # Decoded alone, a run can lose its leading space, so measure decoded prefixes.
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
  """Returns a target's parts or a prediction's text; for seqio's `postprocess_fn`."""
  if not is_target:
    return text
  return parts_of(example['targets'], example['targets_noised'], vocabulary)


def denoising(targets: Sequence[Parts], predictions: Sequence[str]) -> dict[str, float]:
  """Scores generated texts as a whole, and at the masked spans.

  A span's counterpart in the generated text is what is between the nearest copied words
  that difflib aligns. Partly masked words count as masked; spans of white space don't
  count.

  Returns:
    `exact_match` and `chrf` of whole texts; `infilled_exact_match` and `infilled_chrf`
    of the spans (0 without any); `infilled_spans`, the number of spans.
  """
  texts = [''.join(text for text, _ in parts) for parts in targets]
  whole = reconstruction(texts, predictions)
  wanted, found = [], []
  for parts, prediction in zip(targets, predictions):
    for span, counterpart in aligned_spans(parts, prediction):
      wanted.append(span)
      found.append(counterpart)
  right = sum(a == b for a, b in zip(wanted, found))
  return {
    **whole,
    'infilled_exact_match': 100.0 * right / max(len(wanted), 1),
    'infilled_chrf': sacrebleu.corpus_chrf(found, [wanted]).score if wanted else 0.0,
    'infilled_spans': float(len(wanted)),
  }


def aligned_spans(parts: Parts, prediction: str) -> list[tuple[str, str]]:
  """Pairs each masked span with its counterpart, as words joined by spaces."""
  text = ''.join(text for text, _ in parts)
  flags = [masked for text, masked in parts for _ in text]
  words, masked = [], []
  for word in _WORD.finditer(text):
    words.append(word.group())
    masked.append(any(flags[word.start() : word.end()]))
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
