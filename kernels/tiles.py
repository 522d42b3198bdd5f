"""Which Gaussians touch which tile, front to back.

A Gaussian's box (mean -+ radius) covers a rectangle of tiles and makes one pair with each:

    count   the pairs of each tile; their cumulative sum gives each tile its range of the list
    place   each pair anywhere in its tile's range, as a key: depth bits << 32 | Gaussian
    sort    runs of RUN keys within each range, one program per run
    merge   neighbouring runs, twice as long in each pass, until every range is one run. A key moves
            to its rank: its place in its own run plus the number of smaller keys in the other.
            Tiles of at most RUN pairs, usually all, need no merging

The bits of positive floats sort as the floats do. Where a pair is placed depends on timing, but a
tile's keys are distinct: the sorted list is always the same, and ties in depth go by index.
Nothing here is differentiable.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # Gaussians per program
FEW = 8  # tiles of its Gaussian that a lane lists alone; all lanes share the others
RUN = 512  # keys that a program sorts; tiles of the paper's workload have 286, at most 437
NEVER = tl.constexpr(2**63 - 1)  # sorts behind every key


@triton.jit
def pixel_span(mean, radius, size):
    """Pixels [first, past) of one axis whose centres lie within mean -+ radius, plus 0.01 pixels:
    rounding may add a tile, never lose one."""
    # Clamped before the conversion: a mean far outside the image overflows an int
    first = tl.ceil(tl.minimum(tl.maximum(mean - radius - 0.51, 0.0), size))
    last = tl.floor(tl.minimum(tl.maximum(mean + radius - 0.49, -1.0), size - 1))
    return first.to(tl.int32), last.to(tl.int32) + 1


@triton.jit
def add_pair(next_ptr, keys_ptr, tile, key, todo, PLACE: tl.constexpr):
    """Count a pair or, with PLACE, store its key at the end of what is free of its tile's range."""
    if PLACE:
        left = tl.atomic_add(next_ptr + tile, -1, todo, sem="relaxed")
        tl.store(keys_ptr + left - 1, key, todo)
    else:
        tl.atomic_add(next_ptr + tile, 1, todo, sem="relaxed")


