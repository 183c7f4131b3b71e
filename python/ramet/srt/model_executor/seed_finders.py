"""Owns the choice of who finds seeds for a rank: the addresses that were given, or a metadata server."""

from typing import Any

from ramet.srt.configs.load_config import LoadConfig, LoadContext
from ramet.srt.model_loader.client.seed_finder import SeedFinder
from ramet.srt.model_loader.client.seeds_by_address import SeedsByAddress
from ramet.srt.modelexpress.settings import check_installed
from ramet.srt.weights.manifest import WeightManifest


def make_seed_finder(
    config: LoadConfig, context: LoadContext, manifest: WeightManifest, model_path: str
) -> SeedFinder[Any]:
    """Who finds seeds for one load; with `config` and `context` bound, a FinderMaker for get_model_loader.

    Args:
        context: the instance that the weights are for.
        manifest: what the rank needs.
        model_path: the model's folder.

    Raises:
        ValueError: if there is neither an address nor a metadata server, or what the latter needs can't be used.
    """
    if config.modelexpress_url is None:
        return SeedsByAddress(config, manifest)
    check_installed()
    from ramet.srt.modelexpress.client.seed_search import make_seed_search  # needs grpc

    return make_seed_search(config, context, manifest, model_path)
