"""Pushes and downloads, with a local server that speaks the Hub's protocol."""

import contextlib
import io
import json
import shutil
import subprocess
import threading
import time

import huggingface_hub.constants
import pytest
from fake_hub import TOKEN

from bart_t5x.hf import convert, hub, push_action

FILES = {
  'config.json': b'{}',
  'README.md': 'Bjørn'.encode(),
  'model.safetensors': bytes(range(256)) * 40,
  'flax_model.msgpack': b'\x80' * 999,
}


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / 'model'
  folder.mkdir()
  for name, content in FILES.items():
    (folder / name).write_bytes(content)
  return folder


def test_all_files_are_pushed_in_one_commit(server, folder):
  url = hub.push(folder, 'ola/norbart', 'Export of checkpoint_7')
  assert url.startswith(f'{server.url}/ola/norbart/commit/')
  assert server.repos['ola/norbart'] == {'private': False, 'branches': {'main': FILES}}
  commits = [path for _, path in server.requests if '/commit/' in path]
  assert len(commits) == 1


def test_push_to_a_private_branch(server, folder):
  for _ in range(2):
    hub.push(folder, 'ola/norbart', 'm', private=True, revision='v1')
    repo = server.repos['ola/norbart']
    assert repo == {'private': True, 'branches': {'main': {}, 'v1': FILES}}


def test_private_push_leaves_a_public_repository_alone(server, folder):
  server.repos['ola/norbart'] = {'private': False, 'branches': {'main': {}}}
  with pytest.raises(hub.HubError, match='is public'):
    hub.push(folder, 'ola/norbart', 'm', private=True)
  assert server.repos['ola/norbart']['branches']['main'] == {} and not server.objects


@pytest.mark.parametrize('step', ['create', 'preupload', 'batch', 'upload', 'commit'])
@pytest.mark.parametrize('status', [403, 413, 500])
def test_failed_push_uploads_no_commit_and_hides_the_token(
  server, folder, step, status
):
  server.fail[step] = status
  with pytest.raises(hub.HubError, match='Pushing to ola/norbart failed') as error:
    hub.push(folder, 'ola/norbart', 'm')
  assert str(status) in str(error.value) and TOKEN not in str(error.value)
  assert ('hf auth login' in str(error.value)) == (status == 403)
  for repo in server.repos.values():
    assert repo['branches'] == {'main': {}}
  # The same push works afterwards.
  server.fail.clear()
  hub.push(folder, 'ola/norbart', 'm')
  assert server.repos['ola/norbart']['branches']['main'] == FILES


