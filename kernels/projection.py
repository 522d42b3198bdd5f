"""Project Gaussians into cameras, forward and backward: one thread per Gaussian.

The maths is torch_backend.py's, with u_x, u_y called u, w here, M = J R, and the covariance on the
image S2 = M covar M' + eps2d I = [[a, b], [b, d]]. Blending reads one row of 8 numbers per
Gaussian, a splat:

    (m_x, m_y, o, cap, A, B, C, 0)     o = log2 opacity, cap = min(opacity, 0.99),
                                       (A, B, C) = -log2(e) (d / 2, -b, a / 2) / det S2

At an offset (x, y) from m the Gaussian has alpha = min(2^(o + A x^2 + B x y + C y^2), cap).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import torch_backend

MAX_ALPHA = tl.constexpr(torch_backend.MAX_ALPHA)
MIN_ALPHA = tl.constexpr(torch_backend.MIN_ALPHA)
LOG2E, LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))
BLOCK = 128  # Gaussians per program


# Vectors are tuples of three numbers, matrices tuples of three rows.
@triton.jit
def load_vector(ptr, valid=True):
    return tl.load(ptr, valid, 0.0), tl.load(ptr + 1, valid, 0.0), tl.load(ptr + 2, valid, 0.0)


@triton.jit
def store_vector(ptr, v, valid):
    for i in tl.static_range(len(v)):
        tl.store(ptr + i, v[i], valid)


@triton.jit
def add(a, b):
    total = ()
    for i in tl.static_range(len(a)):
        total = total + (a[i] + b[i],)
    return total


@triton.jit
def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@triton.jit
def transform(A, v):
    """A v"""
    return dot(A[0], v), dot(A[1], v), dot(A[2], v)


@triton.jit
def transform_back(A, v):
    """A' v"""
    x, y, z = A
    return dot((x[0], y[0], z[0]), v), dot((x[1], y[1], z[1]), v), dot((x[2], y[2], z[2]), v)


@triton.jit
def load_camera(viewmat_ptr, K_ptr):
    """One camera's R, t, f and c, all scalars."""
    R = load_vector(viewmat_ptr), load_vector(viewmat_ptr + 4), load_vector(viewmat_ptr + 8)
    t = tl.load(viewmat_ptr + 3), tl.load(viewmat_ptr + 7), tl.load(viewmat_ptr + 11)
    f = tl.load(K_ptr), tl.load(K_ptr + 4)
    c = tl.load(K_ptr + 2), tl.load(K_ptr + 5)
    return R, t, f, c


@triton.jit
def load_covar(ptr, valid):
    """A 3 x 3 matrix, made symmetric."""
    x, y, z = load_vector(ptr, valid), load_vector(ptr + 3, valid), load_vector(ptr + 6, valid)
    xy, xz, yz = 0.5 * (x[1] + y[0]), 0.5 * (x[2] + z[0]), 0.5 * (y[2] + z[1])
    return (x[0], xy, xz), (xy, y[1], yz), (xz, yz, z[2])


@triton.jit
def clamp_slope(slope, f, c, size):
    """x / z clamped to the border plus 0.3 of the half field of view, and whether it lay within."""
    margin = 0.15 * size / f
    low, high = -c / f - margin, (size - c) / f + margin
    return tl.minimum(tl.maximum(slope, low), high), (slope >= low) & (slope <= high)


@triton.jit
def row_of_M(f, z, u, r, r_z):
    """f / z (r - u r_z), with the row r of R for this axis and its row r_z for depth."""
    return f / z * (r[0] - u * r_z[0]), f / z * (r[1] - u * r_z[1]), f / z * (r[2] - u * r_z[2])


@triton.jit
def report_bad(bad_ptr, total, covar, valid):
    """Set bad if the sum of all arguments is NaN or infinite, as it is if any of them is."""
    for i in tl.static_range(3):
        total += covar[i][0] + covar[i][1] + covar[i][2]
    bad = valid & ((total - total) != 0)
    if tl.max(bad.to(tl.int32), 0) > 0:
        tl.atomic_max(bad_ptr, 1)


