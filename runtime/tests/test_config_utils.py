"""Starting a script from the command line."""

import subprocess
import sys
import textwrap

from t5x import config_utils

SCRIPT = """
    from absl import flags
    import jax
    from t5x import config_utils

    flags.DEFINE_multi_string('gin_bindings', [], 'Bindings.')

    def main(argv):
      print(flags.FLAGS.gin_bindings, argv[1:], jax.config.jax_debug_nans)

    if __name__ == '__main__':
      config_utils.run(main)
"""


def test_flags_of_gin_and_jax(tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(textwrap.dedent(SCRIPT))
  done = subprocess.run(
    [sys.executable, script, '--gin.a/F.x=1', '--jax_debug_nans=true', 'more'],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == "['a/F.x = 1'] ['more'] True"


def test_no_fiddle():
  assert config_utils.using_fdl() is False
