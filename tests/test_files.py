"""Folders appear whole or not at all."""

import pytest

from bart_t5x import files


def content(folder):
  return {path.name: path.read_text() for path in folder.iterdir()}


def test_folder_appears_when_the_body_succeeds(tmp_path):
  target = tmp_path / 'deep' / 'out'
  with files.whole_folder(target) as folder:
    (folder / 'a').write_text('new')
    assert not target.exists()
  assert content(target) == {'a': 'new'}
  assert list(target.parent.iterdir()) == [target]


def test_failure_leaves_nothing(tmp_path):
  target = tmp_path / 'out'
  with pytest.raises(KeyError):
    with files.whole_folder(target) as folder:
      (folder / 'a').write_text('new')
      raise KeyError
  assert not any(tmp_path.iterdir())


def test_overwrite_replaces_the_folder_at_the_end(tmp_path):
  target = tmp_path / 'out'
  target.mkdir()
  (target / 'old').write_text('old')
  with pytest.raises(FileExistsError):
    with files.whole_folder(target):
      pass
  with pytest.raises(FileExistsError, match='other files'):
    with files.whole_folder(target, True, lambda folder: not (folder / 'old').exists()):
      pass
  with pytest.raises(KeyError):
    with files.whole_folder(target, overwrite=True):
      raise KeyError
  with files.whole_folder(target, overwrite=True) as folder:
    (folder / 'a').write_text('new')
    assert content(target) == {'old': 'old'}
  assert content(target) == {'a': 'new'}
  assert list(tmp_path.iterdir()) == [target]


def test_links_are_followed(tmp_path):
  (tmp_path / 'disk').mkdir()
  (tmp_path / 'out').symlink_to(tmp_path / 'disk')
  with files.whole_folder(tmp_path / 'out') as folder:
    (folder / 'a').write_text('new')
  assert content(tmp_path / 'disk') == {'a': 'new'}
  assert (tmp_path / 'out').is_symlink()


def test_files_of_a_killed_process_are_removed(tmp_path):
  left = tmp_path / '.out.unfinished'
  (left / 'sub').mkdir(parents=True)
  (left / 'half').write_text('half')
  with files.whole_folder(tmp_path / 'out') as folder:
    assert not any(folder.iterdir())
  assert not left.exists()


def test_two_processes_do_not_write_one_folder(tmp_path):
  with files.whole_folder(tmp_path / 'out') as folder:
    with pytest.raises(FileExistsError, match='Another process'):
      with files.whole_folder(tmp_path / 'out'):
        pass
    (folder / 'a').write_text('new')
  assert content(tmp_path / 'out') == {'a': 'new'}


def test_path_of_a_file_is_an_error(tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(NotADirectoryError):
    with files.whole_folder(tmp_path / 'file', overwrite=True):
      pass
