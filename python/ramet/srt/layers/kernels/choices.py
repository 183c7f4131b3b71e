"""Owns the choices that a measurement can make: which there are, what each may be, and what is chosen for a shape.

A choice is a tile of a kernel, or which of two ways computes a product. A kernel asks `pick` with its default, and gets
that unless something was measured for the shape on such a device; see ramet.srt.layers.tuned_file.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

Value: TypeAlias = tuple[int, ...]
Key: TypeAlias = tuple[int, ...]

KERNELS_VERSION = 1  # raised when what a value means, or how fast it is, changes: what was measured before is void
OTHER, OURS = (0,), (1,)  # of two ways, the library's or the general one, and the kernel that is for such shapes


class Choice:
    """One kind of choice.

    Args:
        key: what the numbers of a shape are called, in the order of `pick`.
        values: all that can be chosen.
    """

    def __init__(self, name: str, key: str, values: Iterable[Value]):
        self.name = name
        self.key = tuple(key.split())
        self.values = tuple(values)
        assert name not in CHOICES and len(set(self.values)) == len(self.values) > 0
        CHOICES[name] = self

    def pick(self, default: Value, *key: int) -> Value:
        """What was measured to be best for a shape, or else the default."""
        assert len(key) == len(self.key)
        if _watchers:
            _watchers[-1].setdefault((self, key), default)
        return _chosen.get((self.name, key), default)


CHOICES: dict[str, Choice] = {}
_chosen: dict[tuple[str, Key], Value] = {}
_watchers: list[dict[tuple[Choice, Key], Value]] = []


def choose_all(measured: Mapping[tuple[str, Key], Value]) -> None:
    """Let kernels of this process take what was measured, and nothing else; before they compute anything."""
    _chosen.clear()
    _chosen.update(measured)


def chosen() -> dict[tuple[str, Key], Value]:
    """What this process takes in place of defaults."""
    return dict(_chosen)


@contextlib.contextmanager
def trying(choice: Choice, key: Key, value: Value) -> Iterator[None]:
    """Let one shape have a value for the length of a with block."""
    place = choice.name, key
    before = _chosen.get(place)
    _chosen[place] = value
    try:
        yield
    finally:
        if before is None:
            del _chosen[place]
        else:
            _chosen[place] = before


@contextlib.contextmanager
def watching() -> Iterator[dict[tuple[Choice, Key], Value]]:
    """What is asked for in a with block, with its defaults, in the order in which it is first asked for."""
    seen: dict[tuple[Choice, Key], Value] = {}
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


def row_class(num_rows: int) -> int:
    """The power of two that stands for so many rows: what is measured for it is taken for all up to it."""
    return 1 << max(0, num_rows - 1).bit_length()


def _combine(*parts: Iterable[Any]) -> list[tuple[Any, ...]]:
    return list(itertools.product(*parts))


def _tensor_tiles(*rows: int) -> list[Value]:
    """(rows, outputs, columns, warps, stages) of 16-bit products in matrix units."""
    tiles = _combine(rows, (64, 128), (64, 128), ((4, 3), (4, 4), (8, 3)))
    return [(*tile[:3], *tile[3]) for tile in tiles]


# (rows, columns, warps) of gemv.Tile. `scales`: 0 none, 1 of rows, 2 of blocks.
GEMV = Choice(
    "gemv", "is_gated rows columns weight_bytes scales num_matrices",
    _combine((1, 2, 4, 8), (512, 1024, 2048), (2, 4, 8)),
)  # fmt: skip
# (splits of the columns, stages); no split is the library's product.
FEW_ROWS = Choice("few_rows", "rows outputs columns", [(0, 0), *_combine((1, 2, 4), (3, 4, 5))])
# (rows, outputs, is_turned, warps, stages) of fp8_blocks.Tile.
FP8_BLOCKS = Choice(
    "fp8_blocks", "rows groups outputs columns",
    [*_combine((16, 32, 64), (64, 128), (1,), (4, 8), (3, 4)), *_combine((64, 128), (64, 128), (0,), (4, 8), (3, 4))],
)  # fmt: skip
FP8_BLOCKS_BY = Choice("fp8_blocks_by", "rows outputs columns", (OTHER, OURS))
GROUPED = Choice("grouped", "rows groups outputs columns weight_bytes", _tensor_tiles(16, 32, 64, 128))
GROUPED_BY = Choice("grouped_by", "rows groups outputs columns weight_bytes", (OTHER, OURS))
EXPERTS_BY = Choice("experts_by", "assignments experts outputs columns weight_bits", (OTHER, OURS))
PACKED = Choice("packed", "rows groups outputs columns bits", _tensor_tiles(16, 32, 64))
# (rows, words, warps) of packed_gemv.Tile.
PACKED_GEMV = Choice(
    "packed_gemv", "is_gated rows words bits group_words num_matrices",
    _combine((2, 4, 8, 16), (64, 128, 256, 512), (2, 4, 8)),
)  # fmt: skip
# packed_row.Tile, of which a thread has one to four words of a row.
PACKED_ROW = Choice(
    "packed_row", "is_gated outputs columns bits num_matrices",
    [tile for tile in _combine((64, 128, 256), (2, 4, 8), (8,), (4,), (4, 8), (2, 4, 8))
     if 32 * tile[4] <= tile[0] * tile[1] <= 4 * 32 * tile[4]],
)  # fmt: skip
PACKED_BY = Choice("packed_by", "rows outputs columns bits", (OTHER, OURS))
# The place in prompts.choice.CANDIDATES, from one on; 0: Ramet's own. `installed` has a bit for each of them.
PROMPTS = Choice("prompts", "heads kv_heads head_dim element_bytes installed", [(place,) for place in range(4)])
# The same of rows.choice.CANDIDATES, for latent attention of requests that decode.
LATENT_ROWS = Choice("latent_rows", "heads page_size element_bytes installed", [(place,) for place in range(3)])
CPU_LINEAR = Choice("cpu_linear", "rows outputs columns", (OTHER, OURS))
