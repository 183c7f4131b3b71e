"""Owns what a rank takes of the choices that were measured: its replica's ranks take the same, or none takes any."""

import logging

import torch

from ramet.srt.distributed.parallel_state import gather_over_replica
from ramet.srt.layers.kernels.choices import choose_all
from ramet.srt.layers.tuned_file import digest_of, load_measured

logger = logging.getLogger(__name__)


def choose_kernels(tuning_dir: str | None, device: torch.device) -> None:
    """Let this process's kernels take what was measured for the device; every rank of the replica calls it.

    Ranks compute some things each by itself and rely on equal results, such as the router's logits: kernels that sum in
    another order on another node would let a token go to other experts there.
    """
    measured = load_measured(tuning_dir, device)
    if len(set(gather_over_replica(digest_of(measured)))) > 1:
        logger.warning(
            "kernels: ranks were told other choices than this one (%d), so all take the defaults: give all nodes "
            "the same files",
            len(measured),
        )
        measured = {}
    choose_all(measured)
