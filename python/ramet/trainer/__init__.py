"""The trainer's side of changing weights: a training process publishes what it holds, and instances take it.

It needs torch, and starts nothing of the server. See docs/rl.md.
"""

from ramet.trainer.publisher import Published, WeightPublisher
from ramet.trainer.tensors import Slice, Sliced

__all__ = ["Published", "Slice", "Sliced", "WeightPublisher"]
