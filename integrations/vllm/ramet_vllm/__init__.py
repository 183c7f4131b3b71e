"""Owns the entry by which vLLM finds the load format `ramet`. Imports nothing until vLLM asks for it."""

LOAD_FORMAT = "ramet"


def register() -> None:
    """Tell vLLM of the load format. vLLM calls this in each of its processes, in some of them more than once."""
    from vllm.model_executor import model_loader

    if LOAD_FORMAT in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        return
    from ramet_vllm.loader import RametModelLoader

    model_loader.register_model_loader(LOAD_FORMAT)(RametModelLoader)
