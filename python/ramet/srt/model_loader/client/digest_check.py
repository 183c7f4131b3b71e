"""Owns what a client insists on: the digest of the checkpoint, and who may tell the table of hashes behind it."""

import logging
from collections.abc import Mapping, Sequence

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.digest_store import FILES, checkpoint_nbytes, find_table, load_table
from ramet.srt.model_loader.client.band_check import check_bands, find_held
from ramet.srt.model_loader.client.seed_instance import SeedInstance
from ramet.srt.model_loader.client.transfer import combine_errors
from ramet.srt.model_loader.client.verification import ChecksumMismatch
from ramet.srt.model_loader.remote_instance_weight_loader_utils import fetch_digest_tensors
from ramet.srt.utils.hub import resolve_model_path
from ramet.srt.weights.content_digest import DigestTable, build_table
from ramet.srt.weights.errors import WeightTransferError, name_some
from ramet.srt.weights.manifest import WeightManifest

logger = logging.getLogger(__name__)

# Files of at most so many bytes are read for their digest, if nobody has computed it, before weights from a stranger
# are taken, which is soon done. Of larger ones samples are compared: reading all would cost what taking saves.
MAX_UNASKED_BYTES = 64 << 20


class DigestCheck:
    """One rank's insistence, for one load.

    A digest that was given (`is_required`) holds for weights from everybody. Without one, the digest of the own files
    holds for weights from whoever is listed at a metadata server, if it is known or quickly computed. What then can't
    be compared, because it is converted while it is loaded, is said, and taken.
    """

    def __init__(self, config: LoadConfig, model_path: str, rank: int) -> None:
        """
        Args:
            model_path: folder of the model, with or without weights.
        """
        self.is_required = config.weights_digest is not None
        self.digest = "" if config.weights_digest in (None, FILES) else str(config.weights_digest)
        self._config = config
        self._model_path = model_path
        self._rank = rank
        self._table: DigestTable | None = None
        self._is_ready = False

    def prepare(self, seeds: Sequence[SeedInstance], manifest: WeightManifest) -> list[SeedInstance]:
        """Get the table, before anything is transferred.

        Args:
            manifest: of the arena that is to be filled.

        Returns:
            The seeds that don't say themselves that they have other weights.

        Raises:
            WeightTransferError: if there are none, or a table is needed and nobody has the right one; or a digest is
                required and there are weights that can't be compared with it, whoever gives them.
            ValueError: if the digest of the own files is wanted and they can't be read.
        """
        if not self._is_ready:
            self._table = self._own_table()
            self._is_ready = True
        if self._table is not None:
            self.digest = self._table.digest
        if not self.digest:
            return list(seeds)
        errors, fitting = [], []
        for seed in seeds:
            said = {rank.answer.weights_digest for rank in seed.ranks} - {"", self.digest}
            if said:
                cause = f"it says that its weights have the digest {said.pop()[:64]!r}, not {self.digest}"
                errors.append(WeightTransferError("agree", self._rank, seed.name, cause))
            else:
                fitting.append(seed)
        if fitting and self._table is None:
            self._table = self._ask_for_table(fitting)
        if not fitting:
            raise combine_errors(self._rank, errors)
        if self.is_required and self._table is not None:
            unchecked = find_held(manifest, self._table)[1]
            if unchecked:
                raise WeightTransferError("agree", self._rank, fitting[0].name, self._describe(unchecked))
        return fitting

    def _describe(self, unchecked: Mapping[str, str]) -> str:
        reasons = list(unchecked.values())
        return f"{len(reasons)} tensors can't be compared with the digest {self.digest}: {name_some(reasons)}"

    def use_files(self, folder: str) -> None:
        """Take the table from files that are to complete what seeds have sent, if a digest is required.

        Raises:
            ValueError: if they have another digest, or can't be read.
        """
        if self.is_required and self._table is None:
            table = load_table(folder)
            if self.digest not in ("", table.digest):
                raise ValueError(f"the weights in {folder} have the digest {table.digest}, not {self.digest}")
            self._table, self.digest = table, table.digest

    def compare(self, arena: WeightArena, seed: str) -> bool:
        """Compare all that the arena holds.

        Returns:
            Whether all of it could be compared.

        Raises:
            ChecksumMismatch: if something differs.
            WeightTransferError: if a digest is required and something can't be compared.
        """
        if self._table is None:
            return False
        check = check_bands(arena, self._table)
        wrong = [entry for entry in arena.manifest.entries if entry.name in check.wrong]
        if wrong:
            raise ChecksumMismatch(self._rank, seed, wrong, self._table.digest)
        if not check.unchecked:
            arena.content_digest = self._table
            return True
        what = self._describe(check.unchecked)
        if self.is_required:
            raise WeightTransferError("verify", self._rank, seed, what)
        logger.warning("rank %d: of the weights from %s %s", self._rank, seed, what)
        return False

    def _own_table(self) -> DigestTable | None:
        """That of the own files, where it is wanted, or known, or quickly computed."""
        config = self._config
        if config.is_update:
            return None
        if config.weights_digest == FILES:
            return load_table(resolve_model_path(config.model_path or self._model_path, config.revision))
        try:
            table = find_table(self._model_path)
            if self.is_required:
                return table if table is not None and table.digest == self.digest else None
            if config.modelexpress_url is None:
                return None
            if table is None and checkpoint_nbytes(self._model_path) <= MAX_UNASKED_BYTES:
                table = load_table(self._model_path)
            return table
        except ValueError as error:
            logger.debug("rank %d: no digest of own files: %s", self._rank, error)
            return None

    def _ask_for_table(self, seeds: Sequence[SeedInstance]) -> DigestTable:
        """From the first seed that has the right one: what it hashes to tells."""
        errors = []
        for seed in seeds:
            rank = seed.ranks[0].answer
            try:
                tensors = fetch_digest_tensors(seed.server, rank.rank, rank.role, self._config.timeout_s)
                table = build_table(tensors)
                if table.digest == self.digest:
                    return table
                cause = f"its table of hashes has the digest {table.digest}, not {self.digest}"
                errors.append(WeightTransferError("verify", self._rank, seed.name, cause))
            except ValueError as error:
                errors.append(WeightTransferError("verify", self._rank, seed.name, error))
            except WeightTransferError as error:
                errors.append(error)
        raise combine_errors(self._rank, errors)
