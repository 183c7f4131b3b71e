"""Owns rotary position embeddings: the angles of a batch's positions and their application to queries and keys."""

import math
from typing import NamedTuple

import torch

from ramet.srt.configs.rope_config import ORIGINAL_LENGTH, RopeConfig
from ramet.srt.layers.kernels.runtime import use_kernels


class Rotation(NamedTuple):
    """What a pass's positions do to queries and keys."""

    cos: torch.Tensor  # [num_tokens, 1, rotary_dim / 2]
    sin: torch.Tensor  # like cos
    query_scale: torch.Tensor | None = None  # [num_tokens, 1, 1]


def inverse_frequencies(config: RopeConfig, head_dim: int, *, is_long: bool = False) -> torch.Tensor:
    """float32 [rotary_dim / 2]: theta^(-2i / rotary_dim) (Su et al., 2021), rescaled by the config's rope type.

    Dynamic scaling begins beyond the model's length, where no position is.

    Args:
        is_long: of LongRoPE's two sets, the one for sequences beyond the original length.
    """
    rotary_dim = config.rotary_dim(head_dim)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device="cpu").float() / rotary_dim
    frequencies = 1.0 / (config.theta**exponents)
    if config.rope_type == "longrope":
        divisors = torch.tensor(config.scaling["long_factor" if is_long else "short_factor"], device="cpu")
        return 1.0 / (divisors * config.theta**exponents)
    if config.rope_type == "linear":
        return frequencies / config.scaling["factor"]
    if config.rope_type == "llama3":
        return _llama3_frequencies(frequencies, config)
    if config.rope_type == "yarn":
        return _yarn_frequencies(config, config.theta**exponents, rotary_dim)
    return frequencies


def _llama3_frequencies(frequencies: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Llama 3.1's rule: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    scaling = config.scaling
    low, high, length = (
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
        scaling["original_max_position_embeddings"],
    )
    wavelengths = 2 * math.pi / frequencies
    # In the order in which transformers computes it: at far positions the last bit of a frequency shows.
    share = (length / wavelengths - low) / (high - low)
    divided = frequencies / scaling["factor"]
    between = (1 - share) * frequencies / scaling["factor"] + share * frequencies
    long = torch.where(wavelengths > length / low, divided, between)
    return torch.where(wavelengths < length / high, frequencies, long)


def _yarn_frequencies(config: RopeConfig, powers: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """YaRN (Peng et al., 2023): pairs that turn often over the original length are kept, slow ones divided by `factor`.

    Between `beta_fast` and `beta_slow` turns the share of the kept ones falls linearly with the pair's number.

    Args:
        powers: theta^(2i / rotary_dim), float32 [rotary_dim / 2].
    """
    scaling = config.scaling

    def pair_of(turns: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    first, last = pair_of(scaling["beta_fast"]), pair_of(scaling["beta_slow"])
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    if first == last:
        last += 0.001
    kept = 1 - ((torch.arange(rotary_dim // 2, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(0, 1)
    # In the order in which transformers computes it: at far positions the last bit of a frequency shows.
    return 1.0 / (scaling["factor"] * powers) * (1 - kept) + 1.0 / powers * kept


class RotaryEmbedding:
    """Angles for one model. They are computed once per forward pass and shared by its layers."""

    def __init__(self, config: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.inv_freq = inverse_frequencies(config, head_dim).to(device)
        self.long_inv_freq: torch.Tensor | None = None
        if config.switch_len is not None:
            self.long_inv_freq = inverse_frequencies(config, head_dim, is_long=True).to(device)
        self.scale = config.attention_factor
        self.query_beta = config.query_beta
        self.original_length = config.scaling.get(ORIGINAL_LENGTH, 0.0)
        self.dtype = dtype

    def cos_sin(self, positions: torch.Tensor, is_long: torch.Tensor | None = None) -> Rotation:
        """int64 [num_tokens] -> the positions' rotation, in the model's dtype.

        Args:
            is_long: bool [num_tokens]; see ForwardBatch.
        """
        query_scale = None
        if self.query_beta:
            growth = torch.log(1 + torch.floor(positions / self.original_length))
            query_scale = (1 + self.query_beta * growth).to(self.dtype).view(-1, 1, 1)
        if use_kernels(positions):
            from ramet.srt.layers.kernels.cos_sin import cos_sin

            sets = (self.long_inv_freq, is_long)
            return Rotation(*cos_sin(positions, self.inv_freq, self.scale, self.dtype, *sets), query_scale)
        frequencies = self.inv_freq
        if self.long_inv_freq is not None and is_long is not None:
            frequencies = torch.where(is_long.unsqueeze(-1), self.long_inv_freq, self.inv_freq)
        angles = positions.float().unsqueeze(-1) * frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.scale != 1:
            cos, sin = cos * self.scale, sin * self.scale
        return Rotation(cos.to(self.dtype).unsqueeze(1), sin.to(self.dtype).unsqueeze(1), query_scale)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [num_tokens, num_heads, head_dim]: the first columns, whose halves hold the two coordinates."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def apply_rotary_to_neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate all columns of [num_tokens, num_heads, rotary_dim], of which neighbours hold the two coordinates."""
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
