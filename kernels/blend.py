"""Blend each tile's Gaussians into its pixels, front to back, as a matrix product.

For pixel p and the Gaussians k = 1, 2, ... of its tile in order of depth, each a splat (m, o, cap,
A, B, C) of projection.py:

    (x, y) = m_k - p
    q_k    = o + A x^2 + B x y + C y^2
    a_k    = min(2^q_k, cap_k),  0 where below 1/255
    R_k    = prod_{j<=k} (1 - a_j)                             transmittance after k
    w_k    = a_k R_{k-1},  0 once R_k <= 1e-4                  blending stops before that k
    out_p  = sum_k w_k f_k,    alpha_p = sum_k w_k = 1 - T_p,  T_p = R at the last k blended

A program owns a tile of P = TILE x TILE pixels and up to BLOCKS blocks of BLOCK_C channels. It
walks the tile's Gaussians in chunks of K, computes a chunk's weights w [P, K] once, and adds
w @ f [K, channels] on tensor cores. At the end it stores the features of pixels that are asked for,
and adds those of all pixels to the sums of their labels.

R and w come from one associative scan of the pairs (1 - a, a) along k, with the operator
(l1, w1), (l2, w2) -> (l1 l2, l1 w2). Arrays of weights are [KI, TILE, KO, TILE]: Gaussian
ko * KI + ki, pixel row, pixel column. In Triton's default layout KI lies in a thread's registers,
rows across warps, KO = 4 and columns across lanes: most of the scan stays within a thread.

R is a running product. A sum of logarithms would be too inexact for the stopping rule: two
Gaussians of alpha 0.99 leave R within 2e-6 (relative) of 1e-4.
"""

import triton
import triton.language as tl

from . import torch_backend
from .projection import LN2, MAX_ALPHA, MIN_ALPHA

MIN_TRANSMITTANCE = tl.constexpr(torch_backend.MIN_TRANSMITTANCE)
KO = tl.constexpr(4)  # times the 8 columns of a tile: the 32 lanes of a warp


# ------------------------------------------------------------------------------ shared by all four


@triton.jit
def get_tile(offsets_ptr, width, height, TILE: tl.constexpr):
    """The program's image, the start and length of its list, and its pixels: columns and rows
    [TILE], index into [I, H, W] and whether inside the image [P]."""
    tiles_x = tl.cdiv(width, TILE)
    tiles = tiles_x * tl.cdiv(height, TILE)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    start = tl.load(offsets_ptr + tl.program_id(0))
    count = (tl.load(offsets_ptr + tl.program_id(0) + 1) - start).to(tl.int32)
    x = tile % tiles_x * TILE + tl.arange(0, TILE)
    y = tile // tiles_x * TILE + tl.arange(0, TILE)
    pixel = tl.reshape((image * height + y[:, None]) * width + x[None, :], [TILE * TILE])
    inside = tl.reshape((x < width)[None, :] & (y < height)[:, None], [TILE * TILE])
    return image, start, count, (x, y), pixel, inside


@triton.jit
def centres(xy):
    """Pixel centres x and y, to broadcast with weights [KI, TILE, KO, TILE]."""
    x, y = xy[0].to(tl.float32) + 0.5, xy[1].to(tl.float32) + 0.5
    return x[None, None, None, :], y[None, :, None, None]


@triton.jit
def places(KI: tl.constexpr):
    """Positions [KI, KO] within a chunk, in the order of the weights."""
    return tl.arange(0, KO)[None, :] * KI + tl.arange(0, KI)[:, None]