@triton.jit
def project_forward_kernel(
    means_ptr,  # [B, N, 3]
    covars_ptr,  # [B, N, 3, 3]
    opacities_ptr,  # [B, N]
    viewmats_ptr,  # [B, V, 4, 4]
    Ks_ptr,  # [B, V, 3, 3]
    splats_ptr,  # out [B, V, N, 8]
    depths_ptr,  # out [B, V, N]
    radii_ptr,  # out [B, V, N, 2] half size in pixels of the box where alpha >= 1/255; -1: none
    bad_ptr,  # out [1] int32: 1 if an argument is NaN or infinite; else untouched
    N, V, width, height, near_plane, far_plane, eps2d,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)  # b * V + v
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < N
    gaussian, out = image // V * N + i, image * N + i
    R, t, f, c = load_camera(viewmats_ptr + image * 16, Ks_ptr + image * 9)
    covar = load_covar(covars_ptr + gaussian * 9, valid)
    opacity = tl.load(opacities_ptr + gaussian, valid, 0.0)
    x, y, depth = add(transform(R, load_vector(means_ptr + gaussian * 3, valid)), t)
    visible = valid & (depth > near_plane) & (depth < far_plane)
    z = tl.where(visible, depth, 1.0)
    slope_x, slope_y = tl.where(visible, x, 0.0) / z, tl.where(visible, y, 0.0) / z

    report_bad(bad_ptr, x + y + depth + opacity + f[0] + f[1] + c[0] + c[1], covar, valid)

    # S2; its determinant is expanded, as in torch_backend.py
    u, _ = clamp_slope(slope_x, f[0], c[0], width)
    w, _ = clamp_slope(slope_y, f[1], c[1], height)
    M0, M1 = row_of_M(f[0], z, u, R[0], R[2]), row_of_M(f[1], z, w, R[1], R[2])
    covar_M1 = transform(covar, M1)
    a, b, d = dot(M0, transform(covar, M0)), dot(M0, covar_M1), dot(M1, covar_M1)
    det = a * d - b * b + eps2d * (a + d) + eps2d * eps2d
    a, d = a + eps2d, d + eps2d

    # The box, as in torch_backend.image_radii
    reach = 2 * tl.log(tl.maximum(opacity, 1e-12) / MIN_ALPHA)
    visible = visible & (det > 0) & (a > 0) & (reach >= 0)
    det, reach = tl.where(visible, det, 1.0), tl.maximum(reach, 0.0)
    rx = tl.where(visible, tl.sqrt(reach * tl.maximum(a, 0.0)), -1.0)
    ry = tl.where(visible, tl.sqrt(reach * tl.maximum(d, 0.0)), -1.0)
    tl.store(depths_ptr + out, depth, valid)
    store_vector(radii_ptr + out * 2, (rx, ry), valid)

    m = f[0] * slope_x + c[0], f[1] * slope_y + c[1]
    o, cap = tl.log2(tl.maximum(opacity, 1e-30)), tl.minimum(opacity, MAX_ALPHA)
    half = -0.5 / det * LOG2E
    splat = m[0], m[1], o, cap, half * d, -2 * half * b, half * a, tl.zeros([BLOCK], tl.float32)
    store_vector(splats_ptr + out * 8, splat, valid)


# Backward. v_t is the gradient of the loss with respect to t. With Q = inv(S2) and G = v_Q:
#
#     Q = -ln 2 [[2 A, B], [B, 2 C]],    G = -log2(e) / 2 [[v_A, v_B], [v_B, v_C]]
#     v_opacity = log2(e) v_o / opacity
#     v_S2    = -Q G Q = [[v_a, v_b], [v_b, v_d]]
#     v_covar = M' v_S2 M
#     v_J     = 2 v_S2 J (R covar R') = 2 v_S2 (M covar) R'
#
# Four entries of J depend on the mean: J_00 = f_x / z, J_02 = -f_x u / z, J_11 = f_y / z and
# J_12 = -f_y w / z. s_u is 1 where u = x / z, and 0 where u is clamped; likewise s_w:
#
#     v_u = -f_x / z v_J02
#     v_x = f_x / z v_m.x + s_u v_u / z                            and likewise v_w, v_y
#     v_z = -(f_x v_m.x x + f_y v_m.y y) / z^2 - (f_x v_J00 + f_y v_J11) / z^2
#           + (f_x u v_J02 + f_y w v_J12) / z^2 - (s_u v_u u + s_w v_w w) / z
#     v_mean = R' (v_x, v_y, v_z)
#
# A program sums over the views of its Gaussians, so no atomics are needed.
@triton.jit
def conic_backward(conic, v_conic):
    """v_S2 as (v_a, v_b, v_d), from a splat's (A, B, C) and their gradients."""
    A, B, C = conic[0] * (-2 * LN2), conic[1] * -LN2, conic[2] * (-2 * LN2)  # Q
    scale = -0.5 * LOG2E
    v_A, v_B, v_C = v_conic[0] * scale, v_conic[1] * scale, v_conic[2] * scale  # G
    g00, g01 = v_A * A + v_B * B, v_A * B + v_B * C  # G Q
    g10, g11 = v_B * A + v_C * B, v_B * B + v_C * C
    return -(A * g00 + B * g10), -(A * g01 + B * g11), -(B * g01 + C * g11)


