"""The rasteriser as a loop in float64, one Gaussian at a time over all pixels, and its scenes.

Shares no code with kernels/, only the three thresholds: it inverts matrices where they expand
determinants, and multiplies transmittances where they sum logarithms or scan.
"""

import math

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# 0.99 and 1e-4 as float32 has them: see kernels/torch_backend.py
MAX_ALPHA, MIN_ALPHA, MIN_T = torch.tensor([0.99, 1 / 255, 1e-4], dtype=torch.float32).tolist()


def rasterize_dense(
    means, covars, opacities, features, viewmats, Ks, width, height,
    near_plane=0.01, far_plane=1e10, eps2d=0.3,
):  # fmt: skip
    """As kernels.rasterize, in float64, and certain [B, V, H, W]: where no decision (skip, stop,
    cut off, order) is so close that float32 may decide otherwise."""
    tensors = [t.double() for t in (means, covars, opacities, features, viewmats, Ks)]
    B, V, C = *viewmats.shape[:2], features.shape[-1]
    images = [
        render(*(t[b] for t in tensors[:4]), tensors[4][b, v], tensors[5][b, v], width, height,
               near_plane, far_plane, eps2d)
        for b in range(B) for v in range(V)
    ]  # fmt: skip
    if not images:
        out = tensors[0].new_zeros(B, V, height, width, C + 1)
        return out[..., 1:], out[..., 0], out[..., 0] == 0
    out, alphas, certain = (torch.stack(t).unflatten(0, (B, V)) for t in zip(*images))
    return out, alphas, certain


def project(mean, covar, R, K, size, eps2d):
    """Mean [2] and inverse covariance [2, 2] on the image of a mean in the camera's axes."""
    f, c, z = K.diagonal()[:2], K[:2, 2], mean[2]
    mean2d = f * mean[:2] / z + c
    margin = 0.15 * size / f
    u = (mean[:2] / z).clamp(-c / f - margin, (size - c) / f + margin)
    J = torch.stack([torch.stack([f[0] / z, 0 * z, -f[0] * u[0] / z]),
                     torch.stack([0 * z, f[1] / z, -f[1] * u[1] / z])])  # fmt: skip
    return mean2d, torch.linalg.inv(J @ R @ covar @ R.T @ J.T + eps2d * torch.eye(2).to(K))


def render(
    means, covars, opacities, features, viewmat, K, width, height, near_plane, far_plane, eps2d
):
    """One image of one scene: features [H, W, C], alphas [H, W], certain [H, W]."""
    R, size = viewmat[:3, :3], torch.tensor([width, height]).to(K)
    x, y = (torch.arange(n).to(K) + 0.5 for n in (width, height))
    camera = means @ R.T + viewmat[:3, 3]
    depths = camera[:, 2].tolist()
    T, out = torch.ones(height, width).to(K), torch.zeros(height, width, features.shape[1]).to(K)
    certain = torch.ones_like(T, dtype=torch.bool)
    stopped = torch.zeros_like(certain)
    all_cut = torch.ones_like(certain)  # every Gaussian so far was cut off at MAX_ALPHA
    z_before, alpha_before = -1.0, torch.zeros_like(T)
    # Unbound, as the backward of an index costs a whole tensor
    points, shapes, peaks, rows = (t.unbind() for t in (camera, covars, opacities, features))
    for n in sorted(range(len(depths)), key=lambda n: (depths[n], n)):
        if not near_plane < points[n][2] < far_plane:
            continue
        if stopped.all():
            break
        mean2d, conic = project(points[n], shapes[n], R, K, size, eps2d)
        d = torch.stack(torch.meshgrid(x - mean2d[0], y - mean2d[1], indexing="xy"), -1)
        raw = peaks[n] * torch.exp(-0.5 * (d @ conic * d).sum(-1))
        alpha = raw.clamp(max=MAX_ALPHA)
        skipped = alpha < MIN_ALPHA
        T_next = T * (1 - alpha)

        alive = ~stopped
        all_cut = all_cut & (skipped | (raw > MAX_ALPHA))
        two_cut = torch.full_like(T, (1 - MAX_ALPHA) ** 2)
        exact = all_cut & torch.isclose(T_next, two_cut, rtol=1e-9)
        certain &= ~(alive & ((raw / MIN_ALPHA - 1).abs() < 1e-3))
        certain &= ~(alive & ((raw / MAX_ALPHA - 1).abs() < 1e-4))
        certain &= ~(alive & ~skipped & ((T_next / MIN_T - 1).abs() < 1e-3) & ~exact)
        if 0 < depths[n] - z_before < 1e-5 * depths[n]:
            certain &= ~(alive & ~skipped & (alpha_before >= MIN_ALPHA))
        z_before, alpha_before = depths[n], alpha

        stopped = stopped | (~skipped & (T_next <= MIN_T))
        out = out + torch.where(skipped | stopped, 0.0, alpha * T)[..., None] * rows[n]
        T = torch.where(skipped | stopped, T, T_next)
    return out, 1 - T, certain


def random_rotation(generator, angle=math.pi):
    """About a random axis, by at most `angle` radians. [3, 3]"""
    axis = torch.nn.functional.normalize(torch.randn(3, generator=generator), dim=0)
    x, y, z = axis * angle * torch.rand((), generator=generator)
    return torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]]))


def make_scene(
    seed=0, B=1, V=1, N=20, C=3, width=19, height=17, sigma=0.15, opacity=None, flat=1.0,
    dtype=torch.float32,
):  # fmt: skip
    """Arguments for rasterize: N Gaussians about 4 in front of V cameras, some outside the images,
    some behind.

    `sigma` is their typical standard deviation in units of their distance; `opacity` one value for
    all, or None for uniform in 0..1; `flat` scales one axis of each, so that 0 makes them discs.
    """
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(B, N, 3, generator=g) * torch.tensor([1.5, 1.5, 1.2])
    means = means + torch.tensor([0.0, 0.0, 4.0])
    if N > 1:
        means[:, -1, 2] -= 6  # one behind the cameras
    sigmas = 4 * sigma * torch.exp(0.7 * torch.randn(B, N, 3, generator=g))
    sigmas = sigmas * torch.tensor([1.0, 1.0, flat])
    rotations = torch.zeros(B, N, 3, 3)
    for rotation in rotations.view(-1, 3, 3):
        rotation.copy_(random_rotation(g))
    covars = rotations @ torch.diag_embed(sigmas**2) @ rotations.transpose(-1, -2)
    covars = 0.5 * (covars + covars.transpose(-1, -2))
    opacities = torch.full((B, N), 0.0 if opacity is None else float(opacity))
    if opacity is None:
        opacities.uniform_(generator=g)
    features = torch.randn(B, N, C, generator=g)
    viewmats = torch.eye(4).repeat(B, V, 1, 1)
    for viewmat in viewmats.view(-1, 4, 4):
        viewmat[:3, :3] = random_rotation(g, 0.3)
        viewmat[:3, 3] = 0.3 * torch.randn(3, generator=g)
    f = 0.8 * max(width, height)
    K = torch.tensor([[f, 0, 0.45 * width], [0, 1.1 * f, 0.55 * height], [0, 0, 1.0]])
    Ks = K.repeat(B, V, 1, 1)
    tensors = (t.to(DEVICE, dtype) for t in (means, covars, opacities, features, viewmats, Ks))
    return [*tensors, width, height]
