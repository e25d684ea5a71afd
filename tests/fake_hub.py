"""A server that speaks the Hub's protocol, with repositories in memory."""

import base64
import hashlib
import http.server
import json
import re
import threading

TOKEN = 'hf_secretsecretsecretsecretsecret'


class FakeHub:
  """The server; `url` is its address."""

  def __init__(self):
    self.repos = {}  # id: {'private': …, 'branches': {name: {path: content}}}
    self.objects = {}
    self.fail = {}  # step: HTTP status to answer with
    self.requests = []  # (method, path)
    self.token = TOKEN
    fake = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = 'HTTP/1.1'

      def log_message(self, *args):
        pass

      def serve(self):
        length = int(self.headers.get('Content-Length') or 0)
        body = self.rfile.read(length)
        fake.requests.append((self.command, self.path))
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

  def validate(self, body):  # of a card
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