@triton.jit
def covar_backward(v_S2, M0, M1):
    """v_covar = M' v_S2 M as (xx, xy, xz, yy, yz, zz)."""
    a, b, d = v_S2
    xx = a * M0[0] * M0[0] + 2 * b * M0[0] * M1[0] + d * M1[0] * M1[0]
    yy = a * M0[1] * M0[1] + 2 * b * M0[1] * M1[1] + d * M1[1] * M1[1]
    zz = a * M0[2] * M0[2] + 2 * b * M0[2] * M1[2] + d * M1[2] * M1[2]
    xy = a * M0[0] * M0[1] + b * (M0[0] * M1[1] + M0[1] * M1[0]) + d * M1[0] * M1[1]
    xz = a * M0[0] * M0[2] + b * (M0[0] * M1[2] + M0[2] * M1[0]) + d * M1[0] * M1[2]
    yz = a * M0[1] * M0[2] + b * (M0[1] * M1[2] + M0[2] * M1[1]) + d * M1[1] * M1[2]
    return xx, xy, xz, yy, yz, zz


@triton.jit
def jacobian_backward(v_S2, M0, M1, R, covar):
    """v_J00, v_J02, v_J11, v_J12"""
    v_a, v_b, v_d = v_S2
    x, y, z = transform(covar, R[0]), transform(covar, R[1]), transform(covar, R[2])  # covar R'
    v_J00 = 2 * (v_a * dot(M0, x) + v_b * dot(M1, x))
    v_J02 = 2 * (v_a * dot(M0, z) + v_b * dot(M1, z))
    v_J11 = 2 * (v_b * dot(M0, y) + v_d * dot(M1, y))
    v_J12 = 2 * (v_b * dot(M0, z) + v_d * dot(M1, z))
    return v_J00, v_J02, v_J11, v_J12


@triton.jit
def project_backward_kernel(
    means_ptr, covars_ptr, opacities_ptr, viewmats_ptr, Ks_ptr, splats_ptr, radii_ptr,  # as forward
    v_splats_ptr,  # [B, V, N, 8]; columns 3 (cap) and 7 are not read
    v_means_ptr,  # out [B, N, 3]
    v_covars_ptr,  # out [B, N, 3, 3]
    v_opacities_ptr,  # out [B, N]
    N, V, width, height,
    BLOCK: tl.constexpr,
):  # fmt: skip
    scene = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < N
    gaussian = scene * N + i
    mean = load_vector(means_ptr + gaussian * 3, valid)
    covar = load_covar(covars_ptr + gaussian * 9, valid)
    zero = tl.zeros([BLOCK], tl.float32)
    v_mean, v_covar, v_o = (zero, zero, zero), (zero, zero, zero, zero, zero, zero), zero
    for v in range(V):
        # Recompute the forward pass
        image = scene * V + v
        at = image * N + i
        visible = valid & (tl.load(radii_ptr + at * 2, valid, -1.0) >= 0)
        R, t, f, c = load_camera(viewmats_ptr + image * 16, Ks_ptr + image * 9)
        x, y, z = add(transform(R, mean), t)
        x, y, z = tl.where(visible, x, 0.0), tl.where(visible, y, 0.0), tl.where(visible, z, 1.0)
        u, s_u = clamp_slope(x / z, f[0], c[0], width)
        w, s_w = clamp_slope(y / z, f[1], c[1], height)
        M0, M1 = row_of_M(f[0], z, u, R[0], R[2]), row_of_M(f[1], z, w, R[1], R[2])

        # Zeros where not visible: all gradients are linear in v_splats
        v_mx, v_my, v_o_here = load_vector(v_splats_ptr + at * 8, visible)
        v_o += v_o_here
        v_conic = load_vector(v_splats_ptr + at * 8 + 4, visible)
        v_S2 = conic_backward(load_vector(splats_ptr + at * 8 + 4, visible), v_conic)
        v_covar = add(v_covar, covar_backward(v_S2, M0, M1))
        v_J00, v_J02, v_J11, v_J12 = jacobian_backward(v_S2, M0, M1, R, covar)
        v_u = tl.where(s_u, -f[0] / z * v_J02, 0.0)
        v_w = tl.where(s_w, -f[1] / z * v_J12, 0.0)
        v_x, v_y = (f[0] * v_mx + v_u) / z, (f[1] * v_my + v_w) / z
        v_z = f[0] * (u * v_J02 - v_J00 - v_mx * x) + f[1] * (w * v_J12 - v_J11 - v_my * y)
        v_z = v_z / (z * z) - (v_u * u + v_w * w) / z
        v_mean = add(v_mean, transform_back(R, (v_x, v_y, v_z)))

    opacity = tl.load(opacities_ptr + gaussian, valid, 1.0)
    tl.store(v_opacities_ptr + gaussian, v_o * LOG2E / tl.maximum(opacity, 1e-30), valid)
    store_vector(v_means_ptr + gaussian * 3, v_mean, valid)
    xx, xy, xz, yy, yz, zz = v_covar
    store_vector(v_covars_ptr + gaussian * 9, (xx, xy, xz), valid)
    store_vector(v_covars_ptr + gaussian * 9 + 3, (xy, yy, yz), valid)
    store_vector(v_covars_ptr + gaussian * 9 + 6, (xz, yz, zz), valid)


