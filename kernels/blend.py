"""Blending: a tile's Gaussians, front to back, into its pixels. Features are a matrix product.

For pixel p and the Gaussians k = 1, 2, ... of its tile in order of depth, with the image mean m and
the conic (A, B, C):

    d     = m_k - p
    q_k   = 1/2 (A d_x^2 + C d_y^2) + B d_x d_y
    a_k   = min(0.99, opacity_k exp(-q_k)),  0 where below 1/255
    R_k   = prod_{j<=k} (1 - a_j)                             transmittance after k
    w_k   = a_k R_k / (1 - a_k),  0 from where R_k <= 1e-4    blending has stopped before k
    out_p = sum_k w_k f_k,    alpha_p = sum_k w_k = 1 - T_p,  T_p = R at the last k that was blended

A program owns one tile of P pixels and one block of channels, and takes its Gaussians in chunks of
K. The weights w [P, K] of a chunk cost a scan along K and no memory. Then out [P, channels] +=
w @ f [K, channels] runs on tensor cores: one channel more is one column more of a matrix product.

Features may come factored: f_k = sum_j mix_kj token_(index_kj), a mixture of J rows of a table
[M, channels]. Mixtures are made a chunk at a time, so that features [N, channels] never exist.

R is a running product, not the exponential of a sum of logs: two Gaussians of alpha 0.99 leave
R = 1e-4 within 2e-6 of itself, and the stopping rule has to decide as the reference does.
"""

from typing import Optional  # which older versions of torch infer schemas from

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import torch_backend

MAX_ALPHA = tl.constexpr(torch_backend.MAX_ALPHA)
MIN_ALPHA = tl.constexpr(torch_backend.MIN_ALPHA)
MIN_TRANSMITTANCE = tl.constexpr(torch_backend.MIN_TRANSMITTANCE)

# Gaussians a chunk and channels a program. Not timed yet: chosen by what the compiler makes of them
# for sm_80 and sm_90 (`python -m kernels.bench`). No forward kernel spills registers, and most
# leave room for four programs a multiprocessor. The backward kernel of float32 features spills up
# to 304 bytes on sm_80 in TF32, which smaller blocks did not cure. Mixtures need more registers.
FORWARD = dict(K=16, BLOCK_C=64, num_warps=4)
BACKWARD = dict(K=16, BLOCK_C=32, num_warps=4)
BACKWARD_MIXED = dict(K=16, BLOCK_C=16, num_warps=4)


@triton.jit
def pixel_centres(tile, tiles_x, TILE: tl.constexpr):
    """Integer coordinates [P] of a tile's pixels, row by row; their centres lie at +0.5."""
    p = tl.arange(0, TILE * TILE)
    return tile % tiles_x * TILE + p % TILE, tile // tiles_x * TILE + p // TILE


