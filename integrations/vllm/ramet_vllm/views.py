"""Owns where a view lies in its tensor, as a region. Pure: knows sizes and strides, no tensors."""

from collections.abc import Sequence

from ramet.srt.weights.boxes import Region, contiguous_strides


class NoRegion(ValueError):
    """A view is no region of its tensor, or walks it in another order."""


def locate_view(offset: int, sizes: Sequence[int], strides: Sequence[int], shape: Sequence[int]) -> Region:
    """Which part of a row-major tensor a view shows, that has at least one element.

    Args:
        offset, strides: of the view, in elements of the tensor.
        shape: of the tensor.

    Returns:
        One (start, stop) for each dimension of the tensor.

    Raises:
        NoRegion: if the view turns the tensor round, takes steps, repeats elements, or lies across rows.
    """
    steps = contiguous_strides(shape, 1)
    starts, rest = [], offset
    for step in steps:
        start, rest = divmod(rest, step)
        starts.append(start)
    region = [(start, start + 1) for start in starts]
    last = -1  # dimension that has been walked
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        dim = next((d for d, step in enumerate(steps) if step == stride and shape[d] > 1), None)
        if dim is None or dim <= last:
            raise NoRegion("it is turned round, repeated, or taken in steps")
        walked, left = dim, size
        while left > shape[walked] and starts[walked] == 0 and left % shape[walked] == 0:  # all of it, and of others
            region[walked] = (0, shape[walked])
            left //= shape[walked]
            walked = next((d for d in range(walked - 1, last, -1) if shape[d] > 1), -1)
            if walked < 0:
                raise NoRegion("it is larger than its tensor")
        region[walked] = (starts[walked], starts[walked] + left)
        if region[walked][1] > shape[walked]:
            raise NoRegion("it lies across rows")
        last = dim
    return tuple(region)
