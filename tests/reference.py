"""The rasteriser as a loop in float64, one Gaussian at a time over all pixels, and scenes to run it on.

Shares no code with kernels/, only the three thresholds: it inverts matrices where they expand determinants, and
multiplies transmittances where they sum logarithms or scan.
"""

import math

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# 0.99 and 1e-4 as float32 has them: see kernels/torch_backend.py
MAX_ALPHA, MIN_ALPHA, MIN_T = (float(torch.tensor(x, dtype=torch.float32)) for x in (0.99, 1 / 255, 1e-4))


def rasterize_dense(
    means, covars, opacities, features, viewmats, Ks, width, height, near_plane=0.01, far_plane=1e10, eps2d=0.3
):
    """As kernels.rasterize, in float64. Also returns certain [B, V, H, W]: the pixels at which no decision (skip,
    stop, cut off, order) is so close that float32 may decide otherwise."""
    (B, N, C), V = features.shape, viewmats.shape[1]
    means, covars, opacities, features, viewmats, Ks = (
        t.double() for t in (means, covars, opacities, features, viewmats, Ks)
    )
    x = torch.arange(width, dtype=torch.float64, device=means.device) + 0.5
    y = torch.arange(height, dtype=torch.float64, device=means.device) + 0.5
    images, alphas, certains = [], [], []
    for b in range(B):
        for v in range(V):
            R, t, K = viewmats[b, v, :3, :3], viewmats[b, v, :3, 3], Ks[b, v]
            f, c, size = K.diagonal()[:2], K[:2, 2], torch.tensor([width, height]).to(K)
            camera = means[b] @ R.T + t
            depths = camera[:, 2].tolist()
            T = torch.ones(height, width).to(K)
            out = torch.zeros(height, width, C).to(K)
            certain = torch.ones_like(T, dtype=torch.bool)
            stopped = torch.zeros_like(certain)
            all_cut = torch.ones_like(certain)  # every Gaussian so far was cut off at MAX_ALPHA
            z_before, alpha_before = -1.0, torch.zeros_like(T)
            # Unbound, as the backward of an index costs a whole tensor
            points, shapes, peaks, rows = (t.unbind() for t in (camera, covars[b], opacities[b], features[b]))
            for n in sorted(range(N), key=lambda n: (depths[n], n)):
                z = points[n][2]
                if not near_plane < z < far_plane:
                    continue
                if stopped.all():
                    break
                mean2d = f * points[n][:2] / z + c
                u = (points[n][:2] / z).clamp(-c / f - 0.15 * size / f, (size - c) / f + 0.15 * size / f)
                J = torch.stack([torch.stack([f[0] / z, 0 * z, -f[0] * u[0] / z]),
                                 torch.stack([0 * z, f[1] / z, -f[1] * u[1] / z])])  # fmt: skip
                conic = torch.linalg.inv(J @ R @ shapes[n] @ R.T @ J.T + eps2d * torch.eye(2).to(K))
                d = torch.stack(torch.meshgrid(x - mean2d[0], y - mean2d[1], indexing="xy"), -1)
                raw = peaks[n] * torch.exp(-0.5 * (d @ conic * d).sum(-1))
                alpha = raw.clamp(max=MAX_ALPHA)
                skipped = alpha < MIN_ALPHA
                T_next = T * (1 - alpha)
                stops = ~skipped & (T_next <= MIN_T)
                alive = ~stopped
                all_cut = all_cut & (skipped | (raw > MAX_ALPHA))
                exact = all_cut & torch.isclose(T_next, torch.tensor((1 - MAX_ALPHA) ** 2).to(T), rtol=1e-9)
                certain &= ~(alive & ((raw / MIN_ALPHA - 1).abs() < 1e-3))
                certain &= ~(alive & ((raw / MAX_ALPHA - 1).abs() < 1e-4))
                certain &= ~(alive & ~skipped & ((T_next / MIN_T - 1).abs() < 1e-3) & ~exact)
                if 0 < depths[n] - z_before < 1e-5 * depths[n]:
                    certain &= ~(alive & ~skipped & (alpha_before >= MIN_ALPHA))
                z_before, alpha_before = depths[n], alpha
                stopped = stopped | stops
                weight = torch.where(skipped | stopped, 0.0, alpha * T)
                out = out + weight[..., None] * rows[n]
                T = torch.where(skipped | stopped, T, T_next)
            images.append(out)
            alphas.append(1 - T)
            certains.append(certain)
    shape = (B, V, height, width)
    if B * V == 0:
        return means.new_zeros(*shape, C), means.new_zeros(shape), means.new_ones(shape, dtype=torch.bool)
    return torch.stack(images).view(*shape, C), torch.stack(alphas).view(shape), torch.stack(certains).view(shape)


def random_rotation(generator, angle=math.pi):
    """About a random axis, by at most `angle` radians. [3, 3]"""
    axis = torch.nn.functional.normalize(torch.randn(3, generator=generator), dim=0)
    a = axis * angle * torch.rand((), generator=generator)
    return torch.linalg.matrix_exp(torch.tensor([[0, -a[2], a[1]], [a[2], 0, -a[0]], [-a[1], a[0], 0]]))


def make_scene(
    seed=0, B=1, V=1, N=20, C=3, width=19, height=17, sigma=0.15, opacity=None, flat=1.0, dtype=torch.float32
):
    """Arguments for rasterize: N Gaussians about 4 in front of V cameras, some outside the images, some behind.

    `sigma` is their typical standard deviation in units of their distance; `opacity` one value for all, or None for
    uniform in 0..1; `flat` scales one axis of each, so that 0 makes them discs.
    """
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(B, N, 3, generator=g) * torch.tensor([1.5, 1.5, 1.2]) + torch.tensor([0.0, 0.0, 4.0])
    if N > 1:
        means[:, -1, 2] -= 6  # one behind the cameras
    sigmas = 4 * sigma * torch.exp(0.7 * torch.randn(B, N, 3, generator=g)) * torch.tensor([1.0, 1.0, flat])
    rotations = (
        torch.stack([random_rotation(g) for _ in range(B * N)]).view(B, N, 3, 3) if B * N else torch.zeros(B, N, 3, 3)
    )
    covars = rotations @ torch.diag_embed(sigmas**2) @ rotations.transpose(-1, -2)
    covars = 0.5 * (covars + covars.transpose(-1, -2))
    opacities = torch.rand(B, N, generator=g) if opacity is None else torch.full((B, N), float(opacity))
    features = torch.randn(B, N, C, generator=g)
    viewmats = torch.eye(4).repeat(B, V, 1, 1)
    for b in range(B):
        for v in range(V):
            viewmats[b, v, :3, :3] = random_rotation(g, 0.3)
            viewmats[b, v, :3, 3] = 0.3 * torch.randn(3, generator=g)
    f = 0.8 * max(width, height)
    Ks = torch.tensor([[f, 0, 0.45 * width], [0, 1.1 * f, 0.55 * height], [0, 0, 1.0]]).repeat(B, V, 1, 1)
    tensors = (t.to(DEVICE, dtype) for t in (means, covars, opacities, features, viewmats, Ks))
    return [*tensors, width, height]
