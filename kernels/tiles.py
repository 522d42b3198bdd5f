"""Which Gaussians touch which tile, front to back.

A Gaussian's box (mean -+ radius) covers a rectangle of tiles, and makes one pair with each of them. Three steps:

    count   each (image, Gaussian)'s tiles; an exclusive sum of the counts gives each its place in the list
    emit    into that place, one key per pair:  key = (image and tile) << 32 | bits of the depth
    sort    the keys, stably; then each tile's pairs are a range of the list, found where the key's upper half changes

Depths are positive, and the bits of positive floats sort as the floats do. Pairs are emitted in order of index and
the sort is stable, so that ties in depth go by index and the result is the same, bit for bit, on every run.
Nothing here is differentiable: which Gaussians to blend is a choice, not a value.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128  # Gaussians, or pairs, per program


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
    counts_ptr,  # out [I, N] int32: tiles that the Gaussian touches
    size,  # I * N
    width,
    height,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    left, top, right, bottom = tile_rectangle(means2d_ptr, radii_ptr, at, valid, width, height, TILE)
    tl.store(counts_ptr + at, (right - left) * (bottom - top), valid)


@triton.jit
def emit_kernel(
    means2d_ptr,  # [I, N, 2]
    radii_ptr,  # [I, N, 2]
    depths_ptr,  # [I, N]
    ends_ptr,  # [I, N] int64: inclusive sum of the counts
    keys_ptr,  # out [P] int64: (image * tiles + tile) << 32 | depth bits
    gaussians_ptr,  # out [P] int32: index in 0..N-1
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
    across = right - left
    count = across * (bottom - top)
    start = tl.load(ends_ptr + at, valid, 0) - count
    depth = tl.load(depths_ptr + at, valid, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    image = at // N
    for i in range(tl.max(count, 0)):  # lanes whose Gaussian is done sit idle
        tile = (image * tiles_y + top + i // tl.maximum(across, 1)) * tiles_x + left + i % tl.maximum(across, 1)
        tl.store(keys_ptr + start + i, (tile << 32) | depth, i < count)
        tl.store(gaussians_ptr + start + i, (at % N).to(tl.int32), i < count)


@triton.jit
def range_kernel(
    keys_ptr,  # [P] int64, sorted
    ranges_ptr,  # out [I * tiles, 2] int64: a tile's first pair and the one past its last; zeros where it has none
    P,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < P
    tile = tl.load(keys_ptr + i, valid, 0) >> 32
    before = tl.load(keys_ptr + i - 1, valid & (i > 0), -1) >> 32  # -1 >> 32 is -1: no tile
    after = tl.load(keys_ptr + i + 1, i + 1 < P, -1) >> 32
    tl.store(ranges_ptr + tile * 2, i, valid & (tile != before))
    tl.store(ranges_ptr + tile * 2 + 1, i + 1, valid & (tile != after))


@torch.no_grad()
def list_tiles(means2d, depths, radii, width, height, tile):
    """Means2d [I, N, 2], depths [I, N] and radii [I, N, 2] (-1 = not visible) of I images, contiguous float32.

    Returns gaussians [P] int32, every tile's Gaussians (0..N-1) front to back, and ranges [I * tiles_y * tiles_x, 2]
    int64, where each tile's lie; tiles are square, `tile` pixels wide, counted row by row. Waits for the device
    once, to learn P.
    """
    I, N = depths.shape
    tiles_x, tiles_y = triton.cdiv(width, tile), triton.cdiv(height, tile)
    device = depths.device
    ranges = torch.zeros(I * tiles_y * tiles_x, 2, dtype=torch.int64, device=device)
    counts = torch.empty(I * N, dtype=torch.int32, device=device)
    grid = (triton.cdiv(I * N, BLOCK),)
    if I * N:
        count_kernel[grid](means2d, radii, counts, I * N, float(width), float(height), TILE=tile, BLOCK=BLOCK)
    ends = torch.cumsum(counts, 0, dtype=torch.int64)
    P = int(ends[-1]) if I * N else 0
    keys = torch.empty(P, dtype=torch.int64, device=device)
    gaussians = torch.empty(P, dtype=torch.int32, device=device)
    if P == 0:
        return gaussians, ranges
    emit_kernel[grid](
        means2d, radii, depths, ends, keys, gaussians,
        I * N, N, float(width), float(height), tiles_x, tiles_y, TILE=tile, BLOCK=BLOCK,
    )  # fmt: skip
    keys, order = torch.sort(keys, stable=True)
    range_kernel[(triton.cdiv(P, BLOCK),)](keys, ranges, P, BLOCK=BLOCK)
    return gaussians[order], ranges
