"""Norwegian text-to-text tasks for fine-tuning and evaluation.

Each has the vocabulary of `<data root>/no` and, as `<name>_mini`, that of `<data
root>/mini`. Gin chooses between files and the Hub, see `readers`.

| name                   | inputs, targets                         | metric        |
|------------------------|-----------------------------------------|---------------|
| norec                  | review, its sentiment                   | macro F1      |
| scala_nb, scala_nn     | sentence, whether it is acceptable      | MCC, macro F1 |
| norne_nb, norne_nn     | sentence, its entities                  | exact span F1 |
| norquad                | question and paragraph, the answer      | EM, F1        |
| nb_nn                  | sentence in Bokmål, the same in Nynorsk | BLEU, chrF    |
| no_sammendrag          | news article, its summary               | ROUGE-L       |
| norsumm_nb, norsumm_nn | news article, its summary (no training) | ROUGE-L       |

Mixtures: scala and norne (both written standards, in equal parts), and sammendrag
(trains on no_sammendrag, evaluates on NorSumm).

The descriptions follow the publishers' READMEs, data set cards and benchmark code. What
was run on the publishers' files is in docs/finetuning.md; the data sets on the Hub have
not been read: should a column have another name, the error message lists the columns.
Scores of other models are from NorBench's leaderboard of
encoder-decoder models (t5_leaderboard.md in https://github.com/ltgoslo/norbench; means
of five runs).
"""

import functools
import os

import seqio

from bart_t5x import metrics
from bart_t5x.data import data_root
from tasks import prompts, readers
from tasks.readers import HubDataset
from tasks.text_to_text import add_text_to_text_task

__all__ = ['add_text_to_text_task']

# The corpus of a task's vocabulary, by the suffix of the task's name.
_CORPORA = {'': 'no', '_mini': 'mini'}


def _add(name: str, download: str, hub: HubDataset | None = None, **task):
  """Registers a task over `readers.records` for each vocabulary."""

  def read(split):
    return readers.records(name, split, hub, download)

  for suffix, corpus in _CORPORA.items():
    corpus_dir = os.path.join(data_root(), corpus)
    add_text_to_text_task(name + suffix, corpus_dir=corpus_dir, read=read, **task)


def _add_mixture(name: str, *tasks: str):
  """Registers a mixture of tasks in equal parts for each vocabulary."""
  for suffix in _CORPORA:
    members = [task + suffix for task in tasks]
    seqio.MixtureRegistry.add(name + suffix, members, default_rate=1.0)


# NoReC: the sentiment of a review (Velldal et al. 2018, arXiv 1710.05370). Source:
# https://github.com/ltgoslo/norec; on the Hub ltg/norec_document, configuration ternary
# (34,749 / 4,348 / 4,340 reviews; columns id, review, sentiment; that 0, 1, 2 are
# negative, fair, positive is inferred from the configuration binary). Licence: CC BY-NC
# 4.0. Files: `text` or `review`, and `rating` (1 to 6), `sentiment` or `label`.
# Macro F1 as in NorBench ("Document SA"): NorT5-base 77.4 ± 0.4, North-T5-base 21.2 ±
# 0.3.
_add(
  'norec',
  'https://huggingface.co/datasets/ltg/norec_document',
  HubDataset('ltg/norec_document', config='ternary'),
  to_text=prompts.sentiment_to_text,
  labels=prompts.SENTIMENTS,
)

# ScaLA: is a sentence acceptable (Nielsen 2023, arXiv 2304.00906)? Sentences of the
# Universal Dependencies treebanks, half of them with two adjacent words swapped or a
# word left out. Source: EuroEval/scala-nb and -nn on the Hub (1,024 / 256 / 2,048
# sentences; columns text, corruption_type, label). Licence: the treebanks'. Files:
# `text` and `label`, correct or incorrect. MCC and macro F1 as in EuroEval; no scores
# of T5 models were found.
for _language in ('nb', 'nn'):
  _add(
    f'scala_{_language}',
    f'https://huggingface.co/datasets/EuroEval/scala-{_language}',
    HubDataset(f'EuroEval/scala-{_language}', splits={'validation': 'val'}),
    to_text=prompts.acceptability_to_text,
    labels=prompts.ACCEPTABILITY,
    headline='mcc',
  )
_add_mixture('scala', 'scala_nb', 'scala_nn')

