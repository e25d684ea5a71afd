"""Every test runs on the CPU, split into eight devices, and never on a network."""

import os
import pathlib
import sys

# Before JAX is imported: the flags are read once.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ['HF_HUB_OFFLINE'] = '1'

# For what tests share: tiny.py.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
