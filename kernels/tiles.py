"""Which Gaussians touch which tile, front to back.

A Gaussian's box (mean -+ radius) covers a rectangle of tiles, and makes one pair with each of them. Four steps:

    count   how many pairs each tile has; an exclusive sum of the counts gives each tile its range of the list
    place   each pair somewhere in its tile's range, as one key:  depth bits << 32 | index of the Gaussian
    sort    runs of RUN keys within each range, a program each: a key's place is how many of its run are smaller
    merge   neighbouring runs, twice as long every pass, until the longest tile's is one: a key's place is its place in
            its own run and how many of the other are smaller, which a binary search tells

Depths are positive, and the bits of positive floats sort as the floats do. Where a pair is placed depends on who comes
first, but no two keys of a tile are equal, so that the sorted list is the same, bit for bit, on every run, and ties in
depth go by index. Nothing here is differentiable: which Gaussians to blend is a choice, not a value.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128  # Gaussians per program
RUN = 256  # keys that a program sorts, at most, in RUN^2 comparisons; not timed yet
NEVER = tl.constexpr(2**63 - 1)  # sorts behind every key


@triton.jit
def tile_rectangle(means2d_ptr, radii_ptr, at, valid, width, height, TILE: tl.constexpr):
    """Tiles [left, right) x [top, bottom) whose pixels' centres the box may reach; empty where radius is -1."""
    x, y = tl.load(means2d_ptr + at * 2, valid, 0.0), tl.load(means2d_ptr + at * 2 + 1, valid, 0.0)
    rx, ry = tl.load(radii_ptr + at * 2, valid, -1.0), tl.load(radii_ptr + at * 2 + 1, valid, -1.0)
    # Wider by a hundredth of a pixel: rounding may list a tile too many (its alphas decide), never one too few.
    # Clamped while still float: a mean far outside the image overflows an int.
    x0 = tl.ceil(tl.minimum(tl.maximum(x - rx - 0.51, 0.0), width)).to(tl.int32)  # first pixel
    y0 = tl.ceil(tl.minimum(tl.maximum(y - ry - 0.51, 0.0), height)).to(tl.int32)
    x1 = tl.floor(tl.minimum(tl.maximum(x + rx - 0.49, -1.0), width - 1)).to(tl.int32) + 1  # past the last
    y1 = tl.floor(tl.minimum(tl.maximum(y + ry - 0.49, -1.0), height - 1)).to(tl.int32) + 1
    seen = valid & (rx >= 0) & (x1 > x0) & (y1 > y0)
    left, top = x0 // TILE, y0 // TILE
    right, bottom = tl.where(seen, (x1 + TILE - 1) // TILE, left), tl.where(seen, (y1 + TILE - 1) // TILE, top)
    return left, top, right, bottom


@triton.jit
def count_kernel(
    means2d_ptr,  # [I, N, 2]
    radii_ptr,  # [I, N, 2]
    counts_ptr,  # out [I * tiles] int32: pairs of each tile, added to
    size,  # I * N
    N,
    width,
    height,
    tiles_x,
    tiles_y,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    left, top, right, bottom = tile_rectangle(means2d_ptr, radii_ptr, at, valid, width, height, TILE)
    across = tl.maximum(right - left, 1)
    count = (right - left) * (bottom - top)
    for i in range(tl.max(count, 0)):  # lanes whose Gaussian is done sit idle
        tile = (at // N * tiles_y + top + i // across) * tiles_x + left + i % across
        tl.atomic_add(counts_ptr + tile, 1, i < count, sem="relaxed")


@triton.jit
def place_kernel(
    means2d_ptr,  # [I, N, 2]
    radii_ptr,  # [I, N, 2]
    depths_ptr,  # [I, N]
    next_ptr,  # [I * tiles] int64: each tile's next free place, moved on
    keys_ptr,  # out [P] int64: depth bits << 32 | index in 0..N-1
    size,  # I * N
    N,
    width,
    height,
    tiles_x,
    tiles_y,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    left, top, right, bottom = tile_rectangle(means2d_ptr, radii_ptr, at, valid, width, height, TILE)
    across = tl.maximum(right - left, 1)
    count = (right - left) * (bottom - top)
    depth = tl.load(depths_ptr + at, valid, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    for i in range(tl.max(count, 0)):
        tile = (at // N * tiles_y + top + i // across) * tiles_x + left + i % across
        place = tl.atomic_add(next_ptr + tile, 1, i < count, sem="relaxed")
        tl.store(keys_ptr + place, (depth << 32) | (at % N), i < count)


@triton.jit
def load_run(ranges_ptr, range_ptr, number_ptr, count, RUN: tl.constexpr):
    """Start and end of a program's range, and where in the keys its run begins; all 0 for a program without a run."""
    r = tl.load(range_ptr + tl.program_id(0))
    start, end = tl.load(ranges_ptr + r * 2, r < count, 0), tl.load(ranges_ptr + r * 2 + 1, r < count, 0)
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
    ranges_ptr,  # [R, 2] int64
    range_ptr,  # [programs] int64, as sort_kernel's; a program merges RUN keys, whatever the length
    number_ptr,  # [programs] int64
    count,  # R
    length,
    steps,  # of the binary search: bits of length
    RUN: tl.constexpr,
):
    start, end, first = load_run(ranges_ptr, range_ptr, number_ptr, count, RUN)
    i = first - start + tl.arange(0, RUN)  # within the range
    valid = start + i < end
    key = tl.load(keys_ptr + start + i, valid, 0)
    run = i // length
    other = start + (run ^ 1) * length  # the other run of the pair, which may be cut short, or not be there
    low, high = other, tl.minimum(other + length, end)
    for _ in range(steps):
        middle = (low + high) // 2
        open = valid & (low < high)
        smaller = open & (tl.load(keys_ptr + middle, open, NEVER) < key)
        low, high = tl.where(smaller, middle + 1, low), tl.where(open & (smaller == 0), middle, high)
    tl.store(merged_ptr + start + (i - run % 2 * length) + (low - other), key, valid)


# A CUDA graph cannot hold it: the host reads how long the lists are
@torch.library.custom_op("splat::list_tiles", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def list_tiles(
    means2d: torch.Tensor, depths: torch.Tensor, radii: torch.Tensor, width: int, height: int, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means2d [I, N, 2], depths [I, N] and radii [I, N, 2] (-1 = not visible) of I images, contiguous float32.

    Returns gaussians [P] int32, every tile's Gaussians (0..N-1) front to back, and ranges [I * tiles_y * tiles_x, 2]
    int64, where each tile's lie; tiles are square, `tile` pixels wide, counted row by row. Waits for the device
    once, to learn P and the longest list.
    """
    I, N = depths.shape
    tiles_x, tiles_y = triton.cdiv(width, tile), triton.cdiv(height, tile)
    counts = torch.zeros(I * tiles_y * tiles_x, dtype=torch.int32, device=depths.device)
    box = I * N, N, float(width), float(height), tiles_x, tiles_y
    grid = (triton.cdiv(I * N, BLOCK),)
    with torch.cuda.device_of(depths):  # triton launches on the current device, which need not be theirs
        if I * N:
            count_kernel[grid](means2d, radii, counts, *box, TILE=tile, BLOCK=BLOCK)
        ends = torch.cumsum(counts, 0, dtype=torch.int64)
        ranges = torch.stack([ends - counts, ends], 1)
        P, longest = torch.stack([ends[-1], counts.max().long()]).tolist() if I * N else (0, 0)
        keys = torch.empty(P, dtype=torch.int64, device=depths.device)
        if P:
            place_kernel[grid](means2d, radii, depths, ends - counts, keys, *box, TILE=tile, BLOCK=BLOCK)
            keys = sort_ranges(keys, ranges, longest)
    return keys.int(), ranges  # the lower half of a key is the Gaussian


@list_tiles.register_fake
def _(means2d, depths, radii, width, height, tile):
    P = torch.library.get_ctx().new_dynamic_size()
    tiles = depths.shape[0] * triton.cdiv(width, tile) * triton.cdiv(height, tile)
    return depths.new_empty(P, dtype=torch.int32), depths.new_empty(tiles, 2, dtype=torch.int64)


def sort_ranges(keys, ranges, longest):
    """Keys [P] int64, no two of a range equal, sorted within every range of ranges [R, 2], the longest of which has
    `longest`. Returns [P]; overwrites the keys."""
    run = min(RUN, max(16, triton.next_power_of_2(longest)))
    runs = (ranges[:, 1] - ranges[:, 0] + run - 1) // run
    ends = runs.cumsum(0)
    # There are P / RUN + R runs at most; which are there is for the device to know, without waiting for it
    program = torch.arange(len(keys) // run + len(ranges), device=keys.device)
    owner = torch.searchsorted(ends, program, right=True)
    number = program - (ends - runs)[owner.clamp(max=len(ranges) - 1)]
    of_program = ranges, owner, number, len(ranges)
    done = torch.empty_like(keys)
    sort_kernel[(len(program),)](keys, done, *of_program, RUN=run)
    length = run
    while length < longest:
        keys, done = done, keys
        merge_kernel[(len(program),)](keys, done, *of_program, length, length.bit_length(), RUN=run)
        length *= 2
    return done
