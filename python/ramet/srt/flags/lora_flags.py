"""Owns the flags about adapters."""

from dataclasses import dataclass

from ramet.srt.flags.flag import COUNT, flag


@dataclass(frozen=True, kw_only=True)
class LoraFlags:
    """Adapters."""

    enable_lora: bool = flag(
        False,
        "Take LoRA adapters, by --lora-paths and /load_lora_adapter. A clone also takes those that its seeds have.",
    )
    lora_paths: tuple[str, ...] = flag(
        (),
        "Adapters to load at the start, which implies --enable-lora: NAME=PATH, PATH, or a JSON object with lora_name, "
        "lora_path and pinned. PATH is a folder, a hub id, or instance://HOST:PORT for an instance that has the "
        "adapter.",
        aliases=("--lora-modules",),
        several=True,
    )
    max_loras_per_batch: int | None = flag(
        None,
        "Adapters that the requests of one pass may have, 8 when not given: memory for so many is taken at the start. "
        "More can be loaded: they stay in host memory, and requests wait until theirs has a place.",
        limit=COUNT,
        aliases=("--max-loras",),
    )
    max_lora_rank: int | None = flag(
        None,
        "Largest rank of an adapter, and what memory is taken for; 16 when not given, or the largest of the folders "
        "in --lora-paths if that is more.",
        limit=COUNT,
    )
