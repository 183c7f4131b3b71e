"""Owns rotary position embeddings: the angles of a batch's positions and their application to queries and keys."""

import math

import torch

from ramet.srt.configs.model_config import RopeConfig

CosSin = tuple[torch.Tensor, torch.Tensor]  # of a pass's positions: [num_tokens, 1, head_dim / 2] each


def inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """float32 [head_dim / 2]: theta^(-2i / head_dim) (Su et al., 2021), rescaled by the config's rope type."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    frequencies = 1.0 / (config.theta**exponents)
    if config.rope_type == "linear":
        return frequencies / config.scaling["factor"]
    if config.rope_type == "llama3":
        return _llama3_frequencies(frequencies, config)
    return frequencies


def _llama3_frequencies(frequencies: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Llama 3.1's rule: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    scaling = config.scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    rotations = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]


class RotaryEmbedding:
    """Angles for one model. They are computed once per forward pass and shared by its layers."""

    def __init__(self, config: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.inv_freq = inverse_frequencies(config, head_dim).to(device)
        self.dtype = dtype

    def cos_sin(self, positions: torch.Tensor) -> CosSin:
        """int64 [num_tokens] -> cosines and sines [num_tokens, 1, head_dim / 2] in the model's dtype."""
        angles = positions.float().unsqueeze(-1) * self.inv_freq
        return angles.cos().to(self.dtype).unsqueeze(1), angles.sin().to(self.dtype).unsqueeze(1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [num_tokens, num_heads, head_dim], whose first and second halves hold the two coordinates."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