def _project_outputs(means, viewmats):
    B, N, V = *means.shape[:2], viewmats.shape[1]
    outputs = (means.new_empty(B, V, N, *last) for last in ((8,), (), (2,)))
    return *outputs, means.new_zeros(1, dtype=torch.int32)


@torch.library.custom_op("splat::project", mutates_args=())
def project(
    means: Tensor, covars: Tensor, opacities: Tensor, viewmats: Tensor, Ks: Tensor,
    width: int, height: int, near_plane: float, far_plane: float, eps2d: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous float32 tensors, shaped as the kernel's -> splats, depths, radii, bad. Splats are
    differentiable with respect to means, covars and opacities."""
    outputs = _project_outputs(means, viewmats)
    (B, N), V = opacities.shape, viewmats.shape[1]
    if B * V * N:
        with torch.cuda.device_of(means):  # triton launches on the current device
            project_forward_kernel[(triton.cdiv(N, BLOCK), B * V)](
                means, covars, opacities, viewmats, Ks, *outputs,
                N, V, float(width), float(height), near_plane, far_plane, eps2d,
                BLOCK=BLOCK, enable_fp_fusion=True,
            )  # fmt: skip
    return outputs


@torch.library.custom_op("splat::project_backward", mutates_args=())
def project_backward(
    means: Tensor, covars: Tensor, opacities: Tensor, viewmats: Tensor, Ks: Tensor,
    splats: Tensor, radii: Tensor, v_splats: Tensor, width: int, height: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients with respect to means, covars and opacities."""
    inputs = means, covars, opacities, viewmats, Ks, splats, radii, v_splats.contiguous()
    (B, N), V = opacities.shape, viewmats.shape[1]
    v = tuple(map(torch.empty_like, inputs[:3]))
    if B * N:
        with torch.cuda.device_of(means):
            project_backward_kernel[(triton.cdiv(N, BLOCK), B)](
                *inputs, *v, N, V, float(width), float(height), BLOCK=BLOCK, enable_fp_fusion=True
            )
    return v


def _save(ctx, inputs, output):
    splats, depths, radii, bad = output
    ctx.save_for_backward(*inputs[:5], splats, radii)
    ctx.size = inputs[5:7]
    ctx.mark_non_differentiable(depths, radii, bad)


def _backward(ctx, v_splats, _depths, _radii, _bad):
    return *project_backward(*ctx.saved_tensors, v_splats, *ctx.size), *[None] * 7


project.register_fake(lambda *inputs: _project_outputs(inputs[0], inputs[3]))
project_backward.register_fake(lambda *inputs: tuple(map(torch.empty_like, inputs[:3])))
project.register_autograd(_backward, setup_context=_save)