@triton.jit
def get_tile(ranges_ptr, width, height, tiles_x, tiles, TILE: tl.constexpr):
    """The program's image; coordinates, index and existence [P] of its pixels; range of pairs."""
    image = (tl.program_id(0) // tiles).to(tl.int64)
    x, y = pixel_centres(tl.program_id(0) % tiles, tiles_x, TILE)
    start = tl.load(ranges_ptr + tl.program_id(0).to(tl.int64) * 2)
    end = tl.load(ranges_ptr + tl.program_id(0).to(tl.int64) * 2 + 1)
    return image, (x, y), (image * height + y) * width + x, (x < width) & (y < height), start, end


@triton.jit
def load_chunk(splats, k, used):
    """Index, mean, conic and opacity [K] of the pairs k; opacity 0 where not used."""
    gaussians_ptr, means2d_ptr, conics_ptr, opacities_ptr, image_N, scene_N = splats
    n = tl.load(gaussians_ptr + k, used, 0).to(tl.int64)
    mean_ptr, conic_ptr = means2d_ptr + (image_N + n) * 2, conics_ptr + (image_N + n) * 3
    mean = tl.load(mean_ptr, used, 0.0), tl.load(mean_ptr + 1, used, 0.0)
    A, B = tl.load(conic_ptr, used, 1.0), tl.load(conic_ptr + 1, used, 0.0)
    conic = A, B, tl.load(conic_ptr + 2, used, 1.0)
    return n, mean, conic, tl.load(opacities_ptr + scene_N + n, used, 0.0)


@triton.jit
def pair_alpha(xy, mean, conic, opacity):
    """Offsets d_x, d_y, falloff exp(-q) and alpha, each [P, K], of pixels [P] and Gaussians [K]."""
    dx = mean[0][None, :] - (xy[0][:, None] + 0.5)
    dy = mean[1][None, :] - (xy[1][:, None] + 0.5)
    A, B, C = conic
    q = 0.5 * (A[None, :] * dx * dx + C[None, :] * dy * dy) + B[None, :] * dx * dy
    falloff = tl.exp(-tl.maximum(q, 0.0))
    alpha = tl.minimum(opacity[None, :] * falloff, MAX_ALPHA)
    return dx, dy, falloff, tl.where(alpha >= MIN_ALPHA, alpha, 0.0)


@triton.jit
def load_token(factors, n, used, j, J: tl.constexpr):
    """Rows [K] of the j-th tokens of the Gaussians n, and their weights [K]."""
    indices_ptr, mix_ptr, scene_N, scene_M = factors
    at = (scene_N + n) * J + j
    return scene_M + tl.load(indices_ptr + at, used, 0), tl.load(mix_ptr + at, used, 0.0)


@triton.jit
def load_features(features_ptr, factors, n, used, c, C, DTYPE: tl.constexpr, J: tl.constexpr):
    """Features [K, channels c] of the Gaussians n: their own rows, or mixtures of J rows."""
    used_c = used[:, None] & (c < C)[None, :]
    if J == 0:
        row = factors[3] + n
        return tl.load(features_ptr + row[:, None] * C + c[None, :], used_c, 0.0).to(DTYPE)
    f = tl.zeros([n.shape[0], c.shape[0]], tl.float32)
    for j in tl.static_range(J):
        row, mix = load_token(factors, n, used, j, J)
        token = tl.load(features_ptr + row[:, None] * C + c[None, :], used_c, 0.0)
        f += mix[:, None] * token.to(tl.float32)
    return f.to(DTYPE)


@triton.jit
def blend_forward_kernel(
    means2d_ptr,  # [I, N, 2] pixels
    conics_ptr,  # [I, N, 3]
    opacities_ptr,  # [B, N]
    features_ptr,  # [B, M, C]; M = N unless factored
    indices_ptr,  # [B, N, J] int32, of a scene's features; read if J
    mix_ptr,  # [B, N, J] float32; read if J
    gaussians_ptr,  # [pairs] int32
    ranges_ptr,  # [I * tiles, 2] int64
    out_ptr,  # out [I, H, W, C]
    transmittance_ptr,  # out [I, H, W]: T
    last_ptr,  # out [I, H, W] int32: one past the last pair that was blended, within the tile
    N, M, C, V, width, height, tiles_x, tiles,
    TILE: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    image, xy, pixel, inside, start, end = get_tile(ranges_ptr, width, height, tiles_x, tiles, TILE)
    image_N, scene_N = image * N, image // V * N
    splats = gaussians_ptr, means2d_ptr, conics_ptr, opacities_ptr, image_N, scene_N
    factors = indices_ptr, mix_ptr, scene_N, image // V * M
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([TILE * TILE, BLOCK_C], tl.float32)
    R_before = tl.full([TILE * TILE], 1.0, tl.float32)  # R before the chunk, also past the stop
    T = tl.full([TILE * TILE], 1.0, tl.float32)
    last = tl.zeros([TILE * TILE], tl.int32)
    chunk = start
    while (chunk < end) & (tl.max(R_before, 0) > MIN_TRANSMITTANCE):
        k = chunk + tl.arange(0, K)
        n, mean, conic, opacity = load_chunk(splats, k, k < end)
        _, _, _, alpha = pair_alpha(xy, mean, conic, opacity)
        R = R_before[:, None] * tl.cumprod(1 - alpha, 1)
        # alpha > 0: a parallel scan may round the R of a skipped Gaussian above an earlier R
        blended = (R > MIN_TRANSMITTANCE) & (alpha > 0)
        w = tl.where(blended, alpha * R / (1 - alpha), 0.0)
        f = load_features(features_ptr, factors, n, k < end, c, C, DOT_DTYPE, J)
        # [P, K] @ [K, BLOCK_C] -> [P, BLOCK_C]
        acc = tl.dot(w.to(DOT_DTYPE), f, acc, input_precision=PRECISION)
        T = tl.minimum(T, tl.min(tl.where(blended, R, 1.0), 1))
        number = (k - start + 1).to(tl.int32)
        last = tl.maximum(last, tl.max(tl.where(blended, number[None, :], 0), 1))
        R_before = tl.min(R, 1)
        chunk += K

    at, inside_c = pixel[:, None] * C + c[None, :], inside[:, None] & (c < C)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), inside_c)
    if tl.program_id(1) == 0:
        tl.store(transmittance_ptr + pixel, T, inside)
        tl.store(last_ptr + pixel, last, inside)