@triton.jit
def load_splats(splats_ptr, n, used):
    """Splats [KI, KO, 8] of the Gaussians n; 0 where not used, so that cap makes alpha 0."""
    at = n.to(tl.int64)[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    return tl.load(splats_ptr + at, used[:, :, None], 0.0)


@triton.jit
def load_ahead(splats_ptr, gaussians_ptr, n, chunk, place, count, K):
    """Splats of a chunk's Gaussians n [KI, KO], and the Gaussians of the next chunk."""
    splats = load_splats(splats_ptr, n, chunk + place < count)
    return splats, tl.load(gaussians_ptr + chunk + K + place, chunk + K + place < count, 0)


@triton.jit
def columns(rows, KI: tl.constexpr):
    """The first seven columns of rows [KI, KO, 8], each [KI, 1, KO, 1]."""
    x0246, x1357 = tl.split(tl.reshape(rows, [KI, 1, KO, 1, 4, 2]))
    x04, x26 = tl.split(tl.reshape(x0246, [KI, 1, KO, 1, 2, 2]))
    x15, x37 = tl.split(tl.reshape(x1357, [KI, 1, KO, 1, 2, 2]))
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, _ = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6


@triton.jit
def exp2(x, FAST: tl.constexpr):
    """2^x in one instruction. is_pure=False keeps the compiler from computing it twice."""
    if FAST:
        asm: tl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, is_pure=False, pack=1)
    return tl.exp2(x)


@triton.jit
def pair_alpha(splat, xy, FAST: tl.constexpr):
    """Alpha [KI, TILE, KO, TILE]."""
    mx, my, o, cap, A, B, C = splat
    x, y = mx - xy[0], my - xy[1]
    q = (B * x + C * y) * y + (A * x * x + o)
    alpha = tl.minimum(exp2(q, FAST), cap)
    return tl.where(alpha >= MIN_ALPHA, alpha, 0.0)


@triton.jit
def pass_through(l1, w1, l2, w2):
    return l1 * l2, l1 * w2


@triton.jit
def last_of(x, KI: tl.constexpr):
    """x [KI, ...] at ki = KI - 1."""
    final = tl.arange(0, KI)[:, None, None, None] == KI - 1
    return tl.max(tl.where(final, x, 0.0), 0)


@triton.jit
def scan(alpha, w, before, KI: tl.constexpr):
    """w_k R_{k-1} and R_k [KI, TILE, KO, TILE] of values w, and R after the chunk.

    R before and after the chunk is [TILE, KO, TILE], the same for all ko.
    """
    R, w = tl.associative_scan((1 - alpha, w), 0, pass_through)  # within a thread
    # Across the KO groups; the first carries `before`
    head = tl.arange(0, KO)[None, :, None] == 0
    group = last_of(R, KI) * tl.where(head, before, 1.0)
    ones = tl.full(group.shape, 1.0, tl.float32)
    after, front = tl.associative_scan((group, ones), 1, pass_through)
    front = tl.where(head, before, front)
    after = tl.broadcast_to(tl.min(after, 1, keep_dims=True), after.shape)
    return w * front[None], R * front[None], after


@triton.jit
def as_matrix(w, P: tl.constexpr, K: tl.constexpr):
    """[KI, TILE, KO, TILE] -> [P, K]"""
    return tl.reshape(tl.permute(w, (1, 3, 2, 0)), [P, K])


