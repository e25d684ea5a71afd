"""SIGTERM is noticed between two steps, and handed back afterwards."""

import os
import signal

from t5x.training import preemption


def test_sigterm_asks_the_run_to_stop():
  with preemption.watch_for_preemption() as watch:
    assert not watch.stop_before(3)
    os.kill(os.getpid(), signal.SIGTERM)
    assert watch.stop_before(4)


def test_the_handler_from_before_is_put_back():
  heard = []
  before = signal.signal(signal.SIGTERM, lambda *_: heard.append('outer'))
  try:
    with preemption.watch_for_preemption():
      pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == ['outer']
  finally:
    signal.signal(signal.SIGTERM, before)
