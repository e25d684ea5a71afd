"""What is kept of a source, and which split it belongs to."""

import random

import pytest

from bart_t5x import documents, spool


def collect(tmp_path, texts, share=0.1, at_least=5, name='spool'):
  return spool.collect(texts, str(tmp_path / name), share, at_least)


def test_duplicates_and_empty_documents_go(tmp_path):
  texts = ['a', 'b', '', 'a', ' \n', 'c', 'a ', 'b']
  kept = collect(tmp_path, texts)
  assert [text.decode() for _, text in kept.documents()] == ['a', 'b', 'c', 'a ']
  counts = kept.counts
  assert (counts.documents, counts.duplicates, counts.empty) == (4, 2, 2)
  assert counts.bytes == 5


def test_texts_and_digests_come_back(tmp_path):
  texts = [f'dokument {i} på Ås' * (i % 50) + '.' + str(i) for i in range(3000)]
  kept = collect(tmp_path, texts)
  read = list(kept.documents())
  assert [text.decode() for _, text in read] == texts
  assert all(documents.digest(text) == value for value, text in read)


def test_split_depends_on_the_text_alone(tmp_path):
  texts = [f'dokument {i}' for i in range(2000)]
  shuffled = random.Random(1).sample(texts, len(texts))
  splits = []
  for name, order in (('a', texts), ('b', shuffled)):
    kept = collect(tmp_path, order, share=0.05, at_least=10, name=name)
    splits.append({t: kept.split_of(d) for d, t in kept.documents()})
  assert splits[0] == splits[1]
  held_out = sum(split == spool.VALIDATION for split in splits[0].values())
  assert 60 < held_out < 140  # 100 by the share


@pytest.mark.parametrize('at_least', [1, 7, 100])
def test_never_fewer_held_out_than_asked(tmp_path, at_least):
  texts = [f'dokument {i}' for i in range(500)]
  kept = collect(tmp_path, texts, share=0.0, at_least=at_least)
  splits = [kept.split_of(value) for value, _ in kept.documents()]
  assert splits.count(spool.VALIDATION) == at_least


def test_hash_of_the_text(tmp_path):
  one = collect(tmp_path, ['a', 'b'], name='1').text_sha256
  assert collect(tmp_path, ['a', 'b', 'a', ''], name='2').text_sha256 == one
  assert collect(tmp_path, ['b', 'a'], name='3').text_sha256 != one
  assert collect(tmp_path, ['ab'], name='4').text_sha256 != one


def test_digest_set_like_a_set():
  rng = random.Random(0)
  ours, plain = spool.DigestSet(buffer_size=16), set()
  for _ in range(5000):
    value = rng.choice([rng.randrange(3000), 2**63 - 1 - rng.randrange(50)])
    assert ours.add(value) == (value not in plain)
    plain.add(value)


def test_a_working_file_cut_off_is_noticed(tmp_path):
  kept = collect(tmp_path, [str(random.random()) for _ in range(5000)])
  content = (tmp_path / 'spool').read_bytes()
  (tmp_path / 'spool').write_bytes(content[: len(content) // 2])
  with pytest.raises(OSError, match='ends early'):
    list(kept.documents())
