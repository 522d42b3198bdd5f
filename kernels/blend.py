"""Blending: a tile's Gaussians, front to back, into its pixels. Features are a matrix product.

For pixel p and the Gaussians k = 1, 2, ... of its tile in order of depth, with the image mean m, conic (A, B, C):

    d     = m_k - p
    q_k   = 1/2 (A d_x^2 + C d_y^2) + B d_x d_y
    a_k   = min(0.99, opacity_k exp(-q_k)),  0 where below 1/255
    R_k   = prod_{j<=k} (1 - a_j)                             transmittance after k
    w_k   = a_k R_k / (1 - a_k),  0 from where R_k <= 1e-4    blending has stopped before k
    out_p = sum_k w_k f_k,           alpha_p = sum_k w_k = 1 - T_p,     T_p = R at the last k that was blended

A program owns one tile of P pixels and one block of channels. It takes its Gaussians in chunks of K: the weights
w [P, K] of a chunk cost a scan along K and no memory, and then out [P, channels] += w @ f [K, channels] is what
tensor cores are for. So a channel more costs a column of a matrix product, not another pass.

Features may come factored: f_k = sum_j mix_kj token_(index_kj), a mixture of J rows of a table [M, channels]. The
mixtures of a chunk are made where they are used, [K, channels] at a time, and features [N, channels] never exist.

R is a running product, not the exponential of a sum of logs: two Gaussians of alpha 0.99 leave R = 1e-4 within
2e-6 of itself, and the stopping rule has to decide as the reference does.
"""

from typing import Optional  # which older versions of torch infer schemas from

import torch
import triton
import triton.language as tl

from . import torch_backend

MAX_ALPHA = tl.constexpr(torch_backend.MAX_ALPHA)
MIN_ALPHA = tl.constexpr(torch_backend.MIN_ALPHA)
MIN_TRANSMITTANCE = tl.constexpr(torch_backend.MIN_TRANSMITTANCE)

# Gaussians a chunk and channels a program. Not timed yet: chosen by what the compiler makes of them for sm_80 and sm_90
# (`python -m kernels.bench`), where no forward spills registers and most leave room for four programs a multiprocessor.
# Backward, mixtures take registers of their own; that of float32 features spills up to 304 bytes on sm_80 in TF32,
# which smaller blocks did not cure.
FORWARD = dict(K=16, BLOCK_C=64, num_warps=4)
BACKWARD, BACKWARD_MIXED = dict(K=16, BLOCK_C=32, num_warps=4), dict(K=16, BLOCK_C=16, num_warps=4)


@triton.jit
def pixel_centres(tile, tiles_x, TILE: tl.constexpr):
    """Integer coordinates [P] of a tile's pixels, row by row; their centres lie at +0.5."""
    p = tl.arange(0, TILE * TILE)
    return tile % tiles_x * TILE + p % TILE, tile // tiles_x * TILE + p // TILE


@triton.jit
def load_chunk(gaussians_ptr, means2d_ptr, conics_ptr, opacities_ptr, k, end, first_2d, first_3d):
    """Index, mean, conic and opacity [K] of the pairs k; opacity 0 past the end. first_2d and first_3d: where the
    image's and the scene's Gaussians begin."""
    inside = k < end
    n = tl.load(gaussians_ptr + k, inside, 0).to(tl.int64)
    at = first_2d + n
    mx, my = tl.load(means2d_ptr + at * 2, inside, 0.0), tl.load(means2d_ptr + at * 2 + 1, inside, 0.0)
    A, B = tl.load(conics_ptr + at * 3, inside, 1.0), tl.load(conics_ptr + at * 3 + 1, inside, 0.0)
    C = tl.load(conics_ptr + at * 3 + 2, inside, 1.0)
    return n, mx, my, A, B, C, tl.load(opacities_ptr + first_3d + n, inside, 0.0)


