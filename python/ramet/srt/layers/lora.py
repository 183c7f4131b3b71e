"""Owns what adapters add to a linear layer's output: their matrices in slots, and the slot of each token of a pass.

The slots lie at fixed addresses from the start on, so that CUDA graphs can read them; what is in them changes between
passes. A rank holds of A and B what it holds of the layer's own matrix: of a matrix whose rows are split those rows of
B, of one whose columns are split those columns of A, so that the layer's own sum over the ranks is the adapters', too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.utils.device import to_device
from ramet.srt.weights.manifest import WeightBox

NO_SLOT = -1  # of a token whose request has no adapter
WEIGHT_SUFFIX = ".weight"
BLOCK_OUTPUTS = 512  # outputs of one part that a kernel's program makes


class LoraTokens:
    """Which slot each token of the pass under way takes: one object for all layers of a model.

    Args:
        num_captured: tokens that a captured pass has at most; 0: none is captured.
    """

    def __init__(self, num_captured: int, num_slots: int, device: torch.device):
        self._num_slots = num_slots
        self._fixed = torch.zeros(num_slots + 1 + num_captured, dtype=torch.int32, device=device)
        self._device = device
        # int32: where the tokens of each slot begin in what follows, and where the last ones end; then at least all
        # tokens of the pass, sorted by their slots.
        self.by_slot = self._fixed
        self.groups: list[tuple[int, torch.Tensor | None]] = []  # on CPUs: a slot, and its tokens; None: all of them
        self.is_empty = True  # no token has a slot

    def begin(self, slots: np.ndarray | None) -> None:
        """A pass begins that launches its kernels.

        Args:
            slots: int32 [num_tokens]; None if no token has one.
        """
        self.is_empty = slots is None
        self.groups = []
        if slots is None:
            return
        if self._device.type == "cpu":
            present = [int(slot) for slot in np.unique(slots) if slot != NO_SLOT]
            is_alone = len(present) == 1 and bool((slots != NO_SLOT).all())
            self.groups = [
                (slot, None if is_alone else torch.from_numpy(np.flatnonzero(slots == slot))) for slot in present
            ]
        self.by_slot = to_device(sort_by_slot(slots, self._num_slots), torch.int32, self._device)

    def begin_capture(self) -> None:
        """A pass begins that is captured: it reads what `stage` has put there before each replay."""
        self.is_empty = False
        self.by_slot = self._fixed

    def stage(self, slots: np.ndarray | None) -> None:
        """Put the slots of the next replay's tokens where captured passes read them; those behind them get none."""
        padded = np.zeros(len(self._fixed), dtype=np.int32)
        if slots is not None:
            num_captured = len(padded) - self._num_slots - 1
            by_slot = sort_by_slot(slots[:num_captured], self._num_slots)
            padded[: len(by_slot)] = by_slot
        self._fixed.copy_(to_device(padded, torch.int32, self._device))

    def has_rows(self, number: int) -> bool:
        """Whether the pass under way may have so many tokens: one that is captured has at most those of the longest."""
        num_tokens = len(self.by_slot) - self._num_slots - 1
        return number <= num_tokens if self.by_slot is self._fixed else number == num_tokens


def sort_by_slot(slots: np.ndarray, num_slots: int) -> np.ndarray:
    """See LoraTokens.by_slot.

    Args:
        slots: int32 [num_tokens], NO_SLOT or below num_slots.
    """
    order = np.argsort(slots, kind="stable")
    starts = np.searchsorted(slots[order], np.arange(num_slots + 1))
    return np.concatenate([starts, order]).astype(np.int32)


@dataclass(frozen=True)
class LoraPart:
    """One checkpoint matrix among those that a layer computes as one."""

    name: str  # of the matrix, without ".weight"
    columns: tuple[int, int]  # of the matrix, which this rank has
    rows: tuple[tuple[int, int], ...]  # of the matrix, piece by piece
    outputs: tuple[tuple[int, int], ...]  # where each piece stands in the layer's output

    @property
    def num_rows(self) -> int:
        return sum(stop - start for start, stop in self.rows)


