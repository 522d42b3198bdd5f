"""Gaussians to the image plane: one thread per (camera, Gaussian), forward and backward.

Forward, with camera rotation R, translation t, focal lengths f, centre c (see torch_backend.py for the whole):

    (x, y, z) = R mean + t,          m = (f_x x / z + c_x, f_y y / z + c_y)
    u = clamp(x / z),  w = clamp(y / z)          to the image border plus 0.3 of the half field of view
    J = [[f_x / z, 0, -f_x u / z],  M = J R
         [0, f_y / z, -f_y w / z]],
    S2 = M covar M' + eps2d I = [[a, b], [b, d]],    conic = inv(S2) = [d, -b, a] / det

The determinant is expanded into det(M covar M') + eps2d (a' + d') + eps2d^2: for a long thin Gaussian the first
term is lost to float32 rounding, and without the expansion it would take the others with it.
"""

import torch
import triton
import triton.language as tl

from .torch_backend import MIN_ALPHA as _MIN_ALPHA

MIN_ALPHA = tl.constexpr(_MIN_ALPHA)
BLOCK = 128  # Gaussians per program; memory-bound, and not sensitive to it


@triton.jit
def load_camera(viewmat_ptr, K_ptr):
    """One camera's rotation (row by row), translation, focal lengths and centre, as scalars."""
    r00, r01, r02, tx = (
        tl.load(viewmat_ptr),
        tl.load(viewmat_ptr + 1),
        tl.load(viewmat_ptr + 2),
        tl.load(viewmat_ptr + 3),
    )
    r10, r11, r12, ty = (
        tl.load(viewmat_ptr + 4),
        tl.load(viewmat_ptr + 5),
        tl.load(viewmat_ptr + 6),
        tl.load(viewmat_ptr + 7),
    )
    r20, r21, r22, tz = (
        tl.load(viewmat_ptr + 8),
        tl.load(viewmat_ptr + 9),
        tl.load(viewmat_ptr + 10),
        tl.load(viewmat_ptr + 11),
    )
    fx, cx, fy, cy = tl.load(K_ptr), tl.load(K_ptr + 2), tl.load(K_ptr + 4), tl.load(K_ptr + 5)
    return r00, r01, r02, r10, r11, r12, r20, r21, r22, tx, ty, tz, fx, fy, cx, cy


@triton.jit
def load_covar(covar_ptr, n, valid):
    """The six entries of a symmetric 3x3 (xx, xy, xz, yy, yz, zz), averaging the two halves that are stored."""
    p = covar_ptr + n * 9
    xx, yy, zz = tl.load(p, valid, 0.0), tl.load(p + 4, valid, 0.0), tl.load(p + 8, valid, 0.0)
    xy = 0.5 * (tl.load(p + 1, valid, 0.0) + tl.load(p + 3, valid, 0.0))
    xz = 0.5 * (tl.load(p + 2, valid, 0.0) + tl.load(p + 6, valid, 0.0))
    yz = 0.5 * (tl.load(p + 5, valid, 0.0) + tl.load(p + 7, valid, 0.0))
    return xx, xy, xz, yy, yz, zz


@triton.jit
def clamp_slope(slope, f, c, size):
    """x / z kept within the image border plus 0.3 of the half field of view, and whether it was within."""
    margin = 0.15 * size / f
    low, high = -c / f - margin, (size - c) / f + margin
    return tl.minimum(tl.maximum(slope, low), high), (slope >= low) & (slope <= high)


@triton.jit
def quadratic(mx, my, mz, nx, ny, nz, xx, xy, xz, yy, yz, zz):
    """m' S n for a symmetric S."""
    return mx * (xx * nx + xy * ny + xz * nz) + my * (xy * nx + yy * ny + yz * nz) + mz * (xz * nx + yz * ny + zz * nz)