@triton.jit
def operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """x as an operand of tl.dot. Tensor cores truncate float32 to TF32's 10 bits of mantissa;
    adding half of the last bit first rounds it."""
    if FAST and DTYPE == tl.float32 and PRECISION == "tf32":
        return (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


# ------------------------------------------------------------------------------ forward


@triton.jit
def new_ends(TILE: tl.constexpr):
    """State of a walk, each [TILE, KO, TILE]: R, not stopped and the same for all ko; and for each
    ko's Gaussians alone the sum of w, T, and last."""
    one = tl.full([TILE, KO, TILE], 1.0, tl.float32)
    return one, tl.zeros([TILE, KO, TILE], tl.float32), one, tl.zeros([TILE, KO, TILE], tl.int32)


@triton.jit
def chunk_forward(splats, xy, ends, number, KI: tl.constexpr, FAST: tl.constexpr,
                  SAVE: tl.constexpr):  # fmt: skip
    """Weights [KI, TILE, KO, TILE] of a chunk, and the ends after it. number [KI, KO]: one past
    each Gaussian's position in the tile's list."""
    R_after, alphas, T, last = ends
    alpha = pair_alpha(columns(splats, KI), centres(xy), FAST)
    w, R, R_after = scan(alpha, alpha, R_after, KI)
    w = tl.where(R > MIN_TRANSMITTANCE, w, 0.0)
    alphas += tl.sum(w, 0)
    if SAVE:
        T = tl.minimum(T, tl.min(tl.where(w > 0, R, 1.0), 0))
        last = tl.maximum(last, tl.max(tl.where(w > 0, number[:, None, :, None], 0), 0))
    return w, (R_after, alphas, T, last)


@triton.jit
def store_ends(alphas_ptr, transmittance_ptr, last_ptr, ends, pixel, inside, SAVE: tl.constexpr):
    _, alphas, T, last = ends
    P: tl.constexpr = pixel.shape[0]
    tl.store(alphas_ptr + pixel, tl.reshape(tl.sum(alphas, 1), [P]), inside)
    if SAVE:
        tl.store(transmittance_ptr + pixel, tl.reshape(tl.min(T, 1), [P]), inside)
        tl.store(last_ptr + pixel, tl.reshape(tl.max(last, 1), [P]), inside)


@triton.jit
def rows_of(rows_ptr, pixel, inside):
    """Each pixel's row of the output [P], and whether it has one."""
    if rows_ptr is not None:
        pixel = tl.load(rows_ptr + pixel, inside, -1).to(tl.int64)
        inside = pixel >= 0
    return pixel, inside


@triton.jit
def store_rows(parts, out, pixel, inside, c, C):
    """Store features out [P, BLOCK_C] of a tile's pixels in their rows."""
    out_ptr, _, rows_ptr, _ = parts
    row, there = rows_of(rows_ptr, pixel, inside)
    at, there = out_ptr + row[:, None] * C + c[None, :], there[:, None] & (c < C)[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), there)


@triton.jit
def add_sums(parts, out, pixel, inside, c, C):
    """Add features out [P, BLOCK_C] of a tile's pixels to the sums of their labels."""
    _, sums_ptr, _, labels_ptr = parts
    if sums_ptr is not None:
        label = tl.load(labels_ptr + pixel, inside, 0).to(tl.int64)
        first = tl.min(tl.where(inside, label, 2**40))
        if first == tl.max(tl.where(inside, label, -1)):  # as usual: one addition per channel
            total = tl.sum(tl.where(inside[:, None], out, 0.0), 0)
            tl.atomic_add(sums_ptr + first * C + c, total, c < C, sem="relaxed")
        else:
            at, inside_c = label[:, None] * C + c[None, :], inside[:, None] & (c < C)[None, :]
            tl.atomic_add(sums_ptr + at, out, inside_c, sem="relaxed")


@triton.jit
def load_blocks(features_ptr, row, c, C, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr):
    """Features of rows [K] as a tuple of BLOCKS times [K, BLOCK_C]."""
    at, f = features_ptr + row.to(tl.int64)[:, None] * C + c[None, :], ()
    for i in tl.static_range(BLOCKS):
        f = f + (tl.load(at + i * BLOCK_C, (c + i * BLOCK_C < C)[None, :], 0.0),)
    return f


