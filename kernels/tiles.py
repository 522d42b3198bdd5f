"""Which Gaussians touch which tile, front to back.

A Gaussian's box (mean -+ radius) covers a rectangle of tiles, and makes one pair with each of them:

    count   how many pairs each tile has; an exclusive sum gives each tile its range of the list
    place   each pair somewhere in its tile's range, as one key: depth bits << 32 | Gaussian
    sort    runs of RUN keys within each range, a program each; a key's place is how many keys of
            its run are smaller
    merge   neighbouring runs, twice as long every pass, until the longest tile has one run; a key's
            place is its place in its own run and how many keys of the other run are smaller

Depths are positive, and the bits of positive floats sort as the floats do. Where a pair is placed
depends on timing, but no two keys of a tile are equal. So the sorted list is the same on every run,
bit for bit, and ties in depth go by index. Nothing here is differentiable.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # Gaussians per program
RUN = 256  # keys that a program sorts, at most, in RUN^2 comparisons; not timed yet
NEVER = tl.constexpr(2**63 - 1)  # sorts behind every key


@triton.jit
def pixel_span(mean, radius, size):
    """Pixels [first, past) of 0..size - 1 whose centres lie within mean -+ radius along one axis,
    wider by a hundredth of a pixel: rounding may list a tile too many, never one too few."""
    # Clamped while still float: a mean far outside the image overflows an int
    first = tl.ceil(tl.minimum(tl.maximum(mean - radius - 0.51, 0.0), size))
    last = tl.floor(tl.minimum(tl.maximum(mean + radius - 0.49, -1.0), size - 1))
    return first.to(tl.int32), last.to(tl.int32) + 1


@triton.jit
def pair_kernel(
    means2d_ptr,  # [I, N, 2]
    radii_ptr,  # [I, N, 2]; -1: not visible
    depths_ptr,  # [I, N]; read if PLACE
    next_ptr,  # [I * tiles] int64: how many pairs each tile has; its next free place if PLACE
    keys_ptr,  # out [P] int64: depth bits << 32 | index in 0..N-1; written if PLACE
    size,  # I * N
    N, width, height, tiles_x, tiles_y,
    TILE: tl.constexpr, BLOCK: tl.constexpr, PLACE: tl.constexpr,
):  # fmt: skip
    """Count the pairs of every tile or, with PLACE, write them."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    rx = tl.load(radii_ptr + at * 2, valid, -1.0)
    ry = tl.load(radii_ptr + at * 2 + 1, valid, -1.0)
    x0, x1 = pixel_span(tl.load(means2d_ptr + at * 2, valid, 0.0), rx, width)
    y0, y1 = pixel_span(tl.load(means2d_ptr + at * 2 + 1, valid, 0.0), ry, height)
    left, top = x0 // TILE, y0 // TILE
    across, down = (x1 + TILE - 1) // TILE - left, (y1 + TILE - 1) // TILE - top
    seen = valid & (rx >= 0) & (x1 > x0) & (y1 > y0)
    count = tl.where(seen, across * down, 0)
    across = tl.maximum(across, 1)  # a divisor below
    if PLACE:
        depth = tl.load(depths_ptr + at, valid, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
        key = (depth << 32) | (at % N)
    for i in range(tl.max(count, 0)):  # lanes whose Gaussian is done sit idle
        tile = (at // N * tiles_y + top + i // across) * tiles_x + left + i % across
        place = tl.atomic_add(next_ptr + tile, 1, i < count, sem="relaxed")
        if PLACE:
            tl.store(keys_ptr + place, key, i < count)


@triton.jit
def load_run(ranges_ptr, range_ptr, number_ptr, count, RUN: tl.constexpr):
    """A program's range and where in the keys its run begins; 0, 0 and 0 without a run."""
    r = tl.load(range_ptr + tl.program_id(0))
    start = tl.load(ranges_ptr + r * 2, r < count, 0)
    end = tl.load(ranges_ptr + r * 2 + 1, r < count, 0)
    return start, end, start + tl.load(number_ptr + tl.program_id(0)) * RUN


@triton.jit
def sort_kernel(
    keys_ptr,  # [P] int64
    sorted_ptr,  # out [P] int64: in each range runs of RUN keys, sorted
    ranges_ptr,  # [R, 2] int64
    range_ptr,  # [programs] int64: which range a program's run lies in; R for none
    number_ptr,  # [programs] int64: which run of that range it is
    count,  # R
    RUN: tl.constexpr,
):
    start, end, first = load_run(ranges_ptr, range_ptr, number_ptr, count, RUN)
    end = tl.minimum(end, first + RUN)
    i = first + tl.arange(0, RUN)
    key = tl.load(keys_ptr + i, i < end, NEVER)
    place = tl.zeros([RUN], tl.int32)
    for j in range(first, end, 16):
        other = tl.load(keys_ptr + j + tl.arange(0, 16), j + tl.arange(0, 16) < end, NEVER)
        place += tl.sum((other[None, :] < key[:, None]).to(tl.int32), 1)
    tl.store(sorted_ptr + first + place, key, i < end)


@triton.jit
def merge_kernel(
    keys_ptr,  # [P] int64: in each range runs of `length` keys, sorted
    merged_ptr,  # out [P] int64: runs of 2 * length
    ranges_ptr, range_ptr, number_ptr, count,  # as sort_kernel's; a program merges RUN keys
    length,
    steps,  # of the binary search: bits of length
    RUN: tl.constexpr,
):  # fmt: skip
    start, end, first = load_run(ranges_ptr, range_ptr, number_ptr, count, RUN)
    i = first - start + tl.arange(0, RUN)  # within the range
    valid = start + i < end
    key = tl.load(keys_ptr + start + i, valid, 0)
    run = i // length
    other = start + (run ^ 1) * length  # the pair's other run, which may be cut short or missing
    low, high = other, tl.minimum(other + length, end)
    for _ in range(steps):
        middle = (low + high) // 2
        open = valid & (low < high)
        smaller = open & (tl.load(keys_ptr + middle, open, NEVER) < key)
        low = tl.where(smaller, middle + 1, low)
        high = tl.where(open & (smaller == 0), middle, high)
    tl.store(merged_ptr + start + (i - run % 2 * length) + (low - other), key, valid)


# A CUDA graph cannot hold it: the host reads how long the lists are
@torch.library.custom_op("splat::list_tiles", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def list_tiles(
    means2d: Tensor, depths: Tensor, radii: Tensor, width: int, height: int, tile: int
) -> tuple[Tensor, Tensor]:
    """Means2d [I, N, 2], depths [I, N] and radii [I, N, 2] (-1: not visible) of I images,
    contiguous float32, all but depths in pixels; tiles are square, `tile` pixels wide.

    Returns gaussians [P] int32, every tile's Gaussians (0..N-1) front to back, and ranges
    [I * tiles_y * tiles_x, 2] int64, where each tile's lie, row by row. Waits for the device once,
    to learn P and the longest list.
    """
    I, N = depths.shape
    tiles_x, tiles_y = triton.cdiv(width, tile), triton.cdiv(height, tile)
    counts = torch.zeros(I * tiles_y * tiles_x, dtype=torch.int64, device=depths.device)
    if I * N == 0:
        return counts.new_empty(0, dtype=torch.int32), counts.new_zeros(len(counts), 2)

    def pairs(next_place, keys, PLACE):
        pair_kernel[(triton.cdiv(I * N, BLOCK),)](
            means2d, radii, depths, next_place, keys, I * N, N, float(width), float(height),
            tiles_x, tiles_y, TILE=tile, BLOCK=BLOCK, PLACE=PLACE,
        )  # fmt: skip

    with torch.cuda.device_of(depths):  # triton launches on the current device
        pairs(counts, None, PLACE=False)
        ends = counts.cumsum(0)
        ranges = torch.stack([ends - counts, ends], 1)
        P, longest = torch.stack([ends[-1], counts.max()]).tolist()
        keys = counts.new_empty(P)
        if P:
            pairs(ends - counts, keys, PLACE=True)
            keys = sort_ranges(keys, ranges, longest)
    return keys.int(), ranges  # the lower half of a key is the Gaussian


@list_tiles.register_fake
def _(means2d, depths, radii, width, height, tile):
    P = torch.library.get_ctx().new_dynamic_size()
    tiles = depths.shape[0] * triton.cdiv(width, tile) * triton.cdiv(height, tile)
    ranges = depths.new_empty(tiles, 2, dtype=torch.int64)
    return depths.new_empty(P, dtype=torch.int32), ranges


def sort_ranges(keys, ranges, longest):
    """Keys [P] int64 sorted within every range of ranges [R, 2], the longest of which is `longest`.

    No two keys of a range are equal. Returns [P]; overwrites the keys.
    """
    run = min(RUN, max(16, triton.next_power_of_2(longest)))
    runs = (ranges[:, 1] - ranges[:, 0] + run - 1) // run
    ends = runs.cumsum(0)
    # There are at most P / RUN + R runs. Only the device knows which, and is not waited for
    program = torch.arange(len(keys) // run + len(ranges), device=keys.device)
    owner = torch.searchsorted(ends, program, right=True)
    number = program - (ends - runs)[owner.clamp(max=len(ranges) - 1)]
    of_program = ranges, owner, number, len(ranges)
    done = torch.empty_like(keys)
    sort_kernel[(len(program),)](keys, done, *of_program, RUN=run)
    length = run
    while length < longest:
        keys, done = done, keys
        steps = length.bit_length()
        merge_kernel[(len(program),)](keys, done, *of_program, length, steps, RUN=run)
        length *= 2
    return done
