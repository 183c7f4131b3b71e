"""Owns the question to seeds whether their output head is the embedding's table, for a client that has no files.

It must be answered before the model is built, for the head is a part of it: config.json may say that the head is tied
while the files that the seeds have read hold another one.
"""

import logging
import time

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.remote_instance_weight_loader_utils import ABSENT_GRACE_S, SeedServer, fetch_seed_answer
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import says_tied

logger = logging.getLogger(__name__)


def ask_whether_tied(config: LoadConfig, role: str) -> bool | None:
    """What the first seed that says it says; None if none does, and the config's word is all there is.

    Waits for a seed that is starting, as the load would do.
    """
    deadline = time.monotonic() + config.timeout_s
    for address in config.seeds:
        server = SeedServer(address, config.api_keys, config.ssl_ca_certs)
        left = max(0.001, deadline - time.monotonic())
        try:
            answer = fetch_seed_answer(server, 0, role, left, min(ABSENT_GRACE_S, left))
        except WeightTransferError as error:
            logger.debug("the seed %s does not say whether its output head is tied: %s", address.name, error)
            continue
        word = None if answer.manifest is None else says_tied(answer.manifest)
        if word is not None:
            return word
    return None
