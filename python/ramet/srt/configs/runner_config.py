"""Owns what one rank's model runner, and its weights, need to know of the settings of the instance."""

from dataclasses import dataclass

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.configs.lora_config import LoraConfig

REQUIRED, WANTED, UNUSED = "required", "wanted", "unused"  # wanted: only where the transfer engine is installed


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """What a rank's weights are called, where they come from, and to whom they are offered."""

    name: str  # the model's, among instances that share its weights
    load: LoadConfig
    is_seed: bool  # others may take the weights
    host: str  # address at which they are offered
    control_host: str | None  # of this node, where the instance's main process may be on another one; else None
    admin_api_key: str | None  # with which they are registered; None where the bootstrap server asks for none
    is_published: bool  # at a ModelExpress server
    network: str = REQUIRED  # whether other hosts may read the weights by a transfer engine: one of those above
    check_interval_s: float = 0.0  # from one look at the weights that are offered to the next; 0: nobody looks
    version: str = "default"  # that seeds must have; "default": any


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """How a rank's model runs on its device. Made by ServerArgs.runner_config, where the values were validated."""

    attention_backend: str
    page_size: int  # tokens
    max_running_requests: int
    max_prefill_tokens: int  # of prompts, in one pass
    max_total_tokens: int | None  # of KV cache; None: as many as fit and can be used
    mem_fraction_static: float  # of the free memory, for weights and KV cache together
    use_cuda_graph: bool
    num_local_ranks: int  # that share the node's processors and memory
    weights: WeightsConfig
    tuning_dir: str | None = None  # files of what was measured of kernels, beside those in the user's cache
    lora: LoraConfig | None = None  # None: there are no adapters
    can_sleep: bool = False  # the memory of weights and KV cache can be given back while their addresses stay
    max_state_slots: int | None = None  # states of linear layers that are kept; None: by memory and requests
    keeps_copy_room: bool = False  # host memory that was taken for the weights of an instance asleep stays taken
