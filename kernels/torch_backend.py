"""Rasterisation in plain PyTorch: any device, any float type, and the oracle of the Triton kernels.

Written without tiles, so that it shares no structure with the kernels that it checks. The unit of work is a
pair (Gaussian, pixel):

    project every Gaussian  ->  sort them by depth  ->  list the pairs whose alpha counts, grouped by pixel
    ->  transmittance by a segmented cumulative sum  ->  one sparse product, weights [pixels, N] @ features [N, C]

The maths, for one Gaussian (mean x, covariance S) in one camera (R, t, focal lengths f, centre c):

    x_c = R x + t                                        camera coordinates (OpenCV axes), depth z
    m   = f * (x_c.xy / z) + c                           mean on the image, pixels
    u   = clamp(x_c.xy / z)                              to the image border plus 0.3 of the half field of view
    J   = [[f_x / z, 0, -f_x u_x / z],
           [0, f_y / z, -f_y u_y / z]]                   Jacobian of the projection at u
    S2  = J R S R' J' + eps2d I,    Q = inv(S2)          covariance on the image, and its inverse ("conic")

and for the pixel whose centre is p, with the Gaussians k in order of depth:

    q_k     = 1/2 (m - p)' Q (m - p)
    alpha_k = min(0.99, opacity exp(-q_k)),              skipped where below 1/255
    T_k     = prod_{j<k} (1 - alpha_j)                   blending stops before T_{k+1} would be <= 1e-4
    out     = sum_k alpha_k T_k feature_k,               alpha = sum_k alpha_k T_k

EWA splatting (Zwicker et al. 2001) as in 3D Gaussian Splatting (Kerbl et al. 2023), with gsplat 1.6's clamp,
thresholds and stopping rule. One liberty: where rounding makes q negative (needles), gsplat skips the Gaussian and this
takes q = 0; of a covariance that is one, q is never negative.
"""

import torch
import torch.nn.functional as F

# The float32 neighbours of 0.99 and 1e-4. Two Gaussians of alpha 0.99 leave a transmittance of almost exactly
# 1e-4, which is where blending stops: only the same constants in every backend and dtype decide it alike.
MAX_ALPHA = 0.9900000095367432
MIN_ALPHA = 1.0 / 255.0
MIN_TRANSMITTANCE = 9.999999747378752e-05


def project(means, covars, viewmats, Ks, width, height, near_plane, far_plane, eps2d):
    """Means [B, N, 3] and covars [B, N, 3, 3] seen by viewmats [B, V, 4, 4] and Ks [B, V, 3, 3].

    Returns means2d [B, V, N, 2] in pixels, conics [B, V, N, 3] = the entries (xx, xy, yy) of the inverse image
    covariance, covars2d [B, V, N, 2] = the variances along x and y, depths [B, V, N], and visible [B, V, N] bool:
    near < z < far and a covariance that can be inverted. Entries that are not visible are finite, and mean nothing.
    """
    R, t = viewmats[..., :3, :3], viewmats[..., :3, 3]
    camera = torch.einsum("bvij,bnj->bvni", R, means) + t[:, :, None]  # (B, V, N, 3)
    depths = camera[..., 2]
    visible = (depths > near_plane) & (depths < far_plane)
    z = torch.where(visible, depths, 1.0)
    f = torch.stack([Ks[..., 0, 0], Ks[..., 1, 1]], -1)[:, :, None]  # (B, V, 1, 2)
    c = torch.stack([Ks[..., 0, 2], Ks[..., 1, 2]], -1)[:, :, None]
    size = f.new_tensor([width, height])
    slope = torch.where(visible[..., None], camera[..., :2], 0.0) / z[..., None]
    means2d = f * slope + c

    margin = 0.3 * 0.5 * size / f
    u = torch.minimum(torch.maximum(slope, -c / f - margin), (size - c) / f + margin)
    zero = torch.zeros_like(z)
    fx, fy = f[..., 0], f[..., 1]
    J = torch.stack([fx / z, zero, -fx * u[..., 0] / z, zero, fy / z, -fy * u[..., 1] / z], -1)
    M = J.unflatten(-1, (2, 3)) @ R[:, :, None]  # (B, V, N, 2, 3)
    S2 = M @ covars[:, None] @ M.transpose(-1, -2)
    a, b, d = S2[..., 0, 0], 0.5 * (S2[..., 0, 1] + S2[..., 1, 0]), S2[..., 1, 1]
    # det(S2 + eps I), expanded so that the eps terms survive where a d - b^2 is lost to rounding
    det = a * d - b * b + eps2d * (a + d) + eps2d * eps2d
    a, d = a + eps2d, d + eps2d
    visible = visible & (det > 0) & (a > 0)
    det = torch.where(visible, det, 1.0)
    conics = torch.stack([d, -b, a], -1) / det[..., None]
    return means2d, conics, torch.stack([a, d], -1), depths, visible