@triton.jit
def blend_forward_kernel(
    splats_ptr,  # [I, N, 8]
    features_ptr,  # [B, N, C]
    gaussians_ptr,  # [pairs] int32
    offsets_ptr,  # [I * tiles + 1] int64
    rows_ptr,  # [I, H, W] int32: the pixel's row of out, -1: none; None: all pixels in their order
    labels_ptr,  # [I, H, W] int32, or None
    out_ptr,  # out [rows, C]
    sums_ptr,  # out [labels, C] float32, accumulated: sums of the labels' features, or None
    alphas_ptr,  # out [I, H, W]
    transmittance_ptr,  # out [I, H, W]: T; written if SAVE
    last_ptr,  # out [I, H, W] int32: one past the last Gaussian blended; written if SAVE
    N, C, V, width, height,
    TILE: tl.constexpr, KI: tl.constexpr, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = TILE * TILE
    K: tl.constexpr = KI * KO
    image, start, count, xy, pixel, inside = get_tile(offsets_ptr, width, height, TILE)
    splats_ptr, features_ptr = splats_ptr + image * N * 8, features_ptr + image // V * N * C
    gaussians_ptr += start
    c = tl.program_id(1) * (BLOCK_C * BLOCKS) + tl.arange(0, BLOCK_C)
    out, ends = (), new_ends(TILE)
    for i in tl.static_range(BLOCKS):
        out = out + (tl.zeros([P, BLOCK_C], tl.float32),)
    # Loads run a chunk ahead; past the end features repeat, with weight 0
    k, place = tl.arange(0, K), places(KI)
    row = tl.load(gaussians_ptr + tl.minimum(k, count - 1), tl.minimum(k, count - 1) >= 0, 0)
    n = tl.load(gaussians_ptr + place, place < count, 0)
    ahead, n = load_ahead(splats_ptr, gaussians_ptr, n, 0, place, count, K)
    chunk = 0
    while (chunk < count) & (tl.max(ends[0]) > MIN_TRANSMITTANCE):
        f = load_blocks(features_ptr, row, c, C, BLOCK_C, BLOCKS)
        splats, next = ahead, chunk + K
        row = tl.load(gaussians_ptr + tl.minimum(next + k, count - 1))
        ahead, n = load_ahead(splats_ptr, gaussians_ptr, n, next, place, count, K)
        w, ends = chunk_forward(splats, xy, ends, chunk + 1 + place, KI, FAST, SAVE)

        # [P, K] @ [K, BLOCK_C] -> [P, BLOCK_C]
        w, sums = as_matrix(operand(w, DTYPE, PRECISION, FAST), P, K), ()
        for i in tl.static_range(BLOCKS):
            f_i = operand(f[i], DTYPE, PRECISION, FAST)
            sums = sums + (tl.dot(w, f_i, out[i], input_precision=PRECISION),)
        out = sums
        chunk += K

    parts = out_ptr, sums_ptr, rows_ptr, labels_ptr
    for i in tl.static_range(BLOCKS):
        store_rows(parts, out[i], pixel, inside, c + i * BLOCK_C, C)
        add_sums(parts, out[i], pixel, inside, c + i * BLOCK_C, C)
    if tl.program_id(1) == 0:
        store_ends(alphas_ptr, transmittance_ptr, last_ptr, ends, pixel, inside, SAVE)


# ------------------------------------------------------------------------------ backward
# v_t is the gradient of the loss with respect to t. From v_out [P, C] and v_alpha [P], per pixel:
#
#     v_f_k = sum_p w_k v_out_p                                 = w' @ v_out, a matrix product
#     g_k   = v_w_k = v_out_p . f_k + v_alpha_p                 = v_out @ f' + v_alpha
#     S_k   = sum_{j>k} w_j g_j                                 what lies behind k
#     v_a_k = R_{k-1} g_k - S_k / (1 - a_k)
#     v_q_k = ln 2 a_k v_a_k where a was not clamped to 0.99
#
# The gradients of a splat are sums over p of v_q times 1, x, y, x^2, xy, y^2. Seen from the tile's
# centre, let (u, v) be the pixel and (r, s) the mean: x = r - u and y = s - v. One product gives
# the moments M = v_q' @ [1, u, v, u^2, uv, v^2]; these powers are exact in TF32. With them:
#
#     v_o = M_1,    X = r M_1 - M_u,    Y = s M_1 - M_v         sums of v_q x and v_q y
#     v_A = r (X - M_u) + M_uu,    v_B = s X - r M_v + M_uv,    v_C = s (Y - M_v) + M_vv
#     v_mx = 2 A X + B Y,    v_my = B X + 2 C Y
#
# Chunks are walked back to front and carry S. R before a chunk is R after it, first the stored T,
# divided by the chunk's product. Within a chunk, S_k is the chunk's total minus the sum up to k, so
# that rounding errors are relative to a chunk, not to the whole ray.


@triton.jit
def load_ends(transmittance_ptr, last_ptr, pixel, inside, TILE: tl.constexpr):
    """T and last of the pixels, [TILE, KO, TILE], the same for all ko."""
    T = tl.reshape(tl.load(transmittance_ptr + pixel, inside, 1.0), [TILE, 1, TILE])
    last = tl.reshape(tl.load(last_ptr + pixel, inside, 0), [TILE, 1, TILE])
    shape: tl.constexpr = [TILE, KO, TILE]
    return tl.broadcast_to(T, shape), tl.broadcast_to(last, shape)


@triton.jit
def load_chunk(splats_ptr, gaussians_ptr, first, count, KI: tl.constexpr):
    """The chunk at position `first` of the list: Gaussians and whether used [K], positions
    [KI, KO] and splats [KI, KO, 8]."""
    k, place = first + tl.arange(0, KI * KO), first + places(KI)
    row = tl.load(gaussians_ptr + k, k < count, 0).to(tl.int64)
    n = tl.load(gaussians_ptr + place, place < count, 0)
    return row, k < count, place, load_splats(splats_ptr, n, place < count)


@triton.jit
def chunk_backward(splats, xy, place, last, T, KI: tl.constexpr, FAST: tl.constexpr):
    """Alpha and R_{k-1} [KI, TILE, KO, TILE] of the chunk at positions `place`, and R before it.
    T [TILE, KO, TILE] is R after it."""
    alpha = pair_alpha(columns(splats, KI), centres(xy), FAST)
    alpha = tl.where(place[:, None, :, None] < last[None], alpha, 0.0)
    ones = tl.full(T.shape, 1.0, tl.float32)
    R_before, _, product = scan(alpha, tl.full(alpha.shape, 1.0, tl.float32), ones, KI)
    T = T / product
    return alpha, R_before * T[None], T


@triton.jit
def alpha_backward(alpha, R_before, g, S):
    """v_q [KI, TILE, KO, TILE], and S [TILE, KO, TILE] with this chunk added."""
    wg = alpha * R_before * g
    group = tl.sum(wg, 0)  # over a thread's Gaussians
    total = tl.broadcast_to(tl.sum(group, 1, keep_dims=True), group.shape)
    rest = S + total - (tl.cumsum(group, 1) - group)  # from a thread's first Gaussian on
    v_a = R_before * g - (rest[None] - tl.cumsum(wg, 0)) / (1 - alpha)
    return tl.where(alpha < MAX_ALPHA, alpha * v_a * LN2, 0.0), S + total


@triton.jit
def column_of(M, i: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, M.shape[1])[None, :] == i, M, 0.0), 1)