def parts_of(matrices: Sequence[WeightBox]) -> list[LoraPart]:
    """The checkpoint matrices of a layer, in the order of its output."""
    pieces: dict[tuple[str, tuple[int, int]], list[WeightBox]] = {}
    for box in matrices:
        pieces.setdefault((box.checkpoint_name, box.source[1]), []).append(box)
    return [
        LoraPart(
            name.removesuffix(WEIGHT_SUFFIX),
            columns,
            tuple(box.source[0] for box in boxes),
            tuple(box.target[0] for box in boxes),
        )
        for (name, columns), boxes in pieces.items()
    ]


class LoraSlots:
    """The slots of one layer.

    Args:
        parts: of the layer; see parts_of.
        dtype: of the model, in which the products are computed.
    """

    def __init__(
        self,
        parts: Sequence[LoraPart],
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
        tokens: LoraTokens,
    ):
        self.parts = parts
        self._tokens = tokens
        first, last = parts[0].columns
        num_outputs = max(stop for part in parts for _, stop in part.outputs)
        size = (num_slots, len(parts), max_rank, last - first)
        self.a = torch.zeros(size, dtype=dtype, device=device)
        self.b = torch.zeros((num_slots, num_outputs, max_rank), dtype=dtype, device=device)
        # Of each slot and part; 0 where the slot's adapter has nothing for the part.
        self.scales = torch.zeros((num_slots, len(parts)), dtype=torch.float32, device=device)
        self._in_use = [[(0, 0.0) for _ in parts] for _ in range(num_slots)]  # the same on the host: rank and scale
        blocks = [
            (place, start, min(start + BLOCK_OUTPUTS, stop))
            for place, part in enumerate(parts)
            for first, stop in part.outputs
            for start in range(first, stop, BLOCK_OUTPUTS)
        ]
        self.blocks = torch.tensor(blocks, dtype=torch.int32, device=device)  # [num_blocks, part, first, stop]

    def clear(self, slot: int) -> None:
        """Let a slot add nothing."""
        self.scales[slot].zero_()
        self._in_use[slot] = [(0, 0.0) for _ in self.parts]

    def put(self, slot: int, place: int, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        """Let a slot add scale * B A to part `place`.

        Args:
            a: [rank, columns of this rank]; any floating-point type.
            b: [rows of this rank, rank], the pieces of the part one behind the other.
        """
        rank = len(a)
        self.a[slot, place, :rank].copy_(a)
        self.a[slot, place, rank:].zero_()
        start = 0
        for first, stop in self.parts[place].outputs:
            self.b[slot, first:stop, :rank].copy_(b[start : start + stop - first])
            self.b[slot, first:stop, rank:].zero_()
            start += stop - first
        self.scales[slot, place] = scale
        self._in_use[slot][place] = rank, scale

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y, the layer's output [num_tokens, outputs of this rank], with what the adapters add, in place.

        Args:
            x: the layer's input [num_tokens, columns of this rank].
        """
        if self._tokens.is_empty:
            return y
        if use_kernels(x):
            from ramet.srt.layers.kernels.lora import add_adapters

            assert self._tokens.has_rows(len(x)), "rows of another pass than the one that has begun"
            add_adapters(
                x.contiguous(), y, self._tokens.by_slot, self.a, self.b, self.scales, self.blocks, BLOCK_OUTPUTS
            )
            return y
        for slot, tokens in self._tokens.groups:
            self._add_slot(slot, x if tokens is None else x[tokens], y, tokens)
        return y

    def _add_slot(self, slot: int, x: torch.Tensor, y: torch.Tensor, tokens: torch.Tensor | None) -> None:
        for place, (rank, scale) in enumerate(self._in_use[slot]):
            if rank == 0:
                continue
            inner = (F.linear(x, self.a[slot, place, :rank]).float() * scale).to(x.dtype)
            for first, stop in self.parts[place].outputs:
                more = F.linear(inner, self.b[slot, first:stop, :rank])
                if tokens is None:
                    y[:, first:stop] += more
                else:
                    y[tokens, first:stop] += more


def slots_nbytes(parts: Sequence[LoraPart], num_slots: int, max_rank: int, itemsize: int) -> int:
    """Bytes of a layer's slots: known before they are made."""
    num_columns = sum(part.columns[1] - part.columns[0] for part in parts)
    num_rows = sum(part.num_rows for part in parts)
    return num_slots * max_rank * (num_columns + num_rows) * itemsize
