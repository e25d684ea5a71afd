"""The properties of the denoising objective, and the tests that stand for each.

P1   The target is the clean sequence, bit for bit, whatever the noise.
P2   Every target counts in the loss, `<s>` and `</s>` included; padding does not.
P3   The decoder sees the start token and then the targets; no padding inside.
P4   The source is `<s>` … `</s>`; no noise touches a special token.
P5   Without random tokens and permutation, what is no mask is a subsequence.
P6   The lengths drawn sum to `ceil(ratio x units)`, in each example by itself.
P7   A mask for each span and each insertion; adjacent spans keep theirs apart.
P8   Span lengths are Poisson, by chi-square.
P9   Coverage: the ratio exactly; 0.267 at 1,022 tokens where spans may overlap.
P10  With whole words, a word is masked whole or not at all.
P11  No span crosses a document's end or a packing segment; none is lost there.
P12  Sentences are permuted whole, in every order equally often, the last one too.
P13  The target gives the text back, white space included.
P14  Random tokens are ordinary ones, at their rate among insertions too.
P15  Noise follows from (seed, epoch, example id, piece) and from nothing else.
P16  Hosts split the data disjointly, and together read what one host reads.
P17  A run resumed anywhere goes on with the same batches and losses.
P18  Shapes are static; no source outgrows its encoder; what is cut off is counted.
P19  Packed examples have the loss that they have unpacked.
P20  Devices and microbatches change neither the reported loss nor the gradient.
P21  Edge cases: empty and tiny texts, ratios of 0 and 1, recipes that cannot be.
P22  Given the same draws, the result is that of a plain slow reference.

A test named `test_p07_…` stands for P7: `pytest -k p07` runs all that do. Those of the
noise itself run eagerly and inside `tf.data`; batches exist inside `tf.data` only.
"""

import pathlib
import re

import pytest

TESTS = pathlib.Path(__file__).parent
PROPERTIES = {
  int(number): words
  for number, words in re.findall(r'^P(\d+) +(\S.*)$', __doc__, re.MULTILINE)
}
# Where more than the noise of one text is needed.
OF_BATCHES = {2, 3, 16, 17, 19, 20}


def found_for(number):
  """{test: its parametrizations} of the tests that bear a property's number."""
  found = {}
  for path in TESTS.rglob('test_*.py'):
    for marks, name in re.findall(
      r'((?:^@.*\n(?:^[ )].*\n)*)*)^def (test_\w+)\(', path.read_text(), re.MULTILINE
    ):
      if f'p{number:02}' in name.split('_'):
        found[f'{path.name}::{name}'] = marks
  return found


def test_the_list_is_whole():
  assert sorted(PROPERTIES) == list(range(1, 23))


@pytest.mark.parametrize('number', PROPERTIES)
def test_every_property_has_a_test(number):
  found = found_for(number)
  assert found, f'no test_p{number:02}_… for: {PROPERTIES[number]}'
  if number not in OF_BATCHES:
    both = [
      name for name, marks in found.items() if "'mode'" in marks or 'each_mode' in marks
    ]
    assert both or number == 22, f'no test of P{number} runs in both modes: {found}'