# Backward. Given v_out [P, C] and v_alpha [P], per pixel:
#
#     v_f_k = sum_p w_k v_out_p                                 = w' @ v_out, a matrix product
#     g_k   = v_out_p . f_k + v_alpha_p, the gradient by w_k    = v_out @ f', another
#     S_k   = sum_{j>k} w_j g_j                                 what lies behind k
#     v_a_k = T_k g_k - S_k / (1 - a_k),   T_k = R_k / (1 - a_k)
#
# and, where alpha was not cut off at 0.99 (a = opacity exp(-q), so that v_q = -a v_a):
#
#     v_opacity = sum_p exp(-q) v_a
#     v_A = sum_p 1/2 d_x^2 v_q,    v_B = sum_p d_x d_y v_q,    v_C = sum_p 1/2 d_y^2 v_q
#     v_m = sum_p (A d_x + B d_y, B d_x + C d_y) v_q
#
# Chunks are taken back to front. R before a chunk is R after it divided by the chunk's product,
# starting from the stored T; S is carried along. Within a chunk, what lies behind k is the chunk's
# total minus the sum up to k: what rounding loses is relative to the chunk, not to the whole ray.
@triton.jit
def alpha_backward(dx, dy, falloff, alpha, conic, opacity, v_a):
    """What pixels add to v_m, (v_A, v_B, v_C) and v_opacity, each [P, K], by v_a [P, K]."""
    A, B, C = conic
    raw = opacity[None, :] * falloff
    v_a = tl.where((alpha > 0) & (raw <= MAX_ALPHA), v_a, 0.0)
    v_q = -raw * v_a
    v_mx = (A[None, :] * dx + B[None, :] * dy) * v_q
    v_my = (B[None, :] * dx + C[None, :] * dy) * v_q
    return (v_mx, v_my), (0.5 * dx * dx * v_q, dx * dy * v_q, 0.5 * dy * dy * v_q), falloff * v_a


@triton.jit
def add_sums(ptr, columns, used):
    """The sums over pixels of columns [P, K] to neighbours in memory."""
    for i in tl.static_range(len(columns)):
        tl.atomic_add(ptr + i, tl.sum(columns[i], 0), used, sem="relaxed")


@triton.jit
def add_features(v_features_ptr, factors, n, used, c, C, v_f, J: tl.constexpr):
    """v_f [K, channels c] to where `load_features` loads from."""
    used_c = used[:, None] & (c < C)[None, :]
    if J == 0:
        row = factors[3] + n
        tl.atomic_add(v_features_ptr + row[:, None] * C + c[None, :], v_f, used_c, sem="relaxed")
    for j in tl.static_range(J):
        row, mix = load_token(factors, n, used, j, J)
        at = row[:, None] * C + c[None, :]
        tl.atomic_add(v_features_ptr + at, mix[:, None] * v_f, used_c, sem="relaxed")


