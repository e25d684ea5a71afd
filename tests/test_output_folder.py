"""A folder is complete or not there."""

import json

import pytest

from bart_t5x import output_folder

CORPUS = {
  'format_version': output_folder.FORMAT_VERSION,
  'settings': {'source': 'text'},
  'source_files': {},
  'splits': {'train': {'shards': 1}},
}


def fill(working, **changes):
  for name in ('train-00000-of-00001.tfrecord', 'tokenizer.json'):
    with open(f'{working}/{name}', 'w') as f:
      f.write('x')
  with open(f'{working}/corpus.json', 'w') as f:
    json.dump(CORPUS | changes, f)


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_built_then_complete(tmp_path):
  out = tmp_path / 'deep' / 'out'
  with output_folder.building(str(out), overwrite=False) as working:
    fill(working)
    assert not (out / 'corpus.json').exists()
    assert not output_folder.is_complete(str(out), CORPUS['settings'])
  assert names(out) == [
    'corpus.json',
    'tokenizer.json',
    'train-00000-of-00001.tfrecord',
  ]
  assert output_folder.is_complete(str(out), {'source': 'text'})
  assert not output_folder.is_complete(str(out), {'source': 'jsonl'})


@pytest.mark.parametrize(
  'missing', ['tokenizer.json', 'train-00000-of-00001.tfrecord', 'corpus.json']
)
def test_with_a_file_gone_it_is_not_complete(tmp_path, missing):
  with output_folder.building(str(tmp_path), overwrite=False) as working:
    fill(working)
  (tmp_path / missing).unlink()
  assert not output_folder.is_complete(str(tmp_path), CORPUS['settings'])


def test_a_source_that_changed_is_noticed(tmp_path):
  text = tmp_path / 'a.txt'
  text.write_text('12345')
  out = tmp_path / 'out'
  with output_folder.building(str(out), overwrite=False) as working:
    fill(working, source_files={str(text): 5})
  assert output_folder.is_complete(str(out), CORPUS['settings'])
  text.write_text('123456')
  assert not output_folder.is_complete(str(out), CORPUS['settings'])
  text.unlink()  # gone after use is no change
  assert output_folder.is_complete(str(out), CORPUS['settings'])


def test_a_failure_leaves_nothing(tmp_path):
  out = tmp_path / 'out'
  with pytest.raises(KeyError):
    with output_folder.building(str(out), overwrite=False) as working:
      fill(working)
      raise KeyError
  assert not out.exists()
  out.mkdir()
  with pytest.raises(KeyError):
    with output_folder.building(str(out), overwrite=False):
      raise KeyError
  assert names(out) == []


def test_what_a_killed_run_left_goes(tmp_path):
  left = tmp_path / '.prepare-unfinished'
  left.mkdir()
  (left / 'train-00000-of-00001.tfrecord').write_text('half')
  with output_folder.building(str(tmp_path), overwrite=False) as working:
    fill(working)
  assert names(tmp_path) == [
    'corpus.json',
    'tokenizer.json',
    'train-00000-of-00001.tfrecord',
  ]


def test_occupied_folders_are_refused(tmp_path):
  with output_folder.building(str(tmp_path), overwrite=False) as working:
    fill(working)
  with pytest.raises(output_folder.Occupied, match='other arguments.*--overwrite'):
    with output_folder.building(str(tmp_path), overwrite=False):
      pass
  for wanted, message in (
    ({'source': 'jsonl'}, r"\(--source: 'text', now 'jsonl'\)"),
    ({'source': 'text', 'unit': 'file'}, r"\(--unit: None, now 'file'\)"),
    ({'source': 'text', 'tokenizer_file': '0f'}, r'\(--tokenizer_file\)'),
    (
      {'source': 'text'},
      'files are missing, or whose source has files that are new or have changed',
    ),
  ):
    with pytest.raises(output_folder.Occupied, match=message):
      with output_folder.building(str(tmp_path), overwrite=False, settings=wanted):
        pass
  (tmp_path / 'corpus.json').unlink()
  with pytest.raises(output_folder.Occupied, match='no complete corpus.*--overwrite'):
    with output_folder.building(str(tmp_path), overwrite=False):
      pass
  with pytest.raises(output_folder.Occupied, match='is a file'):
    with output_folder.building(str(tmp_path / 'tokenizer.json'), overwrite=True):
      pass


def test_overwriting_replaces_our_files_only_and_at_the_end(tmp_path):
  (tmp_path / 'notes.txt').write_text('mine')
  (tmp_path / 'train-00007-of-00009.tfrecord').write_text('old')
  with pytest.raises(KeyError):
    with output_folder.building(str(tmp_path), overwrite=True):
      raise KeyError
  assert names(tmp_path) == ['notes.txt', 'train-00007-of-00009.tfrecord']
  with output_folder.building(str(tmp_path), overwrite=True) as working:
    fill(working)
    assert (tmp_path / 'train-00007-of-00009.tfrecord').exists()
  assert names(tmp_path) == [
    'corpus.json',
    'notes.txt',
    'tokenizer.json',
    'train-00000-of-00001.tfrecord',
  ]


def test_two_at_once(tmp_path):
  with output_folder.building(str(tmp_path), overwrite=False) as working:
    with pytest.raises(output_folder.Occupied, match='Another process'):
      with output_folder.building(str(tmp_path), overwrite=False):
        pass
    fill(working)
  assert output_folder.is_complete(str(tmp_path), CORPUS['settings'])


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(OSError, match='Cannot write to --output_dir'):
    with output_folder.building(str(tmp_path / 'file' / 'out'), overwrite=False):
      pass
