"""Pins, removal, and telling the layouts apart."""

import flax.serialization
import pytest

from t5x import checkpoint_utils
from t5x.checkpoint_utils import CheckpointTypes


@pytest.fixture
def folder(tmp_path):
  made = tmp_path / 'checkpoint_5'
  (made / 'state').mkdir(parents=True)
  (made / 'state' / 'array').write_text('1')
  return made


def test_pins(folder):
  path = str(folder)
  assert not checkpoint_utils.is_pinned_checkpoint(path)
  checkpoint_utils.unpin_checkpoint(path)
  checkpoint_utils.pin_checkpoint(path, 'kept for the paper')
  assert checkpoint_utils.is_pinned_checkpoint(path)
  pin = checkpoint_utils.pinned_checkpoint_filepath(path)
  assert pin == path + '/PINNED'
  with open(pin) as file:
    assert file.read() == 'kept for the paper'
  checkpoint_utils.remove_checkpoint_dir(path)
  assert folder.exists()
  checkpoint_utils.unpin_checkpoint(path)
  assert not checkpoint_utils.is_pinned_checkpoint(path)
  checkpoint_utils.remove_checkpoint_dir(path)
  assert not any(folder.parent.iterdir())


def test_pinning_what_is_not_there(tmp_path):
  with pytest.raises(ValueError, match='no such checkpoint'):
    checkpoint_utils.pin_checkpoint(str(tmp_path / 'checkpoint_9'))


@pytest.mark.parametrize('place', ['', 'dataset', 'dataset/process_0-of-2'])
def test_data_positions_are_removed_alone(folder, place):
  (folder / place).mkdir(parents=True, exist_ok=True)
  position = folder / place / 'train_ds-000-of-001.index'
  position.write_text('')
  checkpoint_utils.pin_checkpoint(str(folder))
  checkpoint_utils.remove_dataset_checkpoint(str(folder), 'train_ds')
  assert position.exists()
  checkpoint_utils.unpin_checkpoint(str(folder))
  checkpoint_utils.remove_dataset_checkpoint(str(folder), 'train_ds')
  assert not position.exists()
  assert (folder / 'state' / 'array').exists()


def test_a_removal_cut_short_leaves_no_checkpoint(folder, monkeypatch):
  def killed(self):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(type(checkpoint_utils.epath.Path(folder)), 'rmtree', killed)
    with pytest.raises(KeyboardInterrupt):
      checkpoint_utils.remove_checkpoint_dir(str(folder))
  assert not folder.exists()
  assert not checkpoint_utils.whole_checkpoint(folder)
  left = checkpoint_utils.leftovers(folder.parent)
  assert [p.name for p in left] == ['deleting_checkpoint_5']


def test_leftovers(tmp_path):
  assert checkpoint_utils.leftovers(tmp_path / 'nowhere') == []
  for name in (
    'checkpoint_1',
    'checkpoint_2.orbax-checkpoint-tmp',
    'deleting_checkpoint_0',
    'damaged_checkpoint_3',
    'train',
    'other.orbax-checkpoint-tmp',
  ):
    (tmp_path / name).mkdir()
  names = sorted(p.name for p in checkpoint_utils.leftovers(tmp_path))
  assert names == ['checkpoint_2.orbax-checkpoint-tmp', 'deleting_checkpoint_0']


@pytest.mark.parametrize(
  'files, expected',
  [
    ({'_METADATA': b'{}'}, CheckpointTypes.ORBAX),
    ({'checkpoint': b'model_checkpoint_path: "x"'}, CheckpointTypes.T5X_TF),
    (
      {
        'checkpoint': flax.serialization.msgpack_serialize(
          {'version': 3, 'optimizer': {}}
        )
      },
      CheckpointTypes.T5X,
    ),
  ],
)
def test_layouts(tmp_path, files, expected, caplog):
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  index = tmp_path / 'checkpoint'
  detect = checkpoint_utils.detect_checkpoint_type
  assert detect(index) is expected
  detect(index, expected)
  assert not caplog.records
  other = (
    CheckpointTypes.T5X
    if expected is not CheckpointTypes.T5X
    else (CheckpointTypes.ORBAX)
  )
  assert detect(index, other) is expected
  assert expected.value in caplog.text


@pytest.mark.parametrize('content', [b'', b'hello', bytes(range(200, 256))])
def test_other_files_are_no_checkpoints(tmp_path, content):
  (tmp_path / 'checkpoint').write_bytes(content)
  with pytest.raises(ValueError, match='no checkpoint'):
    checkpoint_utils.detect_checkpoint_type(tmp_path / 'checkpoint')
