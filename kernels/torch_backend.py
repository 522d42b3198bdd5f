"""Rasterisation in plain PyTorch: any device, any float type, and the tests' reference.

It has no tiles, and so shares no structure with the kernels. Its unit of work is a pair (Gaussian,
pixel):

    project all Gaussians -> sort by depth -> list the pairs with alpha >= 1/255, grouped by pixel
    -> transmittance by a segmented cumulative sum -> one sparse product, weights @ features [N, C]

The maths, for one Gaussian (mean x, covariance S) in one camera (R, t, focal lengths f, centre c):

    x_c = R x + t                               camera coordinates (OpenCV axes), depth z
    m   = f * (x_c.xy / z) + c                  mean on the image, pixels
    u   = clamp(x_c.xy / z)                     to the border plus 0.3 of the half field of view
    J   = [[f_x / z, 0, -f_x u_x / z],
           [0, f_y / z, -f_y u_y / z]]          Jacobian of the projection at u
    S2  = J R S R' J' + eps2d I,  Q = inv(S2)   covariance on the image, and its inverse ("conic")

and for the pixel whose centre is p, with the Gaussians k in order of depth:

    q_k     = 1/2 (m - p)' Q (m - p)
    alpha_k = min(0.99, opacity exp(-q_k)),     skipped where below 1/255
    T_k     = prod_{j<k} (1 - alpha_j)          blending stops before T_{k+1} would be <= 1e-4
    out     = sum_k alpha_k T_k feature_k,      alpha = sum_k alpha_k T_k

EWA splatting (Zwicker et al. 2001) as in 3D Gaussian Splatting (Kerbl et al. 2023), with gsplat
1.6's clamp, thresholds and stopping rule. One difference: where rounding makes q negative (needles)
gsplat skips the Gaussian, and this takes q = 0.
"""

import math

import torch
import torch.nn.functional as F

# 0.99 and 1e-4 as float32. Two Gaussians of alpha 0.99 leave almost exactly 1e-4, where blending
# stops: all backends and dtypes need the same constants to agree.
MAX_ALPHA = 0.9900000095367432
MIN_ALPHA = 1.0 / 255.0
MIN_TRANSMITTANCE = 9.999999747378752e-05


def project(means, covars, viewmats, Ks, width, height, near_plane, far_plane, eps2d):
    """Means [B, N, 3] and covars [B, N, 3, 3] seen by viewmats [B, V, 4, 4] and Ks [B, V, 3, 3].

    Returns means2d [2, B, V, N] pixels, conics [3, B, V, N] (xx, xy, yy of the inverse covariance),
    covars2d [2, B, V, N] (the variances along x and y), depths [B, V, N] and visible [B, V, N]:
    near < z < far, and the covariance has an inverse. Where not visible, values are arbitrary but
    finite.
    """
    R, t = viewmats[..., :3, :3], viewmats[..., :3, 3:]
    x, y, depths = (R @ means.mT[:, None] + t).unbind(2)  # (B, V, N) each, as all below
    visible = (depths > near_plane) & (depths < far_plane)
    z = torch.where(visible, depths, 1.0)
    # R S R' as one product of the nine entries of S with kron(R, R)
    kron = torch.einsum("bvij,bvkl->bvikjl", R, R).reshape(*R.shape[:2], 9, 9)
    S = (kron @ covars.flatten(2).mT[:, None]).unflatten(2, (3, 3))

    def axis(k, coordinate, size):  # of the image: mean, J's two entries and variance
        f, c = Ks[..., k, k, None], Ks[..., k, 2, None]
        slope = torch.where(visible, coordinate, 0.0) / z
        margin = 0.3 * 0.5 * size / f
        u = torch.minimum(torch.maximum(slope, -c / f - margin), (size - c) / f + margin)
        p, q, across = f / z, -f * u / z, S[:, :, k, 2] + S[:, :, 2, k]
        return f * slope + c, p, q, p * p * S[:, :, k, k] + p * q * across + q * q * S[:, :, 2, 2]

    (mx, x0, x2, a), (my, y1, y2, d) = axis(0, x, width), axis(1, y, height)
    half = S + S.transpose(2, 3)
    b = x0 * (y1 * half[:, :, 0, 1] + y2 * half[:, :, 0, 2])
    b = 0.5 * (b + x2 * (y1 * half[:, :, 1, 2] + y2 * half[:, :, 2, 2]))
    # det S2, expanded: where a d - b^2 is lost to rounding, the eps2d terms survive
    det = a * d - b * b + eps2d * (a + d) + eps2d * eps2d
    a, d = a + eps2d, d + eps2d
    visible = visible & (det > 0) & (a > 0)
    det = torch.where(visible, det, 1.0)
    conics = torch.stack([d / det, -b / det, a / det])
    return torch.stack([mx, my]), conics, torch.stack([a, d]), depths, visible