@triton.jit
def project_forward_kernel(
    means_ptr,  # [B, N, 3]
    covars_ptr,  # [B, N, 3, 3]
    opacities_ptr,  # [B, N]
    viewmats_ptr,  # [B, V, 4, 4]
    Ks_ptr,  # [B, V, 3, 3]
    means2d_ptr,  # out [B, V, N, 2] pixels
    conics_ptr,  # out [B, V, N, 3] inverse image covariance: xx, xy, yy
    depths_ptr,  # out [B, V, N]
    radii_ptr,  # out [B, V, N, 2] half size in pixels of the box where alpha >= 1/255; -1 = nowhere
    N,
    V,
    width,
    height,
    near_plane,
    far_plane,
    eps2d,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)  # b * V + v
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = n < N
    gaussian = image // V * N + n
    r00, r01, r02, r10, r11, r12, r20, r21, r22, tx, ty, tz, fx, fy, cx, cy = load_camera(
        viewmats_ptr + image * 16, Ks_ptr + image * 9
    )
    px = tl.load(means_ptr + gaussian * 3, valid, 0.0)
    py = tl.load(means_ptr + gaussian * 3 + 1, valid, 0.0)
    pz = tl.load(means_ptr + gaussian * 3 + 2, valid, 0.0)
    x = r00 * px + r01 * py + r02 * pz + tx
    y = r10 * px + r11 * py + r12 * pz + ty
    depth = r20 * px + r21 * py + r22 * pz + tz
    visible = valid & (depth > near_plane) & (depth < far_plane)
    z = tl.where(visible, depth, 1.0)
    slope_x, slope_y = tl.where(visible, x, 0.0) / z, tl.where(visible, y, 0.0) / z

    u, _ = clamp_slope(slope_x, fx, cx, width)
    w, _ = clamp_slope(slope_y, fy, cy, height)
    xx, xy, xz, yy, yz, zz = load_covar(covars_ptr, gaussian, valid)
    m0, m1, m2 = fx / z * (r00 - u * r20), fx / z * (r01 - u * r21), fx / z * (r02 - u * r22)  # M's rows
    n0, n1, n2 = fy / z * (r10 - w * r20), fy / z * (r11 - w * r21), fy / z * (r12 - w * r22)
    a = quadratic(m0, m1, m2, m0, m1, m2, xx, xy, xz, yy, yz, zz)
    b = quadratic(m0, m1, m2, n0, n1, n2, xx, xy, xz, yy, yz, zz)
    d = quadratic(n0, n1, n2, n0, n1, n2, xx, xy, xz, yy, yz, zz)
    det = a * d - b * b + eps2d * (a + d) + eps2d * eps2d
    a, d = a + eps2d, d + eps2d
    opacity = tl.load(opacities_ptr + gaussian, valid, 0.0)
    reach = 2 * tl.log(tl.maximum(opacity, 1e-12) / MIN_ALPHA)
    visible = visible & (det > 0) & (a > 0) & (reach >= 0)
    det = tl.where(visible, det, 1.0)
    reach = tl.maximum(reach, 0.0)

    out = image * N + n
    tl.store(means2d_ptr + out * 2, fx * slope_x + cx, valid)
    tl.store(means2d_ptr + out * 2 + 1, fy * slope_y + cy, valid)
    tl.store(conics_ptr + out * 3, d / det, valid)
    tl.store(conics_ptr + out * 3 + 1, -b / det, valid)
    tl.store(conics_ptr + out * 3 + 2, a / det, valid)
    tl.store(depths_ptr + out, depth, valid)
    tl.store(radii_ptr + out * 2, tl.where(visible, tl.sqrt(reach * tl.maximum(a, 0.0)), -1.0), valid)
    tl.store(radii_ptr + out * 2 + 1, tl.where(visible, tl.sqrt(reach * tl.maximum(d, 0.0)), -1.0), valid)


