import pytest

from t5x import whole_files


@pytest.mark.parametrize('mode, text', [('w', 'år'), ('wb', b'\xc3\xa5')])
def test_a_file_appears_when_it_is_whole(tmp_path, mode, text):
  path = tmp_path / 'a.txt'
  path.write_text('before')
  with whole_files.whole_file(path, mode) as file:
    file.write(text)
    assert path.read_text() == 'before'
  assert path.read_bytes() == (text if mode == 'wb' else text.encode())
  assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_no_write_is_there(tmp_path):
  with whole_files.whole_file(tmp_path / 'empty'):
    pass
  assert (tmp_path / 'empty').read_bytes() == b''


def test_nothing_half_written_remains(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('before')
  with pytest.raises(OSError, match='full'), whole_files.whole_file(path) as file:
    file.write('half')
    raise OSError('full')
  assert path.read_text() == 'before'
  assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
  path = tmp_path / 'a.txt'
  with whole_files.whole_file(path) as one, whole_files.whole_file(path) as other:
    one.write('one')
    other.write('other')
  assert path.read_text() == 'one'


def test_a_folder_is_made_and_tried(tmp_path):
  whole_files.make_writable(tmp_path / 'a/b')
  whole_files.make_writable(tmp_path / 'a/b')
  assert list((tmp_path / 'a/b').iterdir()) == []
  (tmp_path / 'file').touch()
  with pytest.raises(OSError, match='file'):
    whole_files.make_writable(tmp_path / 'file')


def test_a_folder_that_cannot_be_opened_is_named_with_the_reason(tmp_path):
  file = tmp_path / 'notes.txt'
  file.write_text('mine')
  with pytest.raises(OSError, match='model_dir .*notes.txt .* is a file'):
    whole_files.open_folder('model_dir', str(file))
  with pytest.raises(OSError, match='notes.txt/run .*: Not a directory$'):
    whole_files.open_folder('model_dir', str(file / 'run'))
  assert file.read_text() == 'mine'