# NorNE: names in running text (Jørgensen et al. 2020, arXiv 1911.12146). Source:
# https://github.com/ltgoslo/norne, files ud/nob/no_bokmaal-ud-train.conllu, -dev (here
# validation) and -test, and ud/nno/no_nynorsk-ud-…; the Hub has only samples with other
# types (1,024 / 256 / 2,048 sentences). Licence: CC0 for the annotations, not the
# texts. Files: `tokens` and their IOB2 `labels`; or conllu, with tags `name=B-PER` in
# the last column. GPE_LOC is LOC, GPE_ORG is ORG. Exact span F1; NorBench has scores of
# encoders only.
for _language in ('nb', 'nn'):
  _add(
    f'norne_{_language}',
    'https://github.com/ltgoslo/norne (ud/nob or ud/nno; -dev is validation)',
    HubDataset(f'EuroEval/norne-{_language}-mini', splits={'validation': 'val'}),
    to_text=prompts.entities_to_text,
    metric_fns=[metrics.entity_spans],
    headline='span_f1',
  )
_add_mixture('norne', 'norne_nb', 'norne_nn')

# NorQuAD: questions about a paragraph (Ivanova et al. 2023, arXiv 2305.01957). Source:
# https://github.com/ltgoslo/NorQuAD, on the Hub ltg/norquad (3,808 / 472 / 472
# questions). Licence: CC0 1.0. Files: a SQuAD file (json), or `context`, `question` and
# `answers`. Paragraphs are long: set TASK_FEATURE_LENGTHS accordingly. Exact match and
# F1 of SQuAD 1.1, as in NorBench, which has scores of encoders only.
_add(
  'norquad',
  'https://huggingface.co/datasets/ltg/norquad',
  HubDataset('ltg/norquad'),
  to_text=prompts.question_to_text,
  postprocess_fn=prompts.references_of,
  metric_fns=[metrics.question_answering],
  headline='f1',
)

# Translation from Bokmål to Nynorsk. Source: NorBench's sample of Språkbanken's
# translation memories, nmt/data/nb_nn_{train,dev,test}.tsv.gz in
# https://github.com/ltgoslo/norbench (dev is here validation), or any parallel text.
# Licence: see https://www.nb.no/sprakbanken/. Files: `nb` and `nn`. NorBench's lack the
# line that names the columns:
#     (printf 'nb\tnn\n'; gunzip -c nb_nn_dev.tsv.gz) > …/nb_nn/validation.tsv
# BLEU and chrF by sacrebleu's defaults. NorBench ("MT"): NorT5-base 86.6 ± 0.1,
# North-T5-base 39.8 ± 0.2.
_add(
  'nb_nn',
  'https://github.com/ltgoslo/norbench/tree/main/nmt/data (as columns nb and nn)',
  to_text=prompts.translation_to_text,
  metric_fns=[metrics.translation],
  headline='bleu',
)

# Summaries of news: NoSammendrag (norkart/no-sammendrag on the Hub, train only; here
# its sample with splits, EuroEval/no-sammendrag-mini, 1,024 / 256 / 2,048; licence not
# stated), and NorSumm (Touileb et al. 2025, arXiv 2501.07718): three human summaries of
# each article in both written standards, without a training split; the files of
# https://github.com/SamiaTouileb/NorSumm as they are, or SamiaT/NorSumm on the Hub.
# Files: `article`, `document` or `text`, and `summaries`, `summaries_nb`, `summary` or
# `target_text`. Articles need 1024 inputs and 256 targets. ROUGE-L; no scores of T5
# models were found.
_summary = dict(
  postprocess_fn=prompts.references_of,
  metric_fns=[metrics.summarisation],
  headline='rouge_lsum_max',
)
_add(
  'no_sammendrag',
  'https://huggingface.co/datasets/norkart/no-sammendrag',
  HubDataset('EuroEval/no-sammendrag-mini', splits={'validation': 'val'}),
  to_text=prompts.summary_to_text,
  **_summary,
)
for _language in ('nb', 'nn'):
  _add(
    f'norsumm_{_language}',
    'https://github.com/SamiaTouileb/NorSumm (Data/NorSumm_dev.json is validation)',
    HubDataset('SamiaT/NorSumm', config=_language),
    to_text=functools.partial(
      prompts.summary_to_text, summaries=f'summaries_{_language}'
    ),
    splits=('validation', 'test'),
    **_summary,
  )
_add_mixture('sammendrag', 'no_sammendrag', 'norsumm_nb', 'norsumm_nn')
