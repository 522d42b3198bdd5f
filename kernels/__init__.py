"""Differentiable splatting of Gaussians with features of any width.

    from kernels import rasterize

Where things are: projection.py (3D to image), tiles.py (which Gaussians touch which tile, in order of depth),
blend.py (front to back into pixels) are the Triton kernels, in the order in which they run; torch_backend.py is
the same in plain PyTorch, for machines without a GPU and as the oracle in the tests.
"""

import os
from typing import NamedTuple

import torch

from . import torch_backend

__all__ = ["Mixture", "rasterize"]

TILE = 8  # pixels; results do not depend on it. Small, as pixel-sized Gaussians touch few pixels of a large one


class Mixture(NamedTuple):
    """Features in factored form: that of Gaussian n is sum_j weights[n, j] * tokens[indices[n, j]].

    In distillation a pixel's feature mixes four patch tokens at most. Splatting the mixture gives the same as splatting
    the features [B, N, C] that it stands for, which then never exist.
    """

    tokens: torch.Tensor  # [B, M, C]; differentiable
    indices: torch.Tensor  # [B, N, J] integers, 0..M-1
    weights: torch.Tensor  # [B, N, J] as means; data


def _interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


def rasterize(
    means,  # [B, N, 3] world
    covars,  # [B, N, 3, 3] world, symmetric, positive semi-definite
    opacities,  # [B, N] 0..1
    features,  # [B, N, C], or a Mixture
    viewmats,  # [B, V, 4, 4] world to camera
    Ks,  # [B, V, 3, 3] pixels
    width,
    height,
    *,
    near_plane=0.01,
    far_plane=1e10,
    eps2d=0.3,
    backend=None,
    precision="tf32",
    at=None,
    labels=None,
):
    """Splat B scenes of N Gaussians with C channels each into V cameras per scene.

    Cameras have OpenCV axes (x right, y down, z forward) and pixel centres at +0.5; the background is 0. Semantics
    are gsplat's (>= 1.6): the maths stands at the top of kernels/torch_backend.py.

    Args:
        means, covars, opacities: float32; the torch backend takes float64 too. Differentiable.
        features: float32, float16 or bfloat16 (torch backend: float64 too). Differentiable. Sums are float32.
        viewmats, Ks: data. Asking for their gradient is an error. Skew in Ks is not looked at.
        width, height: of the images, pixels.
        near_plane, far_plane: a Gaussian is seen where near_plane < z < far_plane.
        eps2d: variance in pixels^2 added to both axes of every image covariance.
        backend: "triton" (CUDA tensors, or CPU tensors under TRITON_INTERPRET=1), "torch" (any device), or None:
            triton for CUDA tensors, torch for others.
        precision: of the triton backend's products of float32 features: "tf32" (10 bits of mantissa, on tensor cores),
            "tf32x3" (three such products, nearly exact) or "ieee". The torch backend is always exact.
        at: None, or (rows, columns), two increasing index tensors: features of those pixels only.
        labels: None, or integers [B, V, height, width] from 0: the mean over each label's pixels is returned too.
            On a CPU neither needs the images: splatting is linear, and sums weights before it looks at features.

    Returns:
        features [B, V, height, width, C] in the features' dtype (with `at`: [B, V, rows, columns, C]), alphas
        [B, V, height, width], and, with labels, means [B, V, labels.max() + 1, C].

    Raises:
        ValueError: an argument's shape, dtype or device does not fit, a value is NaN or infinite, a camera requires
            gradients, or the backend does not run on these tensors.
    """
    _check(means, covars, opacities, features, viewmats, Ks, width, height, near_plane, far_plane, eps2d)
    if labels is not None and labels.shape != (*viewmats.shape[:2], height, width):
        raise ValueError(f"labels must be {[*viewmats.shape[:2], height, width]}, not {list(labels.shape)}")
    if precision not in ("tf32", "tf32x3", "ieee"):
        raise ValueError(f'precision is {precision!r}; it must be "tf32", "tf32x3" or "ieee"')
    if backend is None:
        backend = "triton" if means.is_cuda else "torch"
    if backend == "torch":
        with torch.autocast(means.device.type, enabled=False):
            return torch_backend.rasterize(
                means, covars, opacities, features, viewmats, Ks, width, height, near_plane, far_plane, eps2d, at, labels
            )
    if backend != "triton":
        raise ValueError(f'backend is {backend!r}; it must be "triton", "torch" or None')
    if not (means.is_cuda or _interpreted()):
        raise ValueError(
            'backend "triton" needs CUDA tensors (or TRITON_INTERPRET=1 in the environment before the start); '
            f'these are on {means.device}: use backend="torch" or None'
        )
    tokens = features.tokens if isinstance(features, Mixture) else features
    if means.dtype != torch.float32 or tokens.dtype == torch.float64:
        raise ValueError('backend "triton" takes float32 Gaussians; for float64 use backend="torch"')
    out, alphas = _rasterize_triton(
        means, covars, opacities, features, viewmats, Ks, width, height, near_plane, far_plane, eps2d, precision
    )
    sampled = out if at is None else out[:, :, at[0][:, None], at[1]]
    return (sampled, alphas) if labels is None else (sampled, alphas, _label_means(out, labels))