# Backward. Write v_t for the gradient of the loss by t. With Q = inv(S2) = [[A, B], [B, C]], of which B was stored
# once, the symmetric gradient by Q is G = [[v_A, v_B/2], [v_B/2, v_C]], and
#
#     v_S2    = -Q G Q
#     v_covar = M' v_S2 M
#     v_J     = 2 v_S2 J (R covar R') = 2 v_S2 (M covar) R'
#
# Of J only four entries move: J_00 = f_x / z, J_02 = -f_x u / z, J_11 = f_y / z, J_12 = -f_y w / z. Where u was not
# clamped, u = x / z moves too (s_u = 1, else 0):
#
#     v_u = -f_x / z v_J02
#     v_x = f_x / z v_m.x + s_u v_u / z                                    and likewise v_w, v_y
#     v_z = -(f_x v_m.x x + f_y v_m.y y) / z^2 - (f_x v_J00 + f_y v_J11) / z^2
#           + (f_x u v_J02 + f_y w v_J12) / z^2 - (s_u v_u u + s_w v_w w) / z
#     v_mean = R' (v_x, v_y, v_z)
#
# One program owns its Gaussians and walks over the views, so the sums need no atomics.
@triton.jit
def project_backward_kernel(
    means_ptr,  # [B, N, 3]
    covars_ptr,  # [B, N, 3, 3]
    viewmats_ptr,  # [B, V, 4, 4]
    Ks_ptr,  # [B, V, 3, 3]
    conics_ptr,  # [B, V, N, 3]
    radii_ptr,  # [B, V, N, 2]
    v_means2d_ptr,  # [B, V, N, 2]
    v_conics_ptr,  # [B, V, N, 3]
    v_means_ptr,  # out [B, N, 3]
    v_covars_ptr,  # out [B, N, 3, 3]
    N,
    V,
    width,
    height,
    BLOCK: tl.constexpr,
):
    scene = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = n < N
    gaussian = scene * N + n
    px = tl.load(means_ptr + gaussian * 3, valid, 0.0)
    py = tl.load(means_ptr + gaussian * 3 + 1, valid, 0.0)
    pz = tl.load(means_ptr + gaussian * 3 + 2, valid, 0.0)
    xx, xy, xz, yy, yz, zz = load_covar(covars_ptr, gaussian, valid)
    zero = tl.zeros([BLOCK], tl.float32)
    v_px, v_py, v_pz = zero, zero, zero
    v_xx, v_xy, v_xz, v_yy, v_yz, v_zz = zero, zero, zero, zero, zero, zero

    for v in range(V):
        image = scene * V + v
        r00, r01, r02, r10, r11, r12, r20, r21, r22, tx, ty, tz, fx, fy, cx, cy = load_camera(
            viewmats_ptr + image * 16, Ks_ptr + image * 9
        )
        at = image * N + n
        visible = valid & (tl.load(radii_ptr + at * 2, valid, -1.0) >= 0)
        x = tl.where(visible, r00 * px + r01 * py + r02 * pz + tx, 0.0)
        y = tl.where(visible, r10 * px + r11 * py + r12 * pz + ty, 0.0)
        z = tl.where(visible, r20 * px + r21 * py + r22 * pz + tz, 1.0)
        u, s_u = clamp_slope(x / z, fx, cx, width)
        w, s_w = clamp_slope(y / z, fy, cy, height)
        m0, m1, m2 = fx / z * (r00 - u * r20), fx / z * (r01 - u * r21), fx / z * (r02 - u * r22)
        n0, n1, n2 = fy / z * (r10 - w * r20), fy / z * (r11 - w * r21), fy / z * (r12 - w * r22)

        # Everything below is linear in these five, so what is not visible adds nothing
        v_mx = tl.load(v_means2d_ptr + at * 2, visible, 0.0)
        v_my = tl.load(v_means2d_ptr + at * 2 + 1, visible, 0.0)
        v_A = tl.load(v_conics_ptr + at * 3, visible, 0.0)
        v_B = 0.5 * tl.load(v_conics_ptr + at * 3 + 1, visible, 0.0)
        v_C = tl.load(v_conics_ptr + at * 3 + 2, visible, 0.0)
        A = tl.load(conics_ptr + at * 3, visible, 0.0)
        B = tl.load(conics_ptr + at * 3 + 1, visible, 0.0)
        C = tl.load(conics_ptr + at * 3 + 2, visible, 0.0)
        g00, g01, g10, g11 = v_A * A + v_B * B, v_A * B + v_B * C, v_B * A + v_C * B, v_B * B + v_C * C  # G Q
        v_a, v_b, v_d = -(A * g00 + B * g10), -(A * g01 + B * g11), -(B * g01 + C * g11)

        v_xx += v_a * m0 * m0 + 2 * v_b * m0 * n0 + v_d * n0 * n0
        v_yy += v_a * m1 * m1 + 2 * v_b * m1 * n1 + v_d * n1 * n1
        v_zz += v_a * m2 * m2 + 2 * v_b * m2 * n2 + v_d * n2 * n2
        v_xy += v_a * m0 * m1 + v_b * (m0 * n1 + m1 * n0) + v_d * n0 * n1
        v_xz += v_a * m0 * m2 + v_b * (m0 * n2 + m2 * n0) + v_d * n0 * n2
        v_yz += v_a * m1 * m2 + v_b * (m1 * n2 + m2 * n1) + v_d * n1 * n2

        # Columns of R covar M' that J's entries multiply: k = R's row 0, 1 or 2; m, n = M's rows
        m_r0 = quadratic(m0, m1, m2, r00, r01, r02, xx, xy, xz, yy, yz, zz)
        m_r2 = quadratic(m0, m1, m2, r20, r21, r22, xx, xy, xz, yy, yz, zz)
        m_r1 = quadratic(m0, m1, m2, r10, r11, r12, xx, xy, xz, yy, yz, zz)
        n_r0 = quadratic(n0, n1, n2, r00, r01, r02, xx, xy, xz, yy, yz, zz)
        n_r1 = quadratic(n0, n1, n2, r10, r11, r12, xx, xy, xz, yy, yz, zz)
        n_r2 = quadratic(n0, n1, n2, r20, r21, r22, xx, xy, xz, yy, yz, zz)
        v_J00 = 2 * (v_a * m_r0 + v_b * n_r0)
        v_J02 = 2 * (v_a * m_r2 + v_b * n_r2)
        v_J11 = 2 * (v_b * m_r1 + v_d * n_r1)
        v_J12 = 2 * (v_b * m_r2 + v_d * n_r2)

        v_u = tl.where(s_u, -fx / z * v_J02, 0.0)
        v_w = tl.where(s_w, -fy / z * v_J12, 0.0)
        v_x = (fx * v_mx + v_u) / z
        v_y = (fy * v_my + v_w) / z
        v_z = (fx * (u * v_J02 - v_J00 - v_mx * x) + fy * (w * v_J12 - v_J11 - v_my * y)) / (z * z)
        v_z -= (v_u * u + v_w * w) / z
        v_px += r00 * v_x + r10 * v_y + r20 * v_z
        v_py += r01 * v_x + r11 * v_y + r21 * v_z
        v_pz += r02 * v_x + r12 * v_y + r22 * v_z

    tl.store(v_means_ptr + gaussian * 3, v_px, valid)
    tl.store(v_means_ptr + gaussian * 3 + 1, v_py, valid)
    tl.store(v_means_ptr + gaussian * 3 + 2, v_pz, valid)
    p = v_covars_ptr + gaussian * 9
    tl.store(p, v_xx, valid)
    tl.store(p + 1, v_xy, valid)
    tl.store(p + 2, v_xz, valid)
    tl.store(p + 3, v_xy, valid)
    tl.store(p + 4, v_yy, valid)
    tl.store(p + 5, v_yz, valid)
    tl.store(p + 6, v_xz, valid)
    tl.store(p + 7, v_yz, valid)
    tl.store(p + 8, v_zz, valid)