@triton.jit
def splats_backward(v_splats_ptr, splats_ptr, n, used, xy, v_q, FAST: tl.constexpr):
    """Add to the gradients of the splats n [K], given v_q [P, K]."""
    TILE: tl.constexpr = xy[0].shape[0]
    p, column = tl.arange(0, TILE * TILE)[:, None], tl.arange(0, 16)[None, :]
    centre: tl.constexpr = 0.5 * (TILE - 1)
    u, v = (p % TILE).to(tl.float32) - centre, (p // TILE).to(tl.float32) - centre
    powers = tl.where(column == 0, 1.0, tl.where(column == 1, u, tl.where(column == 2, v, 0.0)))
    squares = tl.where(column == 3, u * u, tl.where(column == 4, u * v, v * v))
    powers = tl.where((column > 2) & (column < 6), squares, powers)
    precision: tl.constexpr = "tf32x3" if FAST else "ieee"
    M = tl.dot(tl.trans(v_q), powers, input_precision=precision)  # [K, P] @ [P, 16] -> [K, 16]
    M1, Mu, Mv = column_of(M, 0), column_of(M, 1), column_of(M, 2)
    Muu, Muv, Mvv = column_of(M, 3), column_of(M, 4), column_of(M, 5)

    splat_ptr, v_ptr = splats_ptr + n * 8, v_splats_ptr + n * 8
    r = tl.load(splat_ptr, used, 0.0) - (tl.min(xy[0], 0) + 0.5 * TILE)
    s = tl.load(splat_ptr + 1, used, 0.0) - (tl.min(xy[1], 0) + 0.5 * TILE)
    A, B = tl.load(splat_ptr + 4, used, 0.0), tl.load(splat_ptr + 5, used, 0.0)
    C = tl.load(splat_ptr + 6, used, 0.0)
    X, Y = r * M1 - Mu, s * M1 - Mv
    tl.atomic_add(v_ptr, 2 * A * X + B * Y, used, sem="relaxed")
    tl.atomic_add(v_ptr + 1, B * X + 2 * C * Y, used, sem="relaxed")
    tl.atomic_add(v_ptr + 2, M1, used, sem="relaxed")
    tl.atomic_add(v_ptr + 4, r * (X - Mu) + Muu, used, sem="relaxed")
    tl.atomic_add(v_ptr + 5, s * X - r * Mv + Muv, used, sem="relaxed")
    tl.atomic_add(v_ptr + 6, s * (Y - Mv) + Mvv, used, sem="relaxed")


@triton.jit
def geometry_backward(v_splats_ptr, splats_ptr, n, used, xy, alpha, R_before, g, S,
                      KI: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Add to the gradients of a chunk's splats n [K], given g [P, K]. Returns S with the chunk."""
    TILE: tl.constexpr = xy[0].shape[0]
    g = tl.permute(tl.reshape(g, [TILE, TILE, KO, KI]), (3, 0, 2, 1))
    v_q, S = alpha_backward(alpha, R_before, g, S)
    v_q = as_matrix(v_q, TILE * TILE, KI * KO)
    splats_backward(v_splats_ptr, splats_ptr, n, used, xy, v_q, FAST)
    return S


@triton.jit
def load_rows(ptr, row, there, c, C):
    """Rows [R] and columns c [BLOCK_C] of a matrix [..., C]; 0 where not there."""
    return tl.load(ptr + row[:, None] * C + c[None, :], there[:, None] & (c < C)[None, :], 0.0)


@triton.jit
def load_block(ptr, row, there, c, C, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
               FAST: tl.constexpr):  # fmt: skip
    """`load_rows`, as an operand of tl.dot."""
    return operand(load_rows(ptr, row, there, c, C), DTYPE, PRECISION, FAST)


@triton.jit
def load_v_out(v_parts, pixel, inside, c, C, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
               FAST: tl.constexpr):  # fmt: skip
    """v_out [P, BLOCK_C] of a tile's pixels, from their rows and labels, for tl.dot."""
    v_out_ptr, v_sums_ptr, rows_ptr, labels_ptr = v_parts
    row, there = rows_of(rows_ptr, pixel, inside)
    v_out = load_rows(v_out_ptr, row, there, c, C)
    if v_sums_ptr is not None:
        label = tl.load(labels_ptr + pixel, inside, 0).to(tl.int64)
        v_out = load_rows(v_sums_ptr, label, inside, c, C) + v_out
    return operand(v_out, DTYPE, PRECISION, FAST)


@triton.jit
def block_backward(features_ptr, v_splats_ptr, v_features_ptr, v_out, w, g, row, used, c, C,
                   DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """g [P, K] with the channels c [BLOCK_C] added, whose v_features are added where wanted."""
    if v_splats_ptr is not None:
        f = load_block(features_ptr, row, used, c, C, DTYPE, PRECISION, FAST)
        # [P, BLOCK_C] @ [BLOCK_C, K] -> [P, K]
        g = tl.dot(v_out, tl.trans(f), g, input_precision=PRECISION)
    if v_features_ptr is not None:
        # [K, P] @ [P, BLOCK_C] -> [K, BLOCK_C]
        v_f = tl.dot(tl.trans(w), v_out, input_precision=PRECISION)
        at = v_features_ptr + row[:, None] * C + c[None, :]
        tl.atomic_add(at, v_f, used[:, None] & (c < C)[None, :], sem="relaxed")
    return g


@triton.jit
def blend_backward_kernel(
    splats_ptr, features_ptr, gaussians_ptr, offsets_ptr,  # as forward
    rows_ptr, labels_ptr, transmittance_ptr, last_ptr,  # as forward
    v_out_ptr, v_sums_ptr, v_alphas_ptr,  # [rows, C], [labels, C] or None, and [I, H, W]
    v_splats_ptr,  # out [I, N, 8], accumulated; None: not wanted
    v_features_ptr,  # out [B, N, C] float32, accumulated; None: not wanted
    N, C, V, width, height,
    TILE: tl.constexpr, KI: tl.constexpr, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr,
    HELD: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = TILE * TILE
    K: tl.constexpr = KI * KO
    image, start, count, xy, pixel, inside = get_tile(offsets_ptr, width, height, TILE)
    splats_ptr, features_ptr = splats_ptr + image * N * 8, features_ptr + image // V * N * C
    if v_features_ptr is not None:
        v_features_ptr += image // V * N * C
    gaussians_ptr += start
    c = tl.arange(0, BLOCK_C)
    T, last = load_ends(transmittance_ptr, last_ptr, pixel, inside, TILE)
    v_alpha = tl.load(v_alphas_ptr + pixel, inside, 0.0)
    S = tl.zeros([TILE, KO, TILE], tl.float32)  # behind the chunk
    v_parts = v_out_ptr, v_sums_ptr, rows_ptr, labels_ptr
    held = ()  # v_out of the first blocks of channels is read once, that of others once per chunk
    for i in tl.static_range(HELD):
        c_i = c + i * BLOCK_C
        held = held + (load_v_out(v_parts, pixel, inside, c_i, C, DTYPE, PRECISION, FAST),)
    chunks = tl.cdiv(tl.max(last), K)
    for chunk in range(chunks):
        first = (chunks - 1 - chunk) * K
        row, used, place, splats = load_chunk(splats_ptr, gaussians_ptr, first, count, KI)
        alpha, R_before, T = chunk_backward(splats, xy, place, last, T, KI, FAST)
        w = as_matrix(operand(alpha * R_before, DTYPE, PRECISION, FAST), P, K)
        g = tl.zeros([P, K], tl.float32) + v_alpha[:, None]
        for i in tl.static_range(HELD):
            c_i = c + i * BLOCK_C
            g = block_backward(features_ptr, v_splats_ptr, v_features_ptr, held[i], w, g, row, used,
                               c_i, C, DTYPE, PRECISION, FAST)  # fmt: skip
        for block in range(HELD, BLOCKS):
            c_b = c + block * BLOCK_C
            v_out = load_v_out(v_parts, pixel, inside, c_b, C, DTYPE, PRECISION, FAST)
            g = block_backward(features_ptr, v_splats_ptr, v_features_ptr, v_out, w, g, row, used,
                               c_b, C, DTYPE, PRECISION, FAST)  # fmt: skip
        if v_splats_ptr is not None:
            S = geometry_backward(v_splats_ptr + image * N * 8, splats_ptr, row, used, xy, alpha,
                                  R_before, g, S, KI, FAST)  # fmt: skip