def _label_means(out, labels):
    """Means [B, V, L, C] of images [B, V, H, W, C] over the pixels of each label."""
    (B, V), C, L = labels.shape[:2], out.shape[-1], int(labels.max()) + 1
    label = (labels + L * torch.arange(B * V, device=out.device).view(B, V, 1, 1)).flatten()
    sums = torch.zeros(B * V * L, C, device=out.device).index_add(0, label, out.reshape(-1, C).float())
    count = torch.bincount(label, minlength=B * V * L).clamp(min=1)[:, None]
    return (sums / count).to(out.dtype).view(B, V, L, C)


def _rasterize_triton(
    means, covars, opacities, features, viewmats, Ks, width, height, near_plane, far_plane, eps2d, precision, tile=TILE
):
    from .blend import blend  # here, so that the torch backend works where triton cannot be imported
    from .projection import project
    from .tiles import list_tiles

    tokens, indices, mix = features if isinstance(features, Mixture) else (features, None, None)
    if indices is not None:
        indices, mix = indices.int().contiguous(), mix.contiguous()
    B, V, C = len(means), viewmats.shape[1], tokens.shape[-1]
    means, covars, opacities, tokens, viewmats, Ks = (
        t.contiguous() for t in (means, covars, opacities, tokens, viewmats, Ks)
    )
    means2d, conics, depths, radii = project(
        means, covars, opacities, viewmats, Ks, width, height, float(near_plane), float(far_plane), float(eps2d)
    )
    means2d, conics, depths, radii = (t.flatten(0, 1) for t in (means2d, conics, depths, radii))  # (I, N, ...)
    gaussians, ranges = list_tiles(means2d.detach(), depths, radii, width, height, tile)
    out, alphas, _, _ = blend(
        means2d, conics, opacities, tokens, indices, mix, gaussians, ranges, V, width, height, tile, precision,
        _interpreted(),
    )  # fmt: skip
    return out.view(B, V, height, width, C), alphas.view(B, V, height, width)


def _check(means, covars, opacities, features, viewmats, Ks, width, height, near_plane, far_plane, eps2d):
    mixed, compiling = isinstance(features, Mixture), torch.compiler.is_compiling()  # values are not to be had then
    tokens = features.tokens if mixed else features
    if means.ndim != 3 or tokens.ndim != 3 or viewmats.ndim != 4:
        raise ValueError(
            f"means must be [B, N, 3], features [B, N, C] and viewmats [B, V, 4, 4]; they are "
            f"{list(means.shape)}, {list(tokens.shape)} and {list(viewmats.shape)}"
        )
    B, N = means.shape[:2]
    C, V = tokens.shape[2], viewmats.shape[1]
    arguments = {  # name: (tensor, shape)
        "means": (means, (B, N, 3)),
        "covars": (covars, (B, N, 3, 3)),
        "opacities": (opacities, (B, N)),
        "features": (tokens, (B, tokens.shape[1] if mixed else N, C)),
        "viewmats": (viewmats, (B, V, 4, 4)),
        "Ks": (Ks, (B, V, 3, 3)),
    }
    if mixed:
        J = features.weights.shape[-1] if features.weights.ndim == 3 else 1
        arguments["weights"] = (features.weights, (B, N, J))
        arguments["indices"] = (features.indices, (B, N, J))
    for name, (tensor, shape) in arguments.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} to go with means and features, not {list(tensor.shape)}")
        if tensor.device != means.device:
            raise ValueError(f"{name} is on {tensor.device}, means on {means.device}")
        if name not in ("features", "indices") and tensor.dtype != means.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, means {means.dtype}")
    if mixed:
        indices = arguments.pop("indices")[0]
        if indices.dtype not in (torch.int32, torch.int64) or features.weights.requires_grad:
            raise ValueError("a mixture's indices must be int32 or int64, and its weights data without gradient")
        if not indices.shape[-1]:
            raise ValueError("a mixture needs one token at least")
        low, high = torch.stack(indices.aminmax()).tolist() if indices.numel() and not compiling else (0, -1)
        if low < 0 or high >= tokens.shape[1]:
            raise ValueError(f"a mixture's indices must lie in 0..{tokens.shape[1] - 1}, where its tokens are")
    features = tokens
    if means.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"means must be float32 or float64, not {means.dtype}")
    if features.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"features must be of a float type, not {features.dtype}")
    if not (isinstance(width, int) and isinstance(height, int) and C >= 1 and width >= 1 and height >= 1):
        raise ValueError(f"at least one channel and one whole pixel are needed, not C={C}, {width} x {height}")
    # One look at sums waits for the device once; if they are off, or overflow, look for the culprit.
    # Of large features the first channel is looked at: what makes NaN makes it in all of them.
    looked = {name: tensor.detach() for name, (tensor, _) in arguments.items()}
    if features.numel() > 2**20:
        looked["features"] = features.detach()[..., 0]
    sums = [] if compiling else [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)) for t in looked.values()]
    if sums and not torch.isfinite(torch.stack([t.to(means.dtype) for t in sums])).all():
        for name, tensor in looked.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} has values that are NaN or infinite")
    for name, camera in (("viewmats", viewmats), ("Ks", Ks)):
        if camera.requires_grad:
            raise ValueError(f"{name} requires gradients, but cameras are data here: pass {name}.detach()")
    if not 0 < near_plane < far_plane:
        raise ValueError(f"0 < near_plane < far_plane must hold, not {near_plane} and {far_plane}")
    if eps2d < 0:
        raise ValueError(f"eps2d is a variance and cannot be {eps2d}")
