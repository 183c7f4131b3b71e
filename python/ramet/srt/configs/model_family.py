"""Owns the shape of a registry entry: what a model family is, beyond what its configs say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

HIDDEN_ACTS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu")  # those of layers/activation.py
QkNorm = Literal["", "head", "all"]
NormPlacement = Literal["before", "after", "both"]
# Which layers have the window where `layer_types` doesn't say.
WindowRule = Literal[
    "from max_window_layers",
    "every other",
    "every other below",
    "without rotation",
    "but every fourth",
    "but every so many",
]


@dataclass(frozen=True, kw_only=True)
class ExpertTraits:
    """What no key says of a family's experts. Left alone it is Qwen3-MoE."""

    block: str = "mlp"  # what the checkpoint calls a decoder layer's second half
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # an expert's matrices: gate, up, down
    scoring: Literal["softmax", "sigmoid"] = "softmax"  # of the router's logits
    always_normalised: bool = False  # the chosen experts' weights sum to 1, whatever the config says
    correction_bias: str = ""  # the block's tensor that is added to the scores by which experts are chosen, if any
    is_router_float32: bool = False  # in whatever type the model runs
    shared: str = ""  # what the checkpoint calls the expert that all tokens go through, if there is one
    router: str = "gate"  # what the checkpoint calls the router, if it isn't the block itself
    has_biases: bool = False  # at the router's logits, and at each expert's matrices
    # Files have gate and up of all experts of a layer as one tensor, `gate_up_proj`, with their rows in turns, and
    # `down_proj`. Where they are not quantised, the rows of these matrices are columns there.
    is_stacked: bool = False
    shared_gate: str = ""  # the matrix whose sigmoid scales its output, if there is one


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """One architecture: which keys its computation depends on, what they are when the file lacks them, and the rest.

    What is left out is as in Llama.
    """

    architecture: str
    model_type: str
    defaults: Mapping[str, Any]  # None stands for "derived from other keys" or "none"
    null_means: Mapping[str, Any]  # what null stands for, in the keys of `defaults` that may be null
    # What keys outside of `defaults` may hold; goes before HARMLESS_KEYS.
    harmless: Mapping[str, Any] = field(default_factory=dict)
    other_model_types: tuple[str, ...] = ()  # under which models of this class are published, too
    always_qkv_bias: bool = False  # biases on q, k and v whatever the config says
    o_bias_key: str = "attention_bias"
    hidden_act_key: str = "hidden_act"
    qk_norm: QkNorm = ""  # of each head, or of all together
    norms: NormPlacement = "before"  # of attention and MLP
    norm_offset: float = 0.0  # added to each norm's weight
    window_rule: WindowRule = "from max_window_layers"
    has_rope_by_layer_type: bool = False  # Gemma's rule: an object for layers with, and one for those without a window
    rope_types: Mapping[str, str] | None = None  # those that its class takes, and what they mean; None: all, themselves
    has_sinks: bool = False  # a logit for each head that takes part in the softmax of attention, and gives nothing
    always_interleaved: bool = False  # latent attention rotates neighbouring columns, which no key says
    is_index_interleaved: bool = False  # the same of a sparse index
    has_output_gate: bool = False  # of attention: each head has as many columns more, whose sigmoid scales its output
    delta_by_key_head: bool = False  # see DeltaTraits
    scales_embedding: bool = False  # by the square root of the hidden size, rounded to the model's type
    scales_queries: bool = False  # by the logarithm of their position, beyond the original length (Llama 4's rule)
    rope_extras: tuple[str, ...] = ()  # parameters of positions that change nothing here
    prefixes: tuple[str, ...] = ("model.",)  # of the decoder's modules in its class, by one version or another
    is_fused: bool = False  # its class has one matrix for q, k and v, and one for gate and up
    surplus: str = ""  # a regular expression: tensors that its files may hold beside the model's
    mtp_layers_key: str = ""  # how many layers the files may have beyond the model's, to draft tokens with
    experts: ExpertTraits = ExpertTraits()
