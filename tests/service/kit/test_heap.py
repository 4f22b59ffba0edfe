"""What a process gives back of its memory."""

from __future__ import annotations

import subprocess
import sys

_ROUNDS, _BLOCK = 40, 8 << 20

# Each round has a thread of its own, and what it makes outlives it: so a gallery's compaction does.
_CHURN = f"""
import os
import threading
import numpy as np
from service.kit.heap import give_back_large_blocks
from tests.service.processes import resident

give_back_large_blocks()
present, small = [], []

def make():
    present.append(np.ones({_BLOCK}, np.uint8))
    small.append(np.ones(1 << 10, np.uint8))

def one_round():
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    del present[:-1]

one_round()
before = resident(os.getpid())
for _ in range({_ROUNDS}):
    one_round()
print(resident(os.getpid()) - before)
"""


def test_blocks_that_are_made_and_freed_in_turn_do_not_make_a_process_grow() -> None:
    run = [sys.executable, "-c", _CHURN]
    grown = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert grown < 2 * _BLOCK