@triton.jit
def pair_alpha(px, py, mx, my, A, B, C, opacity):
    """Offsets d_x, d_y, falloff exp(-q) and alpha, each [P, K], of pixels [P] and Gaussians [K]."""
    dx = mx[None, :] - (px[:, None] + 0.5)
    dy = my[None, :] - (py[:, None] + 0.5)
    q = 0.5 * (A[None, :] * dx * dx + C[None, :] * dy * dy) + B[None, :] * dx * dy
    falloff = tl.exp(-tl.maximum(q, 0.0))
    alpha = tl.minimum(opacity[None, :] * falloff, MAX_ALPHA)
    return dx, dy, falloff, tl.where(alpha >= MIN_ALPHA, alpha, 0.0)


@triton.jit
def load_features(
    features_ptr, indices_ptr, mix_ptr, scene, gaussian, n, used, c, C, M, DTYPE: tl.constexpr, J: tl.constexpr
):  # fmt: skip
    """Features [K, channels c] of a chunk: rows n of the scene's M, or mixtures of J of them by Gaussian factors."""
    column = (c < C)[None, :]
    if J == 0:
        return tl.load(features_ptr + (scene * M + n)[:, None] * C + c[None, :], used[:, None] & column, 0.0).to(DTYPE)
    f = tl.zeros([n.shape[0], c.shape[0]], tl.float32)
    for j in tl.static_range(J):
        row = scene * M + tl.load(indices_ptr + gaussian * J + j, used, 0)
        mix = tl.load(mix_ptr + gaussian * J + j, used, 0.0)
        token = tl.load(features_ptr + row[:, None] * C + c[None, :], used[:, None] & column, 0.0)
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
    last_ptr,  # out [I, H, W] int32: one past the last pair that was blended, counted within the tile
    N,
    M,
    C,
    V,
    width,
    height,
    tiles_x,
    tiles,
    TILE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    J: tl.constexpr,
):
    image = (tl.program_id(0) // tiles).to(tl.int64)
    px, py = pixel_centres(tl.program_id(0) % tiles, tiles_x, TILE)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.load(ranges_ptr + tl.program_id(0).to(tl.int64) * 2)
    end = tl.load(ranges_ptr + tl.program_id(0).to(tl.int64) * 2 + 1)
    first_2d, first_3d = image * N, image // V * N

    acc = tl.zeros([TILE * TILE, BLOCK_C], tl.float32)
    product = tl.full([TILE * TILE], 1.0, tl.float32)  # R, also past the stop
    T = tl.full([TILE * TILE], 1.0, tl.float32)
    last = tl.zeros([TILE * TILE], tl.int32)
    chunk = start
    while (chunk < end) & (tl.max(product, 0) > MIN_TRANSMITTANCE):
        k = chunk + tl.arange(0, K)
        n, mx, my, A, B, Cc, opacity = load_chunk(
            gaussians_ptr, means2d_ptr, conics_ptr, opacities_ptr, k, end, first_2d, first_3d
        )
        _, _, _, alpha = pair_alpha(px, py, mx, my, A, B, Cc, opacity)
        R = product[:, None] * tl.cumprod(1 - alpha, 1)
        # A skipped Gaussian's R is not to be asked: a parallel scan may round it above the R of the one that stopped
        blended = (R > MIN_TRANSMITTANCE) & (alpha > 0)
        w = tl.where(blended, alpha * R / (1 - alpha), 0.0)
        f = load_features(
            features_ptr, indices_ptr, mix_ptr, image // V, first_3d + n, n, k < end, c, C, M, DOT_DTYPE, J
        )
        acc = tl.dot(w.to(DOT_DTYPE), f, acc, input_precision=PRECISION)
        T = tl.minimum(T, tl.min(tl.where(blended, R, 1.0), 1))
        number = (k - start + 1).to(tl.int32)
        last = tl.maximum(last, tl.max(tl.where(blended, number[None, :], 0), 1))
        product = tl.min(R, 1)
        chunk += K

    inside = (px < width) & (py < height)
    pixel = (image * height + py) * width + px
    tl.store(
        out_ptr + pixel[:, None] * C + c[None, :],
        acc.to(out_ptr.dtype.element_ty),
        inside[:, None] & (c < C)[None, :],
    )
    if tl.program_id(1) == 0:
        tl.store(transmittance_ptr + pixel, T, inside)
        tl.store(last_ptr + pixel, last, inside)


# Backward. Given v_out [P, C] and v_alpha [P], per pixel:
#
#     v_f_k = sum_p w_k v_out_p                                 = w' @ v_out, a matrix product over the tile
#     g_k   = v_out_p . f_k + v_alpha_p   (the gradient by w_k)   = v_out @ f', another
#     S_k   = sum_{j>k} w_j g_j                                 what lies behind k
#     v_a_k = T_k g_k - S_k / (1 - a_k),   T_k = R_k / (1 - a_k)
#
# and, where alpha was not cut off at 0.99 (a = opacity exp(-q), so that v_q = -a v_a):
#
#     v_opacity = sum_p exp(-q) v_a
#     v_A = sum_p 1/2 d_x^2 v_q,    v_B = sum_p d_x d_y v_q,    v_C = sum_p 1/2 d_y^2 v_q
#     v_m = sum_p (A d_x + B d_y, B d_x + C d_y) v_q
#
# Chunks are taken back to front. R before a chunk is R after it divided by the chunk's product, starting from the
# stored T; S is carried along. Behind k within a chunk is the chunk's total minus the sum up to k, so that what
# rounding loses is relative to the chunk and not to the whole ray.
@triton.jit
def blend_backward_kernel(
    means2d_ptr,  # [I, N, 2] pixels
    conics_ptr,  # [I, N, 3]
    opacities_ptr,  # [B, N]
    features_ptr,  # [B, M, C]; M = N unless factored
    indices_ptr,  # [B, N, J] int32, of a scene's features; read if J
    mix_ptr,  # [B, N, J] float32; read if J
    gaussians_ptr,  # [pairs] int32
    ranges_ptr,  # [I * tiles, 2] int64
    transmittance_ptr,  # [I, H, W]
    last_ptr,  # [I, H, W] int32
    v_out_ptr,  # [I, H, W, C]
    v_alphas_ptr,  # [I, H, W]
    v_means2d_ptr,  # out [I, N, 2], added to atomically, as are the next three
    v_conics_ptr,  # out [I, N, 3]
    v_opacities_ptr,  # out [B, N]
    v_features_ptr,  # out [B, M, C] float32
    N,
    M,
    C,
    V,
    width,
    height,
    tiles_x,
    tiles,
    TILE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    J: tl.constexpr,
):
    image = (tl.program_id(0) // tiles).to(tl.int64)
    px, py = pixel_centres(tl.program_id(0) % tiles, tiles_x, TILE)
    start = tl.load(ranges_ptr + tl.program_id(0).to(tl.int64) * 2)
    end = tl.load(ranges_ptr + tl.program_id(0).to(tl.int64) * 2 + 1)
    first_2d, first_3d = image * N, image // V * N
    inside = (px < width) & (py < height)
    pixel = (image * height + py) * width + px

    T = tl.load(transmittance_ptr + pixel, inside, 1.0)  # after the chunk at hand
    last = tl.load(last_ptr + pixel, inside, 0)
    v_alpha_out = tl.load(v_alphas_ptr + pixel, inside, 0.0)
    S = tl.zeros([TILE * TILE], tl.float32)  # behind the chunk at hand
    chunks = tl.cdiv(tl.max(last, 0), K)
    for i in range(chunks):
        number = (chunks - 1 - i) * K + tl.arange(0, K)
        k = start + number
        n, mx, my, A, B, Cc, opacity = load_chunk(
            gaussians_ptr, means2d_ptr, conics_ptr, opacities_ptr, k, end, first_2d, first_3d
        )
        dx, dy, falloff, alpha = pair_alpha(px, py, mx, my, A, B, Cc, opacity)
        alpha = tl.where(number[None, :] < last[:, None], alpha, 0.0)
        R = tl.cumprod(1 - alpha, 1)
        T_before = T / tl.min(R, 1)
        T_k = T_before[:, None] * R / (1 - alpha)
        w = alpha * T_k

        g = tl.zeros([TILE * TILE, K], tl.float32) + v_alpha_out[:, None]
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            f = load_features(
                features_ptr, indices_ptr, mix_ptr, image // V, first_3d + n, n, k < end, c, C, M, DOT_DTYPE, J
            )
            v_out = tl.load(v_out_ptr + pixel[:, None] * C + c[None, :], inside[:, None] & (c < C)[None, :], 0.0)
            v_out = v_out.to(DOT_DTYPE)
            g = tl.dot(v_out, tl.trans(f), g, input_precision=PRECISION)
            v_f = tl.dot(tl.trans(w.to(DOT_DTYPE)), v_out, input_precision=PRECISION)
            used = (k < end)[:, None] & (c < C)[None, :]
            if J == 0:
                row = image // V * M + n
                tl.atomic_add(v_features_ptr + row[:, None] * C + c[None, :], v_f, used, sem="relaxed")
            for j in tl.static_range(J):
                row = image // V * M + tl.load(indices_ptr + (first_3d + n) * J + j, k < end, 0)
                mix = tl.load(mix_ptr + (first_3d + n) * J + j, k < end, 0.0)
                at = row[:, None] * C + c[None, :]
                tl.atomic_add(v_features_ptr + at, mix[:, None] * v_f, used, sem="relaxed")

        wg = w * g
        total = tl.sum(wg, 1)
        behind = S[:, None] + total[:, None] - tl.cumsum(wg, 1)
        v_alpha = T_k * g - behind / (1 - alpha)
        raw = opacity[None, :] * falloff
        v_alpha = tl.where((alpha > 0) & (raw <= MAX_ALPHA), v_alpha, 0.0)
        v_q = -raw * v_alpha
        used = k < end
        v_mx = tl.sum((A[None, :] * dx + B[None, :] * dy) * v_q, 0)
        v_my = tl.sum((B[None, :] * dx + Cc[None, :] * dy) * v_q, 0)
        at = first_2d + n
        tl.atomic_add(v_means2d_ptr + at * 2, v_mx, used, sem="relaxed")
        tl.atomic_add(v_means2d_ptr + at * 2 + 1, v_my, used, sem="relaxed")
        tl.atomic_add(v_conics_ptr + at * 3, tl.sum(0.5 * dx * dx * v_q, 0), used, sem="relaxed")
        tl.atomic_add(v_conics_ptr + at * 3 + 1, tl.sum(dx * dy * v_q, 0), used, sem="relaxed")
        tl.atomic_add(v_conics_ptr + at * 3 + 2, tl.sum(0.5 * dy * dy * v_q, 0), used, sem="relaxed")
        tl.atomic_add(v_opacities_ptr + first_3d + n, tl.sum(falloff * v_alpha, 0), used, sem="relaxed")
        S += total
        T = T_before


def launch_options(block, C, dtype, tile, precision, J, interpret):
    """Keyword arguments for a kernel: from FORWARD or the like, the channels and dtype of the features, the tile, the
    precision of float32 products ("tf32", "tf32x3" or "ieee") and how many tokens a feature mixes (0 = not factored).

    Half-precision features are multiplied by weights rounded to the same type; sums are float32 always. Triton's
    interpreter multiplies bfloat16 wrongly and float32 exactly, so there all is float32.
    """
    triton_dtype = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
    most = 16 if precision == "tf32x3" and J else block["BLOCK_C"]  # three products of mixtures spill otherwise
    return dict(
        block,
        BLOCK_C=min(most, max(16, triton.next_power_of_2(C))),  # tl.dot wants 16 at least
        TILE=tile,
        DOT_DTYPE=tl.float32 if interpret else triton_dtype,
        PRECISION="ieee" if interpret else precision,
        J=J,
    )


def _sizes(means2d, features, V, width, height, tile):
    tiles_x, tiles_y = triton.cdiv(width, tile), triton.cdiv(height, tile)
    return means2d.shape[1], *features.shape[1:], V, width, height, tiles_x, tiles_x * tiles_y


@torch.library.custom_op("splat::blend", mutates_args=())
def blend(
    means2d: torch.Tensor,
    conics: torch.Tensor,
    opacities: torch.Tensor,
    features: torch.Tensor,
    indices: Optional[torch.Tensor],
    mix: Optional[torch.Tensor],
    gaussians: torch.Tensor,
    ranges: torch.Tensor,
    V: int,
    width: int,
    height: int,
    tile: int,
    precision: str,
    interpret: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tensors shaped as the kernel's, contiguous, float32 but for features -> features [I, H, W, C] in their dtype,
    alphas [I, H, W], and for the backward transmittance and last [I, H, W]."""
    out, alphas, transmittance, last = _blend_outputs(means2d, features, width, height)
    sizes = _sizes(means2d, features, V, width, height, tile)
    J = 0 if indices is None else indices.shape[-1]
    if len(means2d):
        options = launch_options(FORWARD, features.shape[-1], features.dtype, tile, precision, J, interpret)
        with torch.cuda.device_of(means2d):  # triton launches on the current device, which need not be theirs
            blend_forward_kernel[(len(means2d) * sizes[-1], triton.cdiv(features.shape[-1], options["BLOCK_C"]))](
                means2d, conics, opacities, features, indices, mix, gaussians, ranges, out, transmittance, last,
                *sizes, **options,
            )  # fmt: skip
        torch.sub(1, transmittance, out=alphas)
    return out, alphas, transmittance, last


def _blend_outputs(means2d, features, width, height):
    I = means2d.shape[0]
    image = means2d.new_empty(I, height, width)
    out = features.new_empty(I, height, width, features.shape[-1])
    return out, image, torch.empty_like(image), torch.empty_like(image, dtype=torch.int32)


@blend.register_fake
def _(means2d, conics, opacities, features, indices, mix, gaussians, ranges, V, width, height, tile, *_):
    return _blend_outputs(means2d, features, width, height)


@torch.library.custom_op("splat::blend_backward", mutates_args=())
def blend_backward(
    means2d: torch.Tensor,
    conics: torch.Tensor,
    opacities: torch.Tensor,
    features: torch.Tensor,
    indices: Optional[torch.Tensor],
    mix: Optional[torch.Tensor],
    gaussians: torch.Tensor,
    ranges: torch.Tensor,
    transmittance: torch.Tensor,
    last: torch.Tensor,
    v_out: torch.Tensor,
    v_alphas: torch.Tensor,
    V: int,
    width: int,
    height: int,
    tile: int,
    precision: str,
    interpret: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients by means2d, conics, opacities and features (float32 sums: half-precision atomics lose and are slow)."""
    v = [torch.zeros_like(t, dtype=torch.float32) for t in (means2d, conics, opacities, features)]
    sizes = _sizes(means2d, features, V, width, height, tile)
    J = 0 if indices is None else indices.shape[-1]
    if len(means2d):
        block = BACKWARD_MIXED if J else BACKWARD
        options = launch_options(block, features.shape[-1], features.dtype, tile, precision, J, interpret)
        with torch.cuda.device_of(means2d):
            blend_backward_kernel[(len(means2d) * sizes[-1],)](
                means2d, conics, opacities, features, indices, mix, gaussians, ranges, transmittance, last,
                v_out.contiguous(), v_alphas.contiguous(), *v, *sizes, **options,
            )  # fmt: skip
    return tuple(v)


@blend_backward.register_fake
def _(means2d, conics, opacities, features, *_):
    return tuple(torch.empty_like(t, dtype=torch.float32) for t in (means2d, conics, opacities, features))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8], *output[2:])
    ctx.rest = inputs[8:]


def _backward(ctx, v_out, v_alphas, _transmittance, _last):
    *v, v_features = blend_backward(*ctx.saved_tensors, v_out, v_alphas, *ctx.rest)
    return *v, v_features.to(ctx.saved_tensors[3].dtype), *[None] * 10


blend.register_autograd(_backward, setup_context=_save)