def image_radii(covars2d, opacities, visible):
    """Half width and half height [B, V, N, 2] of the box outside which alpha < 1/255; -1 where there is none.

    alpha >= 1/255 is q <= ln(255 opacity), an ellipse whose half extent along an axis is sqrt(2 q variance).
    """
    reach = 2 * torch.log(opacities.clamp(min=1e-12) / MIN_ALPHA)[:, None]  # (B, 1, N)
    visible = visible & (reach >= 0)
    return torch.where(visible[..., None], torch.sqrt(reach.clamp(min=0)[..., None] * covars2d), -1.0)


def _spread(counts):
    """For counts [M], the owner of each of counts.sum() items and the item's number within its owner."""
    owner = torch.repeat_interleave(counts)
    first = torch.cumsum(counts, 0) - counts
    return owner, torch.arange(len(owner), device=counts.device) - first[owner]


def _pair_alpha(image_gaussians, owner, pixel_x, pixel_y):
    """Alpha [P] of the pairs; image_gaussians [M, 6] holds mean (2), conic (3) and opacity, together for one gather."""
    # index_select, not [owner], whose backward is many times slower
    mx, my, a, b, d, opacity = image_gaussians.index_select(0, owner).unbind(-1)
    dx, dy = mx - (pixel_x + 0.5), my - (pixel_y + 0.5)
    q = 0.5 * (a * dx * dx + d * dy * dy) + b * dx * dy
    return (opacity * torch.exp(-q.clamp(min=0))).clamp(max=MAX_ALPHA)