def test_unreachable_server_is_an_error(server, folder, monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', 'http://127.0.0.1:9')
  with pytest.raises(hub.HubError, match='Pushing to ola/norbart failed'):
    hub.push(folder, 'ola/norbart', 'm')


def test_invalid_name(server):
  with pytest.raises(hub.HubError, match='har mellomrom/x'):
    hub.check_login('har mellomrom/x')
  assert not server.requests


def test_login_is_checked(server, monkeypatch):
  hub.check_login('ola/norbart')
  monkeypatch.setenv('HF_TOKEN', 'hf_wrongwrongwrong')
  with pytest.raises(hub.HubError, match='Logging in.*hf auth login') as error:
    hub.check_login('ola/norbart')
  assert 'wrongwrong' not in str(error.value)
  monkeypatch.delenv('HF_TOKEN')
  with pytest.raises(hub.HubError, match='needs a token'):
    hub.check_login('ola/norbart')


def test_export_pushes_and_import_downloads(server, default_run, tmp_path, capsys):
  run = default_run
  push = '--push_to_hub=ola/norbart'
  assert run.export(tmp_path / 'out', push, '--private') == 0
  printed = capsys.readouterr()
  assert f'pushed to {server.url}/ola/norbart/commit/' in printed.out
  assert TOKEN not in printed.out + printed.err
  pushed = server.repos['ola/norbart']['branches']['main']
  assert pushed == {p.name: p.read_bytes() for p in (tmp_path / 'out').iterdir()}
  assert b"from_pretrained('ola/norbart')" in pushed['README.md']
  assert TOKEN.encode() not in pushed['README.md']

  # Like a model of others: other tokenizer files, and a forced token.
  tokenizer = json.loads(pushed.pop('tokenizer.json'))['model']
  merges = '\n'.join(' '.join(pair) for pair in tokenizer['merges'])
  generation = json.loads(pushed['generation_config.json'])
  pushed |= {
    'vocab.json': json.dumps(tokenizer['vocab']).encode(),
    'merges.txt': merges.encode(),
    'generation_config.json': json.dumps(
      generation | {'forced_bos_token_id': 0}
    ).encode(),
  }
  server.requests.clear()
  fetch = ['import', '--model=ola/norbart', f'--output_dir={tmp_path}/in']
  assert convert.main(fetch) == 0
  assert (tmp_path / 'in/checkpoint_0').is_dir()
  assert (tmp_path / 'in/tokenizer.json').exists()
  gin = (tmp_path / 'in/config.gin').read_text()
  assert 'forced_first_id = 1' in gin
  assert gin.startswith('# ola/norbart, imported from the Hugging Face Hub.')
  # One format of weights is enough.
  assert not [path for _, path in server.requests if 'msgpack' in path]


def test_wrong_token_stops_an_export_before_it_begins(
  server, default_run, tmp_path, capsys, monkeypatch
):
  run = default_run
  monkeypatch.setenv('HF_TOKEN', 'hf_wrongwrongwrong')
  assert run.export(tmp_path / 'out', '--push_to_hub=ola/norbart') == 1
  assert 'hf auth login' in capsys.readouterr().err
  assert run.export(tmp_path / 'out', '--private') == 1
  assert 'belong to --push_to_hub' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


def test_model_that_does_not_exist(server, tmp_path, capsys):
  fetch = ['import', '--model=ola/none', f'--output_dir={tmp_path}/in']
  assert convert.main(fetch) == 1
  assert 'ola/none is not a folder' in capsys.readouterr().err


# ---- pushes while training ----

REPO = 'ola/norbart'


@pytest.fixture
def run(default_run, tmp_path):
  return default_run.copy(tmp_path / 'trained')


@pytest.fixture
def log(caplog):
  caplog.set_level('INFO', 'absl')
  return lambda: [r.getMessage() for r in caplog.records if r.name == 'absl']


@pytest.fixture
def start(run, monkeypatch):
  """Starts the action with short pauses and exports in this process."""

  def run_here(command, **options):
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
      code = convert.main(command[3:])
    return subprocess.CompletedProcess(command, code, out.getvalue(), errors.getvalue())

  monkeypatch.setattr(push_action.subprocess, 'run', run_here)
  monkeypatch.setattr(push_action, '_POLL_SECONDS', 0.1)
  monkeypatch.setattr(push_action, '_FIRST_PAUSE', 0.1)
  monkeypatch.setattr(push_action, '_LAST_PAUSES', (0.0, 0.1, 0.1))

  def start(**options):
    return push_action.PushToHub(
      REPO, str(run.model_dir), corpus_dir=str(run.corpus), **options
    )

  return start


def wait_for(condition):
  for _ in range(1800):
    if condition():
      return
    time.sleep(0.1)
  raise AssertionError('nothing happened for 180 seconds')


def test_newest_checkpoint_is_by_number(tmp_path):
  assert push_action.newest_checkpoint(tmp_path / 'none') is None
  for name in ('checkpoint_900', 'checkpoint_1000', 'damaged_checkpoint_2000'):
    (tmp_path / name).mkdir()
  (tmp_path / 'checkpoint_3000.tmp').mkdir()
  assert push_action.newest_checkpoint(tmp_path) == tmp_path / 'checkpoint_1000'


def test_each_newest_checkpoint_is_pushed_once(server, run, start, log):
  events = run.model_dir / 'train/events.out.tfevents.1.v2'
  events.parent.mkdir()
  events.write_bytes(b'')
  action = start(revision='steg', private=True)
  wait_for(lambda: any('checkpoint_0 pushed to' in line for line in log()))
  assert action.run(None, {}) is False
  shutil.copytree(run.checkpoint, run.model_dir / 'checkpoint_12')
  action.close()  # Waits for the last one.
  action.close()  # Also called by atexit.
  commits = sum('/commit/' in path for _, path in server.requests)
  assert commits == 2 and 'checkpoint_12 pushed to' in log()[-1]
  pushed = server.repos[REPO]['branches']['steg']
  assert b'for 12 steps' in pushed['README.md']
  assert {'model.safetensors', 'runs/train/events.out.tfevents.1.v2'} <= pushed.keys()
  assert TOKEN not in str(log())


def test_failed_pushes_are_tried_again(server, start, log):
  server.fail['whoami'] = 418  # One that huggingface_hub does not retry itself.
  action = start()
  assert 'Training starts' in log()[0]
  wait_for(lambda: any('was not pushed' in line for line in log()))
  assert action.run(None, {}) is False
  server.fail.clear()
  action.close()
  assert 'checkpoint_0 pushed to' in log()[-1]
  assert 'model.safetensors' in server.repos[REPO]['branches']['main']


def test_wait_for_the_last_push_is_limited(server, start, log, monkeypatch):
  release = threading.Event()
  monkeypatch.setattr(
    push_action.PushToHub, '_push_newest', lambda self: release.wait(60)
  )
  action = start(last_push_seconds=0.2)
  action.close()
  release.set()
  assert 'gave up' in log()[-1]


def test_wrong_token_stops_the_run_before_it_begins(server, start, monkeypatch):
  monkeypatch.setenv('HF_TOKEN', 'hf_wrongwrongwrong')
  with pytest.raises(hub.LoginError, match='hf auth login'):
    start()


def test_remote_model_dir_is_rejected(server):
  with pytest.raises(ValueError, match='gs://b/r'):
    push_action.PushToHub(REPO, 'gs://b/r')
