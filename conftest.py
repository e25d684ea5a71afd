"""Runs every test on the CPU, split into eight devices, and without a network."""

import atexit
import os
import shutil
import tempfile

# Before JAX is imported: the flags are read once. Child processes inherit them.
os.environ['JAX_PLATFORMS'] = 'cpu'
_DEVICES = '--xla_force_host_platform_device_count=8'
if _DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ['HF_HUB_OFFLINE'] = '1'
# Several test processes may compile for TPUs at a time; libtpu allows one by itself.
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'

# Many tests compile the same tiny model; each program is compiled once per test run.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _cache = tempfile.mkdtemp(prefix='jax_cache_')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _cache
  atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
