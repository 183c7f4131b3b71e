"""Owns what a seed is asked before the model's tensors can be matched with its own: which checkpoint tensors it has."""

import time
from dataclasses import dataclass

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.remote_instance_weight_loader_utils import ABSENT_GRACE_S, SeedServer, fetch_seed_answer
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import WeightManifest

from ramet_vllm.watched_load import CheckpointTensor

ROLE = "target"


@dataclass(frozen=True)
class SeedTensors:
    """The checkpoint tensors that the ranks of one instance hold together."""

    seed: str
    tensors: dict[str, CheckpointTensor]  # by name, in the order in which they lie in the ranks' memory
    manifest: WeightManifest  # of the first rank: what is said of the whole model


def ask_for_tensors(config: LoadConfig, rank: int) -> SeedTensors:
    """What the first seed that answers has. One that is starting is waited for.

    Args:
        rank: the own world rank, for messages.

    Raises:
        WeightTransferError: if none answers in time.
    """
    errors = []
    deadline = time.monotonic() + config.timeout_s
    for address in config.seeds:
        try:
            return _ask(address, config, deadline)
        except WeightTransferError as error:
            errors.append(error)
    names = ", ".join(dict.fromkeys(error.seed for error in errors))
    raise WeightTransferError("ask", rank, names, "; ".join(str(error.cause) for error in errors))


def _ask(address: SeedAddress, config: LoadConfig, deadline: float) -> SeedTensors:
    server = SeedServer(address, config.api_keys, config.ssl_ca_certs, config.shows_keys)
    manifests: list[WeightManifest] = []
    num_ranks = 1
    while len(manifests) < num_ranks:
        left = max(0.001, deadline - time.monotonic())
        grace = ABSENT_GRACE_S if not manifests else left  # a rank that must be there is worth the whole time
        answer = fetch_seed_answer(server, len(manifests), ROLE, left, min(grace, left))
        if answer.manifest is None:
            raise WeightTransferError("ask", answer.rank, server.name, "it sends no manifest: it is no Ramet instance")
        if answer.published is not None:
            raise WeightTransferError("ask", answer.rank, server.name, "it is a trainer, and not an instance")
        manifests.append(answer.manifest)
        num_ranks = answer.manifest.parallel.pp_size * answer.manifest.parallel.tp_size
    return SeedTensors(server.name, collect_tensors(manifests), manifests[0])


def collect_tensors(manifests: list[WeightManifest]) -> dict[str, CheckpointTensor]:
    """The checkpoint tensors that ranks of one replica are made of, as large as any of them reaches."""
    tensors: dict[str, CheckpointTensor] = {}
    for manifest in manifests:
        for entry in manifest.entries:
            for box in entry.boxes:
                reach = tuple(stop for _, stop in box.source)
                known = tensors.get(box.checkpoint_name)
                if known is not None and len(known.shape) == len(reach):
                    reach = tuple(map(max, reach, known.shape))
                tensors[box.checkpoint_name] = CheckpointTensor(box.checkpoint_name, entry.dtype, reach)
    return tensors
