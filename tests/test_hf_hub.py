"""Pushing and fetching, against a server on this machine that speaks the protocol."""

import base64
import hashlib
import http.server
import json
import re
import threading
import time

import huggingface_hub.constants
import huggingface_hub.utils
import pytest

from bart_t5x.hf import convert, hub

TOKEN = 'hf_secretsecretsecretsecretsecret'


class FakeHub:
  """Repositories in memory; `fail` makes a step fail.

  Attributes:
    repos: id -> {'private': …, 'branches': {name: {path: content}}}.
    fail: step -> HTTP status.
    delay: seconds before each answer.
    requests: (method, path) of all.
  """

  def __init__(self):
    self.repos, self.objects, self.fail, self.requests = {}, {}, {}, []
    self.delay = 0.0
    fake = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = 'HTTP/1.1'

      def log_message(self, *args):
        pass

      def serve(self):
        length = int(self.headers.get('Content-Length') or 0)
        body = self.rfile.read(length)
        fake.requests.append((self.command, self.path))
        time.sleep(fake.delay)
        status, headers, content = fake.answer(
          self.command, self.path.partition('?')[0], self.headers, body
        )
        self.send_response(status)
        for name, value in {**headers, 'Content-Length': len(content)}.items():
          self.send_header(name, str(value))
        self.end_headers()
        if self.command != 'HEAD':
          self.wfile.write(content)

      do_GET = do_POST = do_PUT = do_HEAD = serve

    self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self.url = f'http://127.0.0.1:{self.server.server_port}'
    threading.Thread(target=self.server.serve_forever, daemon=True).start()

  def answer(self, method, path, headers, body):
    for pattern, step in (
      (r'/api/whoami-v2', self.whoami),
      (r'/api/repos/create', self.create),
      (r'/api/validate-yaml', self.validate),
      (r'/api/models/(.+)/branch/(.+)', self.branch),
      (r'/api/models/(.+)/preupload/(.+)', self.preupload),
      (r'/(.+)\.git/info/lfs/objects/batch', self.batch),
      (r'/lfs/(.+)', self.upload),
      (r'/api/models/(.+)/commit/(.+)', self.commit),
      (r'/api/models/([^/]+/[^/]+)(?:/revision/(.+))?', self.info),
      (r'/api/models/(.+)/tree/(.+)', self.tree),
      (r'/(.+)/resolve/([^/]+)/(.+)', self.resolve),
    ):
      if match := re.fullmatch(pattern, path):
        if status := self.fail.get(step.__name__):
          return self.error(status, f'{step.__name__} fails')
        public = step.__name__ in ('upload', 'info', 'tree', 'resolve')
        if not public and headers.get('Authorization') != f'Bearer {TOKEN}':
          return self.error(401, 'Invalid credentials')
        return step(*match.groups(), body)
    return self.error(404, f'{method} {path}')

  def error(self, status, message):
    headers = {'X-Error-Message': message}
    return status, headers, json.dumps({'error': message}).encode()

  def json(self, value, status=200):
    return status, {'Content-Type': 'application/json'}, json.dumps(value).encode()

  def whoami(self, body):
    return self.json({'name': 'ola', 'type': 'user', 'orgs': []})

  def create(self, body):
    asked = json.loads(body)
    name = f'{asked.get("organization") or "ola"}/{asked["name"]}'
    answer = {'url': f'{self.url}/{name}', 'id': name, 'name': name}
    if name in self.repos:
      return self.json(answer, 409)
    private = asked.get('private') or asked.get('visibility') == 'private'
    self.repos[name] = {'private': bool(private), 'branches': {'main': {}}}
    return self.json(answer)

  def validate(self, body):
    """What the Hub does with a card before it takes a commit."""
    return self.json({'errors': [], 'warnings': []})

  def branch(self, repo, branch, body):
    branches = self.repos[repo]['branches']
    if branch in branches:
      return self.error(409, 'exists')
    branches[branch] = dict(branches['main'])
    return self.json({}, 201)

  def preupload(self, repo, revision, body):
    files = []
    for file in json.loads(body)['files']:
      small = file['path'].endswith(('.json', '.md'))
      mode = {'uploadMode': 'regular' if small else 'lfs', 'shouldIgnore': False}
      files.append({'path': file['path'], 'oid': None, **mode})
    return self.json({'files': files})

  def batch(self, repo, body):
    objects = [
      {**o, 'actions': {'upload': {'href': f'{self.url}/lfs/{o["oid"]}'}}}
      for o in json.loads(body)['objects']
    ]
    return self.json({'transfer': 'basic', 'objects': objects})

  def upload(self, oid, body):
    assert hashlib.sha256(body).hexdigest() == oid
    self.objects[oid] = body
    return self.json({})

  def commit(self, repo, revision, body):
    files = self.repos[repo]['branches'][revision]
    for line in map(json.loads, body.decode().splitlines()):
      value = line['value']
      if line['key'] == 'file':
        files[value['path']] = base64.b64decode(value['content'])
      elif line['key'] == 'lfsFile':
        files[value['path']] = self.objects[value['oid']]
    oid = hashlib.sha1(body).hexdigest()
    url = f'{self.url}/{repo}/commit/{oid}'
    return self.json({'success': True, 'commitOid': oid, 'commitUrl': url})

  def info(self, repo, revision, body):
    if repo not in self.repos:
      return self.error(404, 'no such repository')
    files = self.repos[repo]['branches']['main']
    return self.json({
        'id': repo, 'modelId': repo, 'private': self.repos[repo]['private'],
        'sha': 'a' * 40, 'siblings': [{'rfilename': name} for name in files],
        'tags': [], 'downloads': 0,
    })  # fmt: skip

  def tree(self, repo, revision, body):
    files = self.repos[repo]['branches']['main']
    return self.json([
        {
            'type': 'file', 'path': name, 'size': len(content),
            'oid': hashlib.sha256(content).hexdigest(),
        }
        for name, content in files.items()
    ])  # fmt: skip

  def resolve(self, repo, revision, name, body):
    content = self.repos[repo]['branches']['main'][name]
    etag = hashlib.sha256(content).hexdigest()
    return 200, {'ETag': f'"{etag}"', 'X-Repo-Commit': 'a' * 40}, content


@pytest.fixture
def server(monkeypatch, tmp_path):
  fake = FakeHub()
  constants = huggingface_hub.constants
  for name, value in {
      'ENDPOINT': fake.url, 'HF_HUB_OFFLINE': False, 'HF_HUB_DISABLE_XET': True,
      'HF_HUB_CACHE': str(tmp_path / 'cache'),
      'HF_TOKEN_PATH': str(tmp_path / 'no_token'),
  }.items():  # fmt: skip
    monkeypatch.setattr(constants, name, value)
  monkeypatch.setattr(
      constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
      fake.url + '/{repo_id}/resolve/{revision}/{filename}',
  )  # fmt: skip
  monkeypatch.setenv('HF_TOKEN', TOKEN)
  # A server that fails is asked again, without the waits in between.
  monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', lambda seconds: None)
  huggingface_hub.utils.close_session()
  yield fake
  huggingface_hub.utils.close_session()
  fake.server.shutdown()
  fake.server.server_close()


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

  server.requests.clear()
  fetch = ['import', '--model=ola/norbart', f'--output_dir={tmp_path}/in']
  assert convert.main(fetch) == 0
  assert (tmp_path / 'in/checkpoint_0').is_dir()
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
