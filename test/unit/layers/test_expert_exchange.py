"""Experts under data-parallel attention: real ranks exchange their tokens once there and once back, however skewed."""

import subprocess
import sys
from pathlib import Path

import expert_exchange
from expert_exchange import NUM_RANKS

TIMEOUT_S = 120


def test_all_ranks_give_each_group_its_tokens(tmp_path: Path) -> None:
    """With groups of other sizes, two ranks in a group, and half of the tokens for one expert."""
    command = [sys.executable, expert_exchange.__file__]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path), "cpu"], stderr=subprocess.PIPE, text=True)
        for rank in range(NUM_RANKS)
    ]
    try:
        errors = [rank.communicate(timeout=TIMEOUT_S)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * NUM_RANKS, errors