@torch.library.custom_op("splat::project", mutates_args=())
def project(
    means: torch.Tensor,
    covars: torch.Tensor,
    opacities: torch.Tensor,
    viewmats: torch.Tensor,
    Ks: torch.Tensor,
    width: int,
    height: int,
    near_plane: float,
    far_plane: float,
    eps2d: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tensors shaped as the kernel's, contiguous float32 -> means2d, conics, depths, radii. Differentiable: means and
    covars by means2d and conics."""
    means2d, conics, depths, radii = _project_outputs(means, viewmats)
    if depths.numel():
        B, V, N = depths.shape
        with torch.cuda.device_of(means):  # triton launches on the current device, which need not be theirs
            project_forward_kernel[(triton.cdiv(N, BLOCK), B * V)](
                means, covars, opacities, viewmats, Ks, means2d, conics, depths, radii,
                N, V, float(width), float(height), near_plane, far_plane, eps2d, BLOCK=BLOCK,
            )  # fmt: skip
    return means2d, conics, depths, radii


def _project_outputs(means, viewmats):
    B, N, V = *means.shape[:2], viewmats.shape[1]
    return tuple(means.new_empty(B, V, N, *last) for last in ((2,), (3,), (), (2,)))


@project.register_fake
def _(means, covars, opacities, viewmats, *_):
    return _project_outputs(means, viewmats)


@torch.library.custom_op("splat::project_backward", mutates_args=())
def project_backward(
    means: torch.Tensor,
    covars: torch.Tensor,
    viewmats: torch.Tensor,
    Ks: torch.Tensor,
    conics: torch.Tensor,
    radii: torch.Tensor,
    v_means2d: torch.Tensor,
    v_conics: torch.Tensor,
    width: int,
    height: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients by means and covars."""
    v_means, v_covars = torch.zeros_like(means), torch.zeros_like(covars)
    if conics.numel():
        B, V, N, _ = conics.shape
        with torch.cuda.device_of(means):
            project_backward_kernel[(triton.cdiv(N, BLOCK), B)](
                means, covars, viewmats, Ks, conics, radii, v_means2d.contiguous(), v_conics.contiguous(),
                v_means, v_covars, N, V, float(width), float(height), BLOCK=BLOCK,
            )  # fmt: skip
    return v_means, v_covars


@project_backward.register_fake
def _(means, covars, *_):
    return torch.empty_like(means), torch.empty_like(covars)


def _save(ctx, inputs, output):
    means, covars, _, viewmats, Ks, *ctx.rest = inputs
    _, conics, depths, radii = output
    ctx.save_for_backward(means, covars, viewmats, Ks, conics, radii)
    ctx.mark_non_differentiable(depths, radii)


def _backward(ctx, v_means2d, v_conics, _depths, _radii):
    v_means, v_covars = project_backward(*ctx.saved_tensors, v_means2d, v_conics, *ctx.rest[:2])
    return v_means, v_covars, *[None] * 8


project.register_autograd(_backward, setup_context=_save)