def image_radii(covars2d, opacities, visible):
    """Half width and half height [2, B, V, N] of the box outside which alpha < 1/255; -1: no box.

    alpha >= 1/255 where q <= ln(255 opacity): an ellipse, sqrt(2 q variance) to each side.
    """
    reach = 2 * torch.log(opacities.clamp(min=1e-12) / MIN_ALPHA)[:, None]  # (B, 1, N)
    visible = visible & (reach >= 0)
    return torch.where(visible, torch.sqrt(reach.clamp(min=0) * covars2d), -1.0)


def _spread(first, past):
    """All integers of the ranges first[i]..past[i] - 1, in order: their i and themselves, int32."""
    counts = (past - first).clamp(min=0)
    owner = torch.repeat_interleave(counts)
    shift = first - (torch.cumsum(counts, 0, dtype=counts.dtype) - counts)
    each = torch.arange(len(owner), dtype=owner.dtype, device=owner.device)
    return owner, pick(shift, owner) + each


def pick(values, index):
    """values[index] of one dimension: several times as fast for long indices."""
    return values.index_select(0, index)


def list_pairs(image_gaussians, radii, depths, width, height):
    """All pairs with alpha >= 1/255, sorted by image and pixel, then by depth, then by index.

    Takes image_gaussians [6, I*N] (mean, conic, opacity), radii [2, I, N] and depths [I, N].
    Returns owner [P] int32, an index into I*N, pixel [P] int32, one into I*H*W, and alpha [P]: 0
    where rounding listed a pair too many. Gaussians are spread into rows, then rows into pixels.
    """
    I, N = depths.shape
    order = torch.sort(depths, dim=1, stable=True).indices  # stable: ties go by index
    order = (order + N * torch.arange(I, device=order.device)[:, None]).reshape(-1)
    radii = radii.flatten(1)
    order = order[pick(radii[1], order) >= 0].int()
    slack = 0.01  # pixels, so that rounding loses none

    my, ry = pick(image_gaussians[1], order), pick(radii[1], order) + slack
    top = torch.ceil((my - ry - 0.5).clamp(0, height))  # pixel centres lie at +0.5
    bottom = torch.floor((my + ry - 0.5).clamp(-1, height - 1)) + 1
    row, y = _spread(top.int(), bottom.int())
    owner = pick(order, row)

    # A row's pixels with q = (a/2 dx + b dy) dx + d/2 dy^2 <= reach: an interval of x
    mx, my, a, b, d, opacity = (pick(column, owner) for column in image_gaussians)
    dy = my - (y + 0.5)
    reach = torch.log(opacity / MIN_ALPHA)
    half = torch.sqrt((2 * reach - (d - b * b / a) * dy * dy).div_(a).clamp_(min=0)).add_(slack)
    centre = mx + b / a * dy
    left = torch.ceil((centre - half - 0.5).clamp(0, width))
    right = torch.floor((centre + half - 0.5).clamp(-1, width - 1)) + 1
    row, x = _spread(left.int(), right.int())
    pixel = pick((owner // N * height + y) * width, row).add_(x)
    pixel, by_pixel = torch.sort(pixel, stable=True)

    dx = pick(mx - 0.5, row).sub_(x)
    q = pick(0.5 * a, row).mul_(dx).add_(pick(b * dy, row)).mul_(dx)
    q = q.add_(pick(0.5 * d * dy * dy, row))
    alpha = q.clamp_(min=0).neg_().exp_().mul_(pick(opacity, row)).clamp_(max=MAX_ALPHA)
    alpha.mul_(alpha >= MIN_ALPHA)
    return pick(owner, pick(row, by_pixel)), pixel, pick(alpha, by_pixel)


# Backward. v_t is the gradient of the loss with respect to t, S_k what lies behind k in its pixel:
#
#     S_k = sum_{j>k} w_j v_w_j
#     v_a = T_k v_w_k - S_k / (1 - a_k),      v_q = -a v_a where alpha was not clamped to 0.99
#     v_m = sum (A d_x + B d_y, B d_x + C d_y) v_q,    v_opacity = -sum v_q / opacity
#     v_A = sum 1/2 d_x^2 v_q,    v_B = sum d_x d_y v_q,    v_C = sum 1/2 d_y^2 v_q
class PairWeights(torch.autograd.Function):
    """Weights alpha T [P] of the pairs that are blended, and their owner and pixel (int32)."""

    @staticmethod
    def forward(ctx, image_gaussians, radii, depths, width, height):
        owner, pixel, alpha = list_pairs(image_gaussians, radii, depths, width, height)
        first = starts(pixel, len(depths) * height * width)
        # log R since the pixel's first pair. The sum over all pixels reaches millions, and 1e-6
        # decides where blending stops: float64
        logs = torch.log1p(-alpha)
        summed = logs.new_zeros(len(logs) + 1, dtype=torch.float64)
        torch.cumsum(logs, 0, dtype=torch.float64, out=summed[1:])
        before = pick(summed, first)
        R = summed[1:].sub_(pick(before, pixel))
        kept = ((R > math.log(MIN_TRANSMITTANCE)) & (alpha > 0)).nonzero()[:, 0]
        T = R.sub_(logs).to(alpha.dtype).exp_()
        owner, pixel, alpha, T = (pick(t, kept) for t in (owner, pixel, alpha, T))
        ctx.mark_non_differentiable(owner, pixel)
        ctx.save_for_backward(image_gaussians, owner, pixel, alpha, T)
        ctx.size = len(depths) * height * width, height, width
        return alpha * T, owner, pixel

    @staticmethod
    def backward(ctx, v_w, _owner, _pixel):
        image_gaussians, owner, pixel, alpha, T = ctx.saved_tensors
        mx, my, A, B, C, opacity = image_gaussians
        pixels, height, width = ctx.size
        dx = pick(mx, owner) - (pixel % width + 0.5)
        dy = pick(my, owner) - (pixel // width % height + 0.5)
        summed = torch.cumsum(alpha * T * v_w, 0, dtype=torch.float64)
        total = pick(F.pad(summed, (1, 0)), starts(pixel, pixels)[1:])
        S = (pick(total, pixel) - summed).to(v_w.dtype)
        v_q = (S / (1 - alpha) - T * v_w) * alpha * (alpha < MAX_ALPHA)
        x, y = v_q * dx, v_q * dy
        moments = torch.stack([v_q, x, y, x * dx, x * dy, y * dy])
        sums = torch.zeros_like(image_gaussians).index_add_(1, owner.long(), moments)
        one, x, y, xx, xy, yy = sums
        v_opacity = -one / opacity.clamp(min=1e-12)
        gradients = A * x + B * y, B * x + C * y, 0.5 * xx, xy, 0.5 * yy, v_opacity
        return torch.stack(gradients), None, None, None, None


def starts(index, count):
    """Where each of 0..count-1 starts in a sorted index, and the end: [count + 1] int32."""
    each = torch.arange(count + 1, dtype=index.dtype, device=index.device)
    return torch.searchsorted(index, each, out_int32=True)


class SparseProduct(torch.autograd.Function):
    """out [rows, C]: weights [P] * table[column], summed over each row's pairs; row is sorted."""

    @staticmethod
    def forward(ctx, weights, table, row, column, rows):
        ctx.save_for_backward(weights, table, row, column)
        return sparse_product(weights.detach(), table.detach(), row, column, rows)

    @staticmethod
    def backward(ctx, v_out):
        weights, table, row, column = ctx.saved_tensors
        v_weights = v_table = None
        if ctx.needs_input_grad[0]:  # v_out[row] . table[column] of every pair
            backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
            v_weights = backward(v_out, table, column, starts(row, len(v_out)), row, 0)
        if ctx.needs_input_grad[1]:
            column, order = torch.sort(column, stable=True)
            weights, row = pick(weights, order), pick(row, order)
            v_table = sparse_product(weights, v_out, column, row, len(table))
        return v_weights, v_table, None, None, None


def sparse_product(weights, table, row, column, rows):
    """`SparseProduct`'s forward: each row of the product is one "bag" of the table's rows."""
    options = dict(mode="sum", per_sample_weights=weights, include_last_offset=True)
    return F.embedding_bag(column, table, starts(row, rows), **options)


def _expand(weights, row, column, indices, mix):
    """Pairs with Gaussians -> J times as many with tokens. indices and mix: [Gaussians, J]."""
    weights = torch.stack([weights * pick(m, column) for m in mix.T], -1).flatten()
    column = torch.stack([pick(i, column) for i in indices.T], -1).flatten()
    return weights, row.repeat_interleave(indices.shape[1]), column


def _images(weights, pixel, column, table, factors, size, at):
    """Features [B, V, H, W, C], size (B, V, H, W), or of the rows and columns `at` alone."""
    B, V, H, W = size
    if at is not None:
        size = B, V, len(at[0]), len(at[1])
        new = torch.full((B * V, H * W), -1, dtype=torch.int32, device=pixel.device)
        numbers = torch.arange(math.prod(size), dtype=torch.int32, device=pixel.device)
        new[:, (at[0][:, None] * W + at[1]).flatten()] = numbers.view(B * V, -1)
        pixel = pick(new.flatten(), pixel)
        there = (pixel >= 0).nonzero()[:, 0]
        weights, pixel, column = (pick(t, there) for t in (weights, pixel, column))
    if factors:
        weights, pixel, column = _expand(weights, pixel, column, *factors)
    out = SparseProduct.apply(weights, table, pixel, column, math.prod(size))
    return out.view(*size, table.shape[1])


def _means(weights, pixel, column, table, factors, labels):
    """Mean features [B, V, L, C] over the pixels of each label.

    Weights are summed per label and Gaussian, then token; channels come in only at the end.
    """
    B, V, L = *labels.shape[:2], int(labels.max()) + 1
    image = torch.arange(B * V, device=labels.device).view(B, V, 1, 1)
    count = torch.bincount((labels + L * image).flatten(), minlength=B * V * L).view(B, V * L, 1)
    label = pick((labels + L * (image % V)).flatten(), pixel)
    gaussians = len(factors[0]) if factors else len(table)
    sums = weights.new_zeros(gaussians * V * L).index_add(0, column * (V * L) + label, weights)
    sums = sums.view(gaussians, V * L)
    if factors:
        each = torch.arange(gaussians, dtype=torch.int32, device=labels.device)
        mix, each, token = _expand(torch.ones_like(sums[:, 0]), each, each, *factors)
        token, order = torch.sort(token, stable=True)
        sums = SparseProduct.apply(pick(mix, order), sums, token, pick(each, order), len(table))
    sums = sums.view(B, -1, V * L).mT @ table.view(B, -1, table.shape[-1])
    return (sums / count.clamp(min=1)).view(B, V, L, table.shape[1])


def pair_weights(means, covars, opacities, viewmats, Ks, width, height, *limits):
    """`PairWeights` of the arguments of `rasterize`."""
    seen = project(means, covars, viewmats, Ks, width, height, *limits)
    means2d, conics, covars2d, depths, visible = seen
    radii = image_radii(covars2d.detach(), opacities.detach(), visible).flatten(1, 2)
    image_gaussians = torch.cat([means2d, conics, opacities[:, None].expand_as(depths)[None]])
    depths = depths.flatten(0, 1)
    return PairWeights.apply(image_gaussians.flatten(1), radii, depths, width, height)


def rasterize(
    means, covars, opacities, features, viewmats, Ks, width, height, near_plane, far_plane, eps2d,
    at=None, labels=None,
):  # fmt: skip
    """`kernels.rasterize` after its checks; shapes as there."""
    (B, N), V = opacities.shape, viewmats.shape[1]
    camera = viewmats, Ks, width, height, near_plane, far_plane, eps2d
    weights, owner, pixel = pair_weights(means, covars, opacities, *camera)
    alphas = weights.new_zeros(B * V * height * width).index_add(0, pixel, weights)

    # column indexes the Gaussians [B*N], table has the features or tokens of all scenes
    column = owner if V == 1 else owner // (V * N) * N + owner % N
    tokens, *factors = features if isinstance(features, tuple) else (features,)
    table = tokens.flatten(0, 1).to(weights.dtype)
    if factors:
        indices = factors[0] + tokens.shape[1] * torch.arange(B, device=owner.device)[:, None, None]
        factors = [indices.int().flatten(0, 1), factors[1].flatten(0, 1)]
    pairs = weights, pixel, column, table, factors
    out = _images(*pairs, (B, V, height, width), at).to(tokens.dtype)
    alphas = alphas.view(B, V, height, width)
    if labels is None:
        return out, alphas
    return out, alphas, _means(*pairs, labels).to(tokens.dtype)