@triton.jit
def blend_backward_kernel(
    means2d_ptr, conics_ptr, opacities_ptr, features_ptr, indices_ptr, mix_ptr,  # as forward
    gaussians_ptr, ranges_ptr, transmittance_ptr, last_ptr,  # as forward
    v_out_ptr, v_alphas_ptr,  # [I, H, W, C] and [I, H, W]
    v_means2d_ptr, v_conics_ptr, v_opacities_ptr, v_features_ptr,  # out float32, added to
    N, M, C, V, width, height, tiles_x, tiles,
    TILE: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    image, xy, pixel, inside, start, end = get_tile(ranges_ptr, width, height, tiles_x, tiles, TILE)
    image_N, scene_N = image * N, image // V * N
    splats = gaussians_ptr, means2d_ptr, conics_ptr, opacities_ptr, image_N, scene_N
    factors = indices_ptr, mix_ptr, scene_N, image // V * M
    T = tl.load(transmittance_ptr + pixel, inside, 1.0)  # after the chunk
    last = tl.load(last_ptr + pixel, inside, 0)
    v_alpha_out = tl.load(v_alphas_ptr + pixel, inside, 0.0)
    S = tl.zeros([TILE * TILE], tl.float32)  # behind the chunk
    chunks = tl.cdiv(tl.max(last, 0), K)
    for i in range(chunks):
        number = (chunks - 1 - i) * K + tl.arange(0, K)
        k = start + number
        used = k < end
        n, mean, conic, opacity = load_chunk(splats, k, used)
        dx, dy, falloff, alpha = pair_alpha(xy, mean, conic, opacity)
        alpha = tl.where(number[None, :] < last[:, None], alpha, 0.0)
        R = tl.cumprod(1 - alpha, 1)
        T_before = T / tl.min(R, 1)
        T_k = T_before[:, None] * R / (1 - alpha)
        w = alpha * T_k

        g = tl.zeros([TILE * TILE, K], tl.float32) + v_alpha_out[:, None]
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            f = load_features(features_ptr, factors, n, used, c, C, DOT_DTYPE, J)
            at, inside_c = pixel[:, None] * C + c[None, :], inside[:, None] & (c < C)[None, :]
            v_out = tl.load(v_out_ptr + at, inside_c, 0.0).to(DOT_DTYPE)
            # [P, BLOCK_C] @ [BLOCK_C, K] -> [P, K], and [K, P] @ [P, BLOCK_C] -> [K, BLOCK_C]
            g = tl.dot(v_out, tl.trans(f), g, input_precision=PRECISION)
            v_f = tl.dot(tl.trans(w.to(DOT_DTYPE)), v_out, input_precision=PRECISION)
            add_features(v_features_ptr, factors, n, used, c, C, v_f, J)

        total = tl.sum(w * g, 1)
        behind = S[:, None] + total[:, None] - tl.cumsum(w * g, 1)
        v_a = T_k * g - behind / (1 - alpha)
        v_mean, v_conic, v_opacity = alpha_backward(dx, dy, falloff, alpha, conic, opacity, v_a)
        add_sums(v_means2d_ptr + (image_N + n) * 2, v_mean, used)
        add_sums(v_conics_ptr + (image_N + n) * 3, v_conic, used)
        add_sums(v_opacities_ptr + scene_N + n, (v_opacity,), used)
        S += total
        T = T_before


def launch_options(block, C, dtype, tile, precision, J, interpret):
    """Keyword arguments for a kernel: from a block such as FORWARD, the channels and type of the
    features, the tile's width, the precision of float32 products ("tf32", "tf32x3" or "ieee") and
    how many tokens a feature mixes (0: not factored).

    Half-precision features meet weights rounded to the same type; sums are float32. In Triton's
    interpreter all is float32, as it multiplies bfloat16 wrongly and float32 exactly.
    """
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    most = 16 if precision == "tf32x3" and J else block["BLOCK_C"]  # else it spills
    block_c = min(most, max(16, triton.next_power_of_2(C)))  # tl.dot wants 16 at least
    dot = dict(DOT_DTYPE=types[dtype], PRECISION=precision)
    if interpret:
        dot = dict(DOT_DTYPE=tl.float32, PRECISION="ieee")
    return block | dot | dict(BLOCK_C=block_c, TILE=tile, J=J)


def _launch(kernel, inputs, others, V, width, height, tile, precision, interpret):
    """inputs: the eight tensors that come first in both kernels; others: the rest."""
    means2d, features, indices = inputs[0], inputs[3], inputs[4]
    (I, N, _), (_, M, C) = means2d.shape, features.shape
    J = 0 if indices is None else indices.shape[-1]
    forward = kernel is blend_forward_kernel
    block = FORWARD if forward else BACKWARD_MIXED if J else BACKWARD
    options = launch_options(block, C, features.dtype, tile, precision, J, interpret)
    tiles_x, tiles_y = triton.cdiv(width, tile), triton.cdiv(height, tile)
    sizes = N, M, C, V, width, height, tiles_x, tiles_x * tiles_y
    if I:
        grid = I * tiles_x * tiles_y, triton.cdiv(C, options["BLOCK_C"]) if forward else 1
        with torch.cuda.device_of(means2d):  # triton launches on the current device
            kernel[grid](*inputs, *others, *sizes, **options)


def _blend_outputs(means2d, features, width, height):
    image = means2d.new_empty(len(means2d), height, width)
    out = features.new_empty(*image.shape, features.shape[-1])
    return out, image, torch.empty_like(image), torch.empty_like(image, dtype=torch.int32)


@torch.library.custom_op("splat::blend", mutates_args=())
def blend(
    means2d: Tensor, conics: Tensor, opacities: Tensor, features: Tensor,
    indices: Optional[Tensor], mix: Optional[Tensor], gaussians: Tensor, ranges: Tensor,
    V: int, width: int, height: int, tile: int, precision: str, interpret: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous tensors, shaped as the kernel's, float32 but for features -> features
    [I, H, W, C] in their type, alphas, and for the backward transmittance and last [I, H, W]."""
    out, alphas, transmittance, last = _blend_outputs(means2d, features, width, height)
    inputs = means2d, conics, opacities, features, indices, mix, gaussians, ranges
    rest = V, width, height, tile, precision, interpret
    _launch(blend_forward_kernel, inputs, (out, transmittance, last), *rest)
    torch.sub(1, transmittance, out=alphas)
    return out, alphas, transmittance, last


@torch.library.custom_op("splat::blend_backward", mutates_args=())
def blend_backward(
    means2d: Tensor, conics: Tensor, opacities: Tensor, features: Tensor,
    indices: Optional[Tensor], mix: Optional[Tensor], gaussians: Tensor, ranges: Tensor,
    transmittance: Tensor, last: Tensor, v_out: Tensor, v_alphas: Tensor,
    V: int, width: int, height: int, tile: int, precision: str, interpret: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by means2d, conics, opacities and features, in float32 (half-precision atomic
    additions are slow, and lose digits)."""
    inputs = means2d, conics, opacities, features, indices, mix, gaussians, ranges
    v = tuple(torch.zeros_like(t, dtype=torch.float32) for t in inputs[:4])
    others = transmittance, last, v_out.contiguous(), v_alphas.contiguous(), *v
    rest = V, width, height, tile, precision, interpret
    _launch(blend_backward_kernel, inputs, others, *rest)
    return v


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8], *output[2:])
    ctx.rest = inputs[8:]


def _backward(ctx, v_out, v_alphas, _transmittance, _last):
    *v, v_features = blend_backward(*ctx.saved_tensors, v_out, v_alphas, *ctx.rest)
    return *v, v_features.to(ctx.saved_tensors[3].dtype), *[None] * 10


blend.register_fake(lambda *inputs: _blend_outputs(inputs[0], inputs[3], *inputs[9:11]))
blend_backward.register_fake(
    lambda *inputs: tuple(torch.empty_like(t, dtype=torch.float32) for t in inputs[:4])
)
blend.register_autograd(_backward, setup_context=_save)
