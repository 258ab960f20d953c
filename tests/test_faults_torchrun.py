"""Whole runs under torchrun, killed at random moments: as if nobody had, and nothing left behind.

MOEVIT_KILLS: how many kills, 2 if not set. For 200, in about an hour, and what they hit:
    MOEVIT_KILLS=200 .venv/bin/python -m pytest -n 0 -s tests/test_faults_torchrun.py
"""

import os

from tests.support import killing

KILLS = int(os.environ.get("MOEVIT_KILLS", "2"))


def test_killed_runs_end_with_the_same_bits_and_leave_nothing_behind(tmp_path):
    tally, problems = killing.kill_runs(tmp_path, kills=KILLS, seed=5)
    print(f"{tally.total()} kills: {dict(tally)}")
    assert tally.total() == KILLS
    assert problems == []