@triton.jit
def of_lane(x, lane):
    """The lane's number of x [BLOCK], as a scalar."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == lane, x, 0), 0)


@triton.jit
def pair_kernel(
    splats_ptr,  # [I, N, 8]: means in the first two
    radii_ptr,  # [I, N, 2]; -1: not visible
    depths_ptr,  # [I, N]; read if PLACE
    next_ptr,  # [I * tiles] int64: the pairs of each tile; with PLACE, where its range ends
    keys_ptr,  # out [P] int64: depth bits << 32 | index in 0..N-1; written if PLACE
    size,  # I * N
    N, width, height, tiles_x, tiles_y,
    TILE: tl.constexpr, BLOCK: tl.constexpr, FEW: tl.constexpr, PLACE: tl.constexpr,
):  # fmt: skip
    """Count the pairs of every tile or, with PLACE, store them, filling ranges from the end."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    rx = tl.load(radii_ptr + at * 2, valid, -1.0)
    ry = tl.load(radii_ptr + at * 2 + 1, valid, -1.0)
    x0, x1 = pixel_span(tl.load(splats_ptr + at * 8, valid, 0.0), rx, width)
    y0, y1 = pixel_span(tl.load(splats_ptr + at * 8 + 1, valid, 0.0), ry, height)
    left, top = x0 // TILE, y0 // TILE
    across, down = (x1 + TILE - 1) // TILE - left, (y1 + TILE - 1) // TILE - top
    seen = valid & (rx >= 0) & (x1 > x0) & (y1 > y0)
    count = tl.where(seen, across * down, 0)
    across = tl.maximum(across, 1)  # a divisor below
    first = (at // N * tiles_y + top) * tiles_x + left
    key = at % N
    if PLACE:
        depth = tl.load(depths_ptr + at, valid, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
        key = (depth << 32) | key

    # Each lane lists the first tiles of its own Gaussian
    for i in range(tl.minimum(tl.max(count, 0), FEW)):
        tile = first + i // across * tiles_x + i % across
        add_pair(next_ptr, keys_ptr, tile, key, i < count, PLACE)
    # All lanes together list the other tiles, of one large Gaussian after another
    lane = tl.arange(0, BLOCK)
    large = tl.min(tl.where(count > FEW, lane, BLOCK), 0)
    while large < BLOCK:
        of_first, of_across = of_lane(first, large), of_lane(across, large)
        of_count, of_key = of_lane(count, large), of_lane(key, large)
        for start in range(FEW, of_count, BLOCK):
            j = start + lane
            tile = of_first + j // of_across * tiles_x + j % of_across
            add_pair(next_ptr, keys_ptr, tile, of_key, j < of_count, PLACE)
        large = tl.min(tl.where((count > FEW) & (lane > large), lane, BLOCK), 0)


@triton.jit
def load_run(offsets_ptr, range_ptr, number_ptr, count, RUN: tl.constexpr):
    """Start and end of the program's range, and the start of its run; zeros if it has none."""
    if range_ptr is None:  # one run per range
        start = tl.load(offsets_ptr + tl.program_id(0))
        end = tl.load(offsets_ptr + tl.program_id(0) + 1)
        first = start
    else:
        r = tl.load(range_ptr + tl.program_id(0))
        start = tl.load(offsets_ptr + r, r < count, 0)
        end = tl.load(offsets_ptr + r + 1, r < count, 0)
        first = start + tl.load(number_ptr + tl.program_id(0)) * RUN
    return start, end, first


@triton.jit
def sort_kernel(
    keys_ptr,  # [P] int64
    sorted_ptr,  # out [P]: sorted runs of RUN keys per range, int64 or their lower halves, int32
    offsets_ptr,  # [R + 1] int64: where each range begins, and the last ends
    range_ptr,  # [programs] int64: the range of a program's run; R: no run. None: program r has r
    number_ptr,  # [programs] int64: the run's number within its range. None: 0
    count,  # R
    RUN: tl.constexpr,
):
    start, end, first = load_run(offsets_ptr, range_ptr, number_ptr, count, RUN)
    end = tl.minimum(end, first + RUN)
    i = first + tl.arange(0, RUN)
    key = tl.sort(tl.load(keys_ptr + i, i < end, NEVER))
    tl.store(sorted_ptr + i, key.to(sorted_ptr.dtype.element_ty), i < end)


@triton.jit
def merge_kernel(
    keys_ptr,  # [P] int64: sorted runs of `length` keys per range
    merged_ptr,  # out [P]: sorted runs of 2 * length, int64 or their lower halves, int32
    offsets_ptr, range_ptr, number_ptr, count,  # as sort_kernel's; a program merges RUN keys
    length,
    steps,  # of the binary search: bits of length
    RUN: tl.constexpr,
):  # fmt: skip
    start, end, first = load_run(offsets_ptr, range_ptr, number_ptr, count, RUN)
    i = first - start + tl.arange(0, RUN)  # within the range
    valid = start + i < end
    key = tl.load(keys_ptr + start + i, valid, 0)
    run = i // length
    other = start + (run ^ 1) * length  # the run to merge with; it may be short or missing
    low, high = other, tl.minimum(other + length, end)
    for _ in range(steps):
        middle = (low + high) // 2
        open = valid & (low < high)
        smaller = open & (tl.load(keys_ptr + middle, open, NEVER) < key)
        low = tl.where(smaller, middle + 1, low)
        high = tl.where(open & (smaller == 0), middle, high)
    place = start + (i - run % 2 * length) + (low - other)
    tl.store(merged_ptr + place, key.to(merged_ptr.dtype.element_ty), valid)


# Not for CUDA graphs: the host reads the length of the lists
@torch.library.custom_op("splat::list_tiles", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def list_tiles(
    splats: Tensor, depths: Tensor, radii: Tensor, bad: Tensor, width: int, height: int, tile: int
) -> tuple[Tensor, Tensor]:
    """Splats [I, N, 8], depths [I, N], radii [I, N, 2] pixels (-1: not visible), contiguous
    float32; bad [1] int32; `tile` pixels wide tiles.

    Returns gaussians [P] int32, each tile's (0..N-1) front to back, and offsets [I * tiles + 1]
    int64: where each tile's list begins, row by row, and the last ends. Waits for the device once.
    Raises NotFinite if bad is not 0.
    """
    I, N = depths.shape
    tiles_x, tiles_y = triton.cdiv(width, tile), triton.cdiv(height, tile)
    R = I * tiles_y * tiles_x
    # counts[r + 1] is tile r's, so that offsets[r + 1] is its range's end
    counts = torch.zeros(R + 1, dtype=torch.int64, device=depths.device)
    if I * N == 0:
        return counts.new_empty(0, dtype=torch.int32), counts

    def pairs(next_place, keys, PLACE):
        pair_kernel[(triton.cdiv(I * N, BLOCK),)](
            splats, radii, depths, next_place, keys, I * N, N, float(width), float(height),
            tiles_x, tiles_y, TILE=tile, BLOCK=BLOCK, FEW=FEW, PLACE=PLACE,
        )  # fmt: skip

    with torch.cuda.device_of(depths):  # triton launches on the current device
        pairs(counts[1:], None, PLACE=False)
        offsets = counts.cumsum(0)
        status = torch.cat([offsets[-1:], counts.max()[None], bad])
        P, longest, bad = status.tolist()
        if bad:
            raise NotFinite("arguments of rasterize are so large that their sums overflow float32")
        keys = counts.new_empty(P)
        if P:
            pairs(offsets[1:].clone(), keys, PLACE=True)
            return sort_ranges(keys, offsets, longest), offsets
    return keys.int(), offsets


class NotFinite(ValueError):
    """An argument has values that are NaN or infinite."""


@list_tiles.register_fake
def _(splats, depths, radii, bad, width, height, tile):
    P = torch.library.get_ctx().new_dynamic_size()
    tiles = depths.shape[0] * triton.cdiv(width, tile) * triton.cdiv(height, tile)
    offsets = depths.new_empty(tiles + 1, dtype=torch.int64)
    return depths.new_empty(P, dtype=torch.int32), offsets


def sort_ranges(keys, offsets, longest):
    """Sort keys [P] int64, distinct in each range, within the ranges of offsets [R + 1].

    longest: the length of the longest range. Returns the keys' lower halves [P] int32, the
    Gaussians; overwrites the keys.
    """
    R, result = len(offsets) - 1, torch.empty_like(keys, dtype=torch.int32)
    run = min(RUN, max(16, triton.next_power_of_2(longest)))
    if longest <= run:
        sort_kernel[(R,)](keys, result, offsets, None, None, R, RUN=run)
        return result
    runs = (offsets.diff() + run - 1) // run
    ends = runs.cumsum(0)
    # There are at most P / run + R runs; reading their number would wait for the device
    program = torch.arange(len(keys) // run + R, device=keys.device)
    owner = torch.searchsorted(ends, program, right=True)
    number = program - (ends - runs)[owner.clamp(max=R - 1)]
    runs_of = offsets, owner, number, R
    done, length = torch.empty_like(keys), run
    sort_kernel[(len(program),)](keys, done, *runs_of, RUN=run)
    while length < longest:
        keys, done = done, result if 2 * length >= longest else keys
        steps = length.bit_length()
        merge_kernel[(len(program),)](keys, done, *runs_of, length, steps, RUN=run)
        length *= 2
    return result
