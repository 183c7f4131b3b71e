"""Owns the way from a model's name to a folder on this machine: a local folder, else a snapshot from the hub."""

import glob
import logging
import os
import re
import time

from ramet.srt.observability.progress_bar import bar_class, shows_bars

logger = logging.getLogger(__name__)

QUICK_S = 1.0
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
# What an instance needs without weights: config, tokenizer, chat template.
METADATA_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model")
WEIGHTLESS_IGNORED = ("*.safetensors.index.json", "*.bin.index.json")

_SNAPSHOT = re.compile(r"/models--((?:(?!--)[^/])+(?:--(?:(?!--)[^/])+)?)/snapshots/[0-9a-f]{40}$")


def resolve_model_path(model: str, revision: str | None = None, weights: bool = True, what: str = "model") -> str:
    """The folder of `model`: `model` itself when it is a folder, else a snapshot of that hub id.

    Args:
        weights: whether the weight files are needed; without them only config and tokenizer are fetched.
        what: "model", or what else lies in such a folder, for messages.

    Raises:
        ValueError: if it is neither a folder nor a model that the hub (or its local cache) gives us.
    """
    if os.path.isdir(model):
        return model
    if os.path.isfile(model):
        raise ValueError(f"{what} path {model} is a file; the folder that holds the {what} is expected")
    if not _looks_like_hub_id(model):
        raise ValueError(f"{what} path {model} does not exist")
    # Imported here: only models that are not on this machine need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not shows_bars():
        disable_progress_bars()  # of single files
    start = time.monotonic()
    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=[*METADATA_PATTERNS, *(WEIGHT_PATTERNS if weights else ())],
            ignore_patterns=None if weights else list(WEIGHTLESS_IGNORED),
            tqdm_class=bar_class(),
        )
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"{what} {model} is neither a folder nor available from the hub: {reason}") from None
    if (seconds := time.monotonic() - start) > QUICK_S:  # not just looked up
        logger.info("fetched %s from the hub to %s in %.1f s", model, folder, seconds)
    return folder


def has_weights(model: str) -> bool:
    """Whether weights of `model` can be read here: from its folder, or from the hub."""
    return bool(glob.glob(os.path.join(glob.escape(model), "*.safetensors"))) or not os.path.isdir(model)


def snapshot_revision(folder: str) -> str | None:
    """The commit of a hub snapshot's folder; None for any other folder."""
    match = re.search(r"/snapshots/([0-9a-f]{40})/?$", os.path.realpath(folder))
    return match[1] if match else None


def canonical_model_name(model: str) -> str:
    """One name for all spellings of a model: of the hub's id and the snapshot in its cache that id, of a folder its
    real path.

    Args:
        model: folder or hub id. A name that is neither, here, stays as it is.
    """
    if not os.path.isdir(model):
        return model
    folder = os.path.realpath(model)
    match = _SNAPSHOT.search(folder)
    return match[1].replace("--", "/") if match else folder


def canonical_given_name(name: str) -> str:
    """A name that was given for a model, which need not be on this machine; as above if it is written as a folder."""
    is_folder = name.startswith((os.sep, ".")) or name.endswith(os.sep)
    return canonical_model_name(name) if is_folder else name


def resolve_tokenizer_path(tokenizer: str | None, model: str, revision: str | None) -> str:
    """The folder of `tokenizer`; without one that of `model`, which is meant by the revision.

    Raises what `resolve_model_path` raises.
    """
    if tokenizer is not None:
        return resolve_model_path(tokenizer, weights=False)
    return resolve_model_path(model, revision, weights=False)


def _looks_like_hub_id(model: str) -> bool:
    """Whether `model` is a name or owner/name, not a file path."""
    parts = model.split("/")
    return len(parts) <= 2 and all(part and part not in (".", "..") for part in parts) and not model.startswith("~")
