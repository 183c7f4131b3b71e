"""Owns what a starting instance does with its weights, for tests and benchmarks, on the toy model of seed_process.

It imports no torch.
"""

import functools
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import seed_process
from ramet.srt.configs.load_config import LoadConfig, LoadContext
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.loader import get_model_loader
from ramet.srt.modelexpress.ages import wall_clock_ms
from ramet.srt.modelexpress.client.client import ModelExpressClient
from ramet.srt.modelexpress.client.publisher import READY
from ramet.srt.modelexpress.client.seed_info import InfoAddress, make_info_url
from ramet.srt.modelexpress.client.seed_search import make_seed_search
from ramet.srt.modelexpress.records import InstanceFacts, build_worker_metadata
from ramet.srt.modelexpress.source_identity import make_source_identity
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.report import Claim, LoadReport
from seed_process import DEFAULTS

OPTIONS: dict[str, Any] = {"timeout_s": 20.0, "fallback": "error", "local_mode": "off"}


class LoadingClient:
    """An empty arena, and a loader for it that asks a metadata server.

    Args:
        address: of the metadata server.
        config: of the toy model, as in seed_process.
        options: of LoadConfig.
    """

    def __init__(self, address: str, config: dict[str, Any] | None = None, **options: Any):
        self._prepare(
            config,
            modelexpress_url=address,
            modelexpress_dtype="float32",
            **{"modelexpress_model_name": "toy", "modelexpress_wait_s": 0.5} | options,
        )

    @classmethod
    def of_seeds(cls, ports: Sequence[int], config: dict[str, Any] | None = None, **options: Any) -> "LoadingClient":
        """One that is told where its seeds are."""
        client = cls.__new__(cls)
        client._prepare(config, seeds=tuple(SeedAddress("127.0.0.1", port) for port in ports), **options)
        return client

    def _prepare(self, config: dict[str, Any] | None, **options: Any) -> None:
        self.config = DEFAULTS | (config or {})
        self.manifest = seed_process.make_manifest(self.config)
        self.arena = allocate_arena(self.manifest, "cpu")
        self.load_config = LoadConfig(load_format="remote_instance", **OPTIONS | options)
        make_finder = functools.partial(make_seed_search, self.load_config, LoadContext())
        self.loader = get_model_loader(self.load_config, make_finder if self.load_config.modelexpress_url else None)
        self.claim: Claim | None = None  # what is left of the last load

    def load(self, folder: str | Path = "/nonexistent") -> LoadReport:
        report, self.claim = self.loader.load_weights(self.manifest, self.arena, str(folder))
        return report

    def release_claim(self) -> None:
        if self.claim is not None:
            self.claim.release()

    def publish(
        self,
        port: int,
        session_id: str = "",
        address: int = 0,
        load: float | None = None,
        started_at: float = 0.0,
        **changes: Any,
    ) -> str:
        """A READY record of a seed whose HTTP port is `port`; its worker id.

        Args:
            port: 0 for a record as upstream's first integration has it.
            address: of the seed's arena.
            load: how busy the seed is.
            started_at: when its instance was launched.
            changes: fields of the record.
        """
        info_url = make_info_url(InfoAddress("127.0.0.1", port, 0, self.manifest.role)) if port else ""
        worker = build_worker_metadata(
            self.manifest,
            base_address=address,
            session_id=session_id,
            info_url=info_url,
            facts=InstanceFacts(instance=f"http://127.0.0.1:{port}", started_at=started_at),
        )
        worker.status, worker.updated_at = READY, wall_clock_ms()
        if not port:
            worker.topology.clear()
            for tensor in (*worker.tensors, *worker.tensor_source.tensors):
                tensor.ClearField("dtype")
        for name, value in changes.items():
            setattr(worker, name, value)
        worker_id = uuid.uuid4().hex
        with ModelExpressClient(self.load_config.modelexpress_url) as client:
            source_id = client.publish(make_source_identity(self.load_config, self.manifest), worker_id, worker)
            if load is not None:
                client.update_status(source_id, worker_id, 0, READY, load)
        return worker_id

    def holds(self, config: dict[str, Any] | None = None) -> bool:
        """Whether the arena has the numbers of that toy model."""
        return seed_process.holds(self.arena, seed_process.make_tensors(self.config | (config or {})))
