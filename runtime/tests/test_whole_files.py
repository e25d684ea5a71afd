import pytest

from t5x import whole_files


@pytest.mark.parametrize('mode, text', [('w', 'år'), ('wb', b'\xc3\xa5')])
def test_file_appears_at_the_end(tmp_path, mode, text):
  path = tmp_path / 'a.txt'
  path.write_text('before')
  with whole_files.whole_file(path, mode) as file:
    file.write(text)
    assert path.read_text() == 'before'
  assert path.read_bytes() == (text if mode == 'wb' else text.encode())
  assert list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('before')
  with pytest.raises(OSError, match='full'), whole_files.whole_file(path) as file:
    file.write('half')
    raise OSError('full')
  assert path.read_text() == 'before'
  assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file(tmp_path):
  path = tmp_path / 'a.txt'
  with whole_files.whole_file(path) as one, whole_files.whole_file(path) as other:
    one.write('one')
    other.write('other')
  assert path.read_text() == 'one'


def test_writable_folder_is_created(tmp_path):
  for _ in range(2):
    whole_files.open_folder('model_dir', str(tmp_path / 'a/b'))
  assert list((tmp_path / 'a/b').iterdir()) == []


def test_unwritable_folder_is_reported_with_the_reason(tmp_path):
  file = tmp_path / 'notes.txt'
  file.write_text('mine')
  with pytest.raises(OSError, match='model_dir .*notes.txt .* a file'):
    whole_files.open_folder('model_dir', str(file))
  with pytest.raises(OSError, match='notes.txt/run .*: Not a directory$'):
    whole_files.open_folder('model_dir', str(file / 'run'))
  assert file.read_text() == 'mine'