@torch.no_grad()
def list_pairs(image_gaussians, radii, depths, width, height):
    """All pairs with alpha >= 1/255, sorted by image and pixel, then by depth, then by index.

    Takes image_gaussians [I*N, 6] (see `_pair_alpha`), radii [I, N, 2] and depths [I, N] of I images.
    Returns owner [P], an index into I*N, and pixel [P], an index into I*H*W.
    A Gaussian is spread into the image rows that it touches, and each row into just the pixels inside the ellipse.
    """
    I, N = depths.shape
    order = torch.sort(depths, dim=1, stable=True).indices  # stable: ties go by index
    order = (order + N * torch.arange(I, device=order.device)[:, None]).reshape(-1)
    radii = radii.reshape(-1, 2)
    order = order[radii[order, 0] >= 0]
    slack = 0.01  # pixels; rounding may list a pixel too many (its alpha decides), never one too few

    my, ry = image_gaussians[order, 1], radii[order, 1] + slack
    top = torch.ceil((my - ry - 0.5).clamp(0, height)).long()  # pixel centres lie at +0.5
    bottom = torch.floor((my + ry - 0.5).clamp(-1, height - 1)).long() + 1
    row, nth = _spread((bottom - top).clamp(min=0))
    y = top[row] + nth
    owner = order[row]

    # In row y, q <= reach is an interval around the ellipse's own centre line
    mx, my, a, b, d, opacity = image_gaussians[owner].unbind(-1)
    dy = my - (y + 0.5)
    reach = 2 * torch.log(opacity / MIN_ALPHA)
    half = torch.sqrt(((reach - (d - b * b / a) * dy * dy) / a).clamp(min=0)) + slack
    centre = mx + b / a * dy
    left = torch.ceil((centre - half - 0.5).clamp(0, width)).long()
    right = torch.floor((centre + half - 0.5).clamp(-1, width - 1)).long() + 1
    row, nth = _spread((right - left).clamp(min=0))
    x, y, owner = left[row] + nth, y[row], owner[row]

    counts = _pair_alpha(image_gaussians, owner, x, y) >= MIN_ALPHA
    owner, pixel = owner[counts], ((owner // N * height + y) * width + x)[counts]
    pixel, by_pixel = torch.sort(pixel.int() if I * height * width < 2**31 else pixel, stable=True)
    return owner[by_pixel], pixel.long()


def blend(image_gaussians, features, owner, pixel, V, width, height):
    """Blend the pairs of `list_pairs` into V images per scene, given image_gaussians [B*V*N, 6] and features [B, N, C]
    or their factors (tokens [B, M, C], indices [B, N, J], weights [B, N, J]).

    Returns features [B, V, H, W, C] and alphas [B, V, H, W], differentiable in everything but the pairs.
    """
    tokens, indices, mix = features if isinstance(features, tuple) else (features, None, None)
    B, M, C = tokens.shape
    N = len(image_gaussians) // max(1, B * V)
    pixels = B * V * height * width
    alpha = _pair_alpha(image_gaussians, owner, pixel % width, pixel // width % height)
    # Transmittance before each pair: the sum of logs since its pixel's first pair. One sum runs over all pixels,
    # in float64 because it grows to millions while differences of 1e-6 decide where blending stops.
    logs = torch.log1p(-alpha.double())
    summed = torch.cumsum(logs, 0)
    first = torch.searchsorted(pixel, torch.arange(pixels + 1, device=pixel.device))
    before = torch.cat([summed.new_zeros(1), summed])[first[pixel]]
    blended = summed.detach() - before.detach() > torch.log(summed.new_tensor(MIN_TRANSMITTANCE))
    weights = alpha * torch.exp(summed - logs - before).to(alpha.dtype)
    weights, owner, pixel = weights[blended], owner[blended], pixel[blended]

    first = torch.searchsorted(pixel, torch.arange(pixels + 1, device=pixel.device))
    alphas = weights.new_zeros(pixels).index_add(0, pixel, weights)
    scene = owner // N // V
    row = scene * N + owner % N
    if indices is not None:  # a pair becomes J
        J = indices.shape[-1]
        weights = (weights[:, None] * mix.reshape(B * N, J)[row]).flatten()
        row = (indices.reshape(B * N, J)[row] + scene[:, None] * M).flatten()
        first = first * J
    out = F.embedding_bag(  # the sparse product: one "bag" of rows per pixel
        row, tokens.to(weights.dtype).reshape(B * M, C), first, mode="sum", per_sample_weights=weights,
        include_last_offset=True,
    )  # fmt: skip
    return out.view(B, V, height, width, C).to(tokens.dtype), alphas.view(B, V, height, width)


def rasterize(means, covars, opacities, features, viewmats, Ks, width, height, near_plane, far_plane, eps2d):
    """`kernels.rasterize` after its checks; shapes as there."""
    B, N = opacities.shape
    V = viewmats.shape[1]
    means2d, conics, covars2d, depths, visible = project(
        means, covars, viewmats, Ks, width, height, near_plane, far_plane, eps2d
    )
    radii = image_radii(covars2d.detach(), opacities.detach(), visible)
    opacities = opacities[:, None, :, None].expand(B, V, N, 1)
    image_gaussians = torch.cat([means2d, conics, opacities], -1).view(B * V * N, 6)
    owner, pixel = list_pairs(image_gaussians, radii.flatten(0, 1), depths.flatten(0, 1), width, height)
    return blend(image_gaussians, features, owner, pixel, V, width, height)
