"""Differentiable splatting of Gaussians with features of any width.

    from kernels import rasterize

The Triton kernels, in the order in which they run: projection.py (3D to image), tiles.py (each
tile's Gaussians, sorted by depth), then blend.py or, for a Mixture, mixture.py, through launch.py.
torch_backend.py does the same in plain PyTorch: on any device, and as a reference for the tests.
"""

import math
import os
from typing import NamedTuple

import torch

from . import torch_backend

__all__ = ["Mixture", "rasterize"]

TILE = 8  # pixels, a side. Pixel-sized Gaussians leave most of a larger tile empty


class Mixture(NamedTuple):
    """Features in factored form: Gaussian n has sum_j weights[n, j] * tokens[indices[n, j]].

    In distillation, a pixel's feature mixes at most four patch tokens. Splatting the mixture equals
    splatting the features [B, N, C], without ever storing them.
    """

    tokens: torch.Tensor  # [B, M, C]; differentiable
    indices: torch.Tensor  # [B, N, J] integers, 0..M-1
    weights: torch.Tensor  # [B, N, J] as means; data


def interpreted():
    """Do Triton's kernels run in its interpreter?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


def rasterize(
    means, covars, opacities, features, viewmats, Ks, width, height, *, near_plane=0.01,
    far_plane=1e10, eps2d=0.3, backend=None, precision="tf32", at=None, labels=None,
):  # fmt: skip
    """Splat B scenes of N Gaussians with C channels each into V cameras per scene.

    Cameras have OpenCV axes (x right, y down, z forward), pixel centres lie at +0.5, and the
    background is 0. Semantics are those of gsplat >= 1.6; the maths is in torch_backend.py.

    Args:
        means: [B, N, 3] world, float32; the torch backend takes float64 too. Differentiable.
        covars: [B, N, 3, 3] world, symmetric, positive semi-definite. Differentiable.
        opacities: [B, N] 0..1. Differentiable.
        features: [B, N, C] float32, float16 or bfloat16 (torch backend: float64 too), or a Mixture.
            Differentiable. Accumulated in float32.
        viewmats, Ks: [B, V, 4, 4] world to camera and [B, V, 3, 3] pixels; data. Skew is ignored.
        width, height: of the images, pixels.
        near_plane, far_plane: a Gaussian is seen where near_plane < z < far_plane.
        eps2d: variance in pixels^2 added to both axes of every image covariance.
        backend: "triton" (CUDA tensors, or CPU tensors under TRITON_INTERPRET=1), "torch" (any
            device), or None: triton for CUDA tensors, torch for others.
        precision: of float32 products in the triton backend: "tf32" (10 bits of mantissa, on
            tensor cores), "tf32x3" (three TF32 products, nearly exact) or "ieee".
        at: None, or (rows, columns), two strictly increasing index tensors: features of those
            pixels only. No whole image of features is made.
        labels: None, or int32 or int64 [B, V, height, width], at least 0: also return the mean
            feature of each label, 0 for a label without pixels.

    Returns:
        features [B, V, height, width, C] in the features' dtype (with `at`: [B, V, rows, columns,
        C]), alphas [B, V, height, width], and, with labels, means [B, V, labels.max() + 1, C].

    Raises:
        ValueError: an argument's shape, dtype or device does not fit, a value is NaN or infinite
            (the triton backend does not check features), a label is below 0, a camera requires
            gradients, or the backend does not run on these tensors.
    """
    scene = means, covars, opacities, features, viewmats, Ks
    scene = *scene, width, height, near_plane, far_plane, eps2d
    _check(scene, labels)
    if _choose_backend(backend, means, features, precision) == "torch":
        if not torch.compiler.is_compiling():  # which traces without values
            _check_values(scene)
        with torch.autocast(means.device.type, enabled=False):
            return torch_backend.rasterize(*scene, at, labels)
    return _rasterize_triton(scene, precision, at, labels)


def _number_rows(at, images, width, height):
    """Of each pixel [images, H, W] int32 its row among those `at`, -1: none."""
    (ys, xs), device = at, at[0].device
    rows = torch.full((images, height, width), -1, dtype=torch.int32, device=device)
    each = torch.arange(images * len(ys) * len(xs), dtype=torch.int32, device=device)
    rows[:, ys[:, None], xs] = each.view(images, len(ys), len(xs))
    return rows


def _rasterize_triton(scene, precision, at=None, labels=None, tile=TILE):
    from .launch import blend  # here, so that the torch backend works without triton
    from .mixture import check_mixture
    from .projection import project
    from .tiles import NotFinite, list_tiles

    means, covars, opacities, features, viewmats, Ks, width, height, *limits = scene
    tokens, indices, weights = features if isinstance(features, Mixture) else (features, None, None)
    (B, V), C, tokens = viewmats.shape[:2], tokens.shape[-1], tokens.contiguous()
    tensors = [t.contiguous() for t in (means, covars, opacities, viewmats, Ks)]
    splats, depths, radii, bad = project(*tensors, width, height, *map(float, limits))
    splats, depths, radii = (t.flatten(0, 1) for t in (splats, depths, radii))  # [I, N, ...]
    save = torch.is_grad_enabled() and (splats.requires_grad or tokens.requires_grad)
    if indices is not None:
        indices, weights = indices.int().contiguous(), weights.contiguous()
        check_mixture(indices, weights, tokens, bad)
    try:
        lists = list_tiles(splats.detach(), depths, radii, bad, width, height, tile)
    except NotFinite:
        _check_values(scene)
        raise
    size = (height, width) if at is None else (len(at[0]), len(at[1]))
    rows = None if at is None else _number_rows(at, B * V, width, height)
    L = 0 if labels is None else int(labels.max()) + 1
    if labels is not None:
        image = torch.arange(B * V, device=labels.device).view(B, V, 1, 1)
        labels = (labels + L * image).int().contiguous()
    inputs = splats, tokens, indices, weights, *lists, rows, labels
    options = V, width, height, tile, precision, save, B * V * math.prod(size), B * V * L
    out, sums, alphas, _, _ = blend(*inputs, *options)
    out, alphas = out.view(B, V, *size, C), alphas.view(B, V, height, width)
    if labels is None:
        return out, alphas
    counts = torch.bincount(labels.flatten(), minlength=B * V * L).clamp(min=1)
    return out, alphas, (sums / counts[:, None]).to(out.dtype).view(B, V, L, C)


def _choose_backend(backend, means, features, precision):
    if precision not in ("tf32", "tf32x3", "ieee"):
        raise ValueError(f'precision is {precision!r}; it must be "tf32", "tf32x3" or "ieee"')
    if backend not in (None, "torch", "triton"):
        raise ValueError(f'backend is {backend!r}; it must be "triton", "torch" or None')
    backend = backend or ("triton" if means.is_cuda else "torch")
    if backend == "torch":
        return backend
    if not (means.is_cuda or interpreted()):
        raise ValueError(
            'backend "triton" needs CUDA tensors (or TRITON_INTERPRET=1 in the environment before '
            f'the start); these are on {means.device}: use backend="torch" or None'
        )
    tokens = features.tokens if isinstance(features, Mixture) else features
    if means.dtype != torch.float32 or tokens.dtype == torch.float64:
        raise ValueError('backend "triton" takes float32 Gaussians; for float64 use "torch"')
    return backend


def _check(scene, labels):
    means, covars, opacities, features, viewmats, Ks, width, height, *limits = scene
    tokens, *factors = features if isinstance(features, Mixture) else (features,)
    for tensor in (means, covars, opacities, tokens, *factors, viewmats, Ks):
        if not torch.is_tensor(tensor) or tensor.is_meta:
            kind = "on the meta device" if torch.is_tensor(tensor) else f"a {type(tensor).__name__}"
            raise ValueError(f"arguments but numbers must be tensors with values; one is {kind}")
    if (means.ndim, tokens.ndim, viewmats.ndim) != (3, 3, 4):
        raise ValueError(
            f"means must be [B, N, 3], features [B, N, C] and viewmats [B, V, 4, 4]; they are "
            f"{list(means.shape)}, {list(tokens.shape)} and {list(viewmats.shape)}"
        )
    (B, N, _), (_, M, C), V, J = means.shape, tokens.shape, viewmats.shape[1], 1
    same, floats = (means.dtype,), (torch.float32, torch.float64)
    rules = {  # argument: (tensor, shape, dtypes)
        "means": (means, (B, N, 3), floats),
        "covars": (covars, (B, N, 3, 3), same),
        "opacities": (opacities, (B, N), same),
        "features": (tokens, (B, M if factors else N, C), (*floats, torch.float16, torch.bfloat16)),
        "viewmats": (viewmats, (B, V, 4, 4), same),
        "Ks": (Ks, (B, V, 3, 3), same),
    }
    if factors:
        indices, weights = factors
        J = indices.shape[-1] if indices.ndim == 3 else 1
        rules["indices"] = indices, (B, N, J), (torch.int32, torch.int64)
        rules["weights"] = weights, (B, N, J), same
    if labels is not None:
        rules["labels"] = labels, (B, V, height, width), (torch.int32, torch.int64)
    for name, (tensor, shape, dtypes) in rules.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")
        if tensor.device != means.device:
            raise ValueError(f"{name} is on {tensor.device}, means on {means.device}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
        if tensor.requires_grad and name in ("viewmats", "Ks", "weights"):
            raise ValueError(f"{name} requires gradients, but is data: pass {name}.detach()")
    _check_numbers(C, J, B, V, width, height, *limits)
    if labels is not None and (low := int(labels.min())) < 0:  # kernels would write outside memory
        raise ValueError(f"labels must be at least 0, not {low}")


def _check_numbers(C, J, B, V, width, height, near_plane, far_plane, eps2d):
    whole = isinstance(width, int) and isinstance(height, int) and width >= 1 and height >= 1
    if not (whole and C >= 1 and J >= 1):
        raise ValueError(
            "at least one channel, one token and one whole pixel are needed, not C = "
            f"{C}, J = {J}, {width} x {height}"
        )
    if (pixels := B * V * width * height) >= 2**31:
        raise ValueError(f"{B} x {V} images of {width} x {height} have {pixels} pixels, over 2^31")
    if not 0 < near_plane < far_plane:
        raise ValueError(f"0 < near_plane < far_plane must hold, not {near_plane} and {far_plane}")
    if not 0 <= eps2d < math.inf:
        raise ValueError(f"eps2d is a variance and cannot be {eps2d}")


def _check_values(scene):
    """ValueError for NaN, infinity, or indices without a token. Of large features only the first
    channel is checked: whatever makes NaN usually makes it in all of them."""
    tensors = dict(zip(("means", "covars", "opacities", "features", "viewmats", "Ks"), scene))
    if isinstance(tensors["features"], Mixture):
        tokens, indices, weights = tensors["features"]
        tensors |= dict(features=tokens, weights=weights)
        low, high = indices.aminmax() if indices.numel() else (0, 0)
        if low < 0 or high >= tokens.shape[1]:
            last = tokens.shape[1] - 1
            raise ValueError(f"indices must lie in 0..{last}, where the mixture's tokens are")
    if tensors["features"].numel() > 2**20:
        tensors["features"] = tensors["features"][..., 0]
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has values that are NaN or infinite")
