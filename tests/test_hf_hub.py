"""Pushing and fetching, against a server on this machine that speaks the protocol."""

import json

import huggingface_hub.constants
import pytest
from fake_hub import TOKEN

from bart_t5x.hf import convert, hub

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


def test_all_files_in_one_commit(server, folder):
  url = hub.push(folder, 'ola/norbart', 'Export of checkpoint_7')
  assert url.startswith(f'{server.url}/ola/norbart/commit/')
  assert server.repos['ola/norbart'] == {'private': False, 'branches': {'main': FILES}}
  commits = [path for _, path in server.requests if '/commit/' in path]
  assert len(commits) == 1


def test_private_and_on_a_branch(server, folder):
  hub.push(folder, 'ola/norbart', 'm', private=True, revision='v1')
  repo = server.repos['ola/norbart']
  assert repo == {'private': True, 'branches': {'main': {}, 'v1': FILES}}
  hub.push(folder, 'ola/norbart', 'again', private=True, revision='v1')


def test_private_never_pushes_to_a_public_repository(server, folder):
  server.repos['ola/norbart'] = {'private': False, 'branches': {'main': {}}}
  with pytest.raises(hub.HubError, match='is public, and --private was given'):
    hub.push(folder, 'ola/norbart', 'm', private=True)
  assert server.repos['ola/norbart']['branches']['main'] == {} and not server.objects


def test_logs_go_along_where_asked(server, folder, tmp_path):
  events = tmp_path / 'run/training_eval/task/events.out.tfevents.1.v2'
  events.parent.mkdir(parents=True)
  events.write_bytes(b'events')
  (tmp_path / 'run/checkpoint_7').mkdir()
  hub.push(folder, 'ola/norbart', 'm', logs=tmp_path / 'run')
  name = 'runs/training_eval/task/events.out.tfevents.1.v2'
  assert server.repos['ola/norbart']['branches']['main'] == {**FILES, name: b'events'}


@pytest.mark.parametrize('step', ['create', 'preupload', 'batch', 'upload', 'commit'])
@pytest.mark.parametrize('status', [403, 500])
def test_a_failure_shows_nothing_of_the_model(server, folder, step, status):
  server.fail[step] = status
  with pytest.raises(hub.HubError, match='Pushing to ola/norbart failed') as error:
    hub.push(folder, 'ola/norbart', 'm')
  assert str(status) in str(error.value) and TOKEN not in str(error.value)
  assert ('hf auth login' in str(error.value)) == (status == 403)
  for repo in server.repos.values():
    assert repo['branches'] == {'main': {}}
  # And once it works again, so does the same command.
  server.fail.clear()
  hub.push(folder, 'ola/norbart', 'm')
  assert server.repos['ola/norbart']['branches']['main'] == FILES


def test_a_slow_server_is_waited_for(server, folder):
  server.delay = 0.4
  hub.push(folder, 'ola/norbart', 'm')
  assert server.repos['ola/norbart']['branches']['main'] == FILES


def test_no_server(server, folder, monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', 'http://127.0.0.1:9')
  with pytest.raises(hub.HubError, match='Pushing to ola/norbart failed'):
    hub.push(folder, 'ola/norbart', 'm')


@pytest.mark.parametrize('name', ['a/b/c', 'har mellomrom/x', '--'])
def test_names_that_are_none(server, name):
  with pytest.raises(hub.HubError, match='failed: '):
    hub.check_login(name)
  assert not server.requests


def test_login(server, monkeypatch):
  hub.check_login('ola/norbart')
  monkeypatch.setenv('HF_TOKEN', 'hf_wrongwrongwrong')
  with pytest.raises(hub.HubError, match='Logging in.*hf auth login') as error:
    hub.check_login('ola/norbart')
  assert 'wrongwrong' not in str(error.value)
  monkeypatch.delenv('HF_TOKEN')
  with pytest.raises(hub.HubError, match='needs a token'):
    hub.check_login('ola/norbart')


def test_export_pushes_and_import_fetches(server, make_run, tmp_path, capsys):
  run = make_run(tmp_path / 'trained')
  command = [
      'export', f'--checkpoint={run.checkpoint}', f'--corpus_dir={run.corpus}',
      f'--output_dir={tmp_path}/out',
  ]  # fmt: skip
  assert convert.main([*command, '--push_to_hub=ola/norbart', '--private']) == 0
  printed = capsys.readouterr()
  assert f'pushed to {server.url}/ola/norbart/commit/' in printed.out
  assert TOKEN not in printed.out + printed.err
  pushed = server.repos['ola/norbart']['branches']['main']
  assert pushed == {p.name: p.read_bytes() for p in (tmp_path / 'out').iterdir()}
  assert b"from_pretrained('ola/norbart')" in pushed['README.md']
  assert TOKEN.encode() not in pushed['README.md']

  # As a model that somebody else made: the other files of a tokenizer, a forced token.
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
  assert 'forced_first_id = 1' in (tmp_path / 'in/config.gin').read_text()
  # One format of weights is enough.
  assert not [path for _, path in server.requests if 'msgpack' in path]


def test_a_wrong_token_stops_an_export_before_it_begins(
  server, make_run, tmp_path, capsys, monkeypatch
):
  run = make_run(tmp_path / 'trained')
  monkeypatch.setenv('HF_TOKEN', 'hf_wrongwrongwrong')
  command = [
      'export', f'--checkpoint={run.checkpoint}', f'--corpus_dir={run.corpus}',
      f'--output_dir={tmp_path}/out',
  ]  # fmt: skip
  assert convert.main([*command, '--push_to_hub=ola/norbart']) == 1
  assert 'hf auth login' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()
  assert convert.main([*command, '--private']) == 1
  assert 'belong to --push_to_hub' in capsys.readouterr().err


def test_a_model_that_is_neither_here_nor_there(server, tmp_path, capsys):
  fetch = ['import', '--model=ola/none', f'--output_dir={tmp_path}/in']
  assert convert.main(fetch) == 1
  assert 'There is no folder ola/none, and fetching' in capsys.readouterr().err
