"""Runs every test on the CPU, split into eight devices, and without a network."""

import atexit
import os
import shutil
import tempfile
from importlib import metadata

# Before JAX is imported: the flags are read once. Child processes inherit them.
os.environ['JAX_PLATFORMS'] = 'cpu'
_flags = '--xla_force_host_platform_device_count=8'
# Tiny models take longer to compile than to run. JAX before 0.11 compiles them in a
# quarter of the time by this flag, which later versions lack, and the variable below.
if tuple(map(int, metadata.version('jaxlib').split('.')[:2])) < (0, 11):
  _flags += ' --xla_cpu_use_fusion_emitters=false'
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
if _flags not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_flags}'
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
