"""Photos to 3D Gaussians: MVSplat (ECCV 2024, arXiv 2403.14627).

`load_reconstructor` and `FeedForward` apply it, `Reconstruction` trains it, `reconstruction`
measures it. `render` draws Gaussians, `save_ply` writes them for viewers. `reconstruct` merges the
views of a capture into a `Field`, Gaussians with a teacher's features; so does the command
python reconstruct.py FOLDER (see README).

Shapes and cameras as in model.py: B scenes, V views, H x W pixels, h x w a quarter of them,
N = V * H * W Gaussians; extrinsics camera-to-world, Ks in pixels, intrinsics normalised by width
and height.
"""

import argparse
import functools
import json
import math
import resource
import statistics
import subprocess
import tempfile
import time
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from kernels import Mixture, rasterize
from kernels.torch_backend import pair_weights
from model import (
    NEAR_PLANE, lift_features, load_strictly, mean_of, normalise, patch_tokens, read_metadata,
    read_state, without_masked,
)  # fmt: skip

SH_C0 = 0.5 / math.sqrt(math.pi)  # the harmonic of degree 0
SHIPPED = Path(__file__).parent / "weights" / "reconstructor.safetensors"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Gaussians(NamedTuple):
    """N Gaussians per scene, in view-row-column order of the context pixels."""

    means: torch.Tensor  # [B, N, 3] world
    covars: torch.Tensor  # [B, N, 3, 3] world
    opacities: torch.Tensor  # [B, N] 0..1
    harmonics: torch.Tensor  # [B, N, 3, (degree + 1)^2] colours as spherical harmonics

    def scaled(self, unit):
        """All lengths multiplied by unit [B, 1]."""
        covars = self.covars * unit[..., None, None] ** 2
        return self._replace(means=self.means * unit[..., None], covars=covars)


def render(gaussians, extrinsics, Ks, width, height):
    """Photo [B, 3, H, W], depth [B, H, W] and alpha [B, H, W] of one camera per scene.

    Extrinsics [B, 4, 4], Ks [B, 3, 3]. Colours are on black. Depth is along z: the mean over the
    Gaussians seen, 0 where there are none.
    """
    means, covars, opacities, _ = gaussians
    viewmats = torch.linalg.inv(extrinsics)
    z = (means * viewmats[:, None, 2, :3]).sum(-1, keepdim=True) + viewmats[:, 2, 3, None, None]
    channels = torch.cat([colours(gaussians, extrinsics), z], -1)  # [B, N, 4]
    out, alphas = rasterize(
        means, covars, opacities, channels, viewmats[:, None], Ks[:, None], width, height,
        near_plane=NEAR_PLANE, precision="ieee",
    )  # fmt: skip
    photo, depth = out[:, 0].permute(0, 3, 1, 2).split([3, 1], 1)
    return photo, depth[:, 0] / alphas[:, 0].clamp(min=1e-6), alphas[:, 0]


def colours(gaussians, extrinsics):
    """Colours [B, N, 3] as cameras [B, 4, 4] see them: 0.5 + harmonics * basis(viewing direction),
    at least 0. As in other viewers, degree 4 is ignored."""
    directions = F.normalize(gaussians.means - extrinsics[:, None, :3, 3], dim=-1)
    degree = min(3, math.isqrt(gaussians.harmonics.shape[-1]) - 1)
    basis = sh_basis(degree, directions)[:, :, None]  # [B, N, 1, (degree + 1)^2]
    return ((gaussians.harmonics[..., : basis.shape[-1]] * basis).sum(-1) + 0.5).clamp(min=0)


def real_harmonics(degree, directions):
    """Real spherical harmonics of one degree at unit directions [..., 3]: [..., 2 * degree + 1].

    Up to one factor per degree, in e3nn's axes: its (x, y, z) are the textbook's (y, z, x).
    """
    y, z, x = directions.unbind(-1)
    cosine, sine = torch.ones_like(x), torch.zeros_like(x)  # r^m cos(m phi), r^m sin(m phi)
    out = [None] * (2 * degree + 1)
    for m in range(degree + 1):
        # The associated Legendre function of order m, divided by r^m, by recurrence in n
        p, before = torch.full_like(z, math.prod(range(1, 2 * m, 2))), torch.zeros_like(z)
        for n in range(m + 1, degree + 1):
            p, before = ((2 * n - 1) * z * p - (n + m - 1) * before) / (n - m), p
        p = p * math.sqrt((2 if m else 1) * math.factorial(degree - m) / math.factorial(degree + m))
        out[degree - m], out[degree + m] = p * sine, p * cosine
        cosine, sine = cosine * x - sine * y, sine * x + cosine * y
    return torch.stack(out, -1)


def sh_basis(degree, directions):
    """3D Gaussian Splatting's harmonics [..., (degree + 1)^2] at unit directions [..., 3]:
    `real_harmonics`, normalised, in the textbook's axes and signs."""
    bases = []
    for n in range(degree + 1):
        signs = (-1.0) ** torch.arange(-n, n + 1, device=directions.device).abs()
        scale = math.sqrt((2 * n + 1) / (4 * math.pi))
        bases.append(real_harmonics(n, directions[..., [1, 2, 0]]) * signs * scale)
    return torch.cat(bases, -1)


def rotate_harmonics(harmonics, R):
    """Rotate functions on the sphere, coefficients [B, ..., (degree + 1)^2], by R [B, 3, 3]. Each
    degree's Wigner D matrix is fitted to its harmonics at 64 directions r and at R r."""
    r = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r, R, out = F.normalize(r, dim=-1), R.double(), []
    for degree in range(math.isqrt(harmonics.shape[-1])):
        inverse = torch.linalg.pinv(real_harmonics(degree, r)).to(R.device)
        Dt = inverse @ real_harmonics(degree, r.to(R.device) @ R.mT)  # [B, k, k], transposed
        part = harmonics[..., degree**2 : (degree + 1) ** 2]
        out.append(torch.einsum("bji,b...j->b...i", Dt.to(part), part))
    return torch.cat(out, -1)


def quaternions(R):
    """Rotations [N, 3, 3] as unit quaternions w, x, y, z [N, 4]."""
    (a, b, c), (d, e, f), (g, h, i) = R.permute(1, 2, 0)
    products = torch.stack([  # 4 q q^T: row k is 4 q_k q
        1 + a + e + i, h - f, c - g, d - b,
        h - f, 1 + a - e - i, b + d, c + g,
        c - g, b + d, 1 - a + e - i, f + h,
        d - b, c + g, f + h, 1 - a - e + i,
    ], -1).view(-1, 4, 4)  # fmt: skip
    longest = products.diagonal(dim1=1, dim2=2).argmax(-1)  # least affected by rounding
    return F.normalize(products[torch.arange(len(R)), longest], dim=-1)


@torch.no_grad()
def save_ply(path, gaussians):
    """Write the Gaussians of one scene (B = 1) as the .ply of 3D Gaussian Splatting.

    Per Gaussian, float32: x y z, a zero normal, f_dc and f_rest (harmonics of degree 0, and of 1 to
    3, colour by colour), the logit of opacity, log standard deviations along the covariance's axes,
    and those axes as a quaternion w x y z. Gaussians of opacity below 1/255 are left out.
    ValueError: not exactly one scene, or a number is not finite.
    """
    if gaussians.means.ndim != 3 or len(gaussians.means) != 1:
        shape = list(gaussians.means.shape)
        raise ValueError(f"{path}: a .ply holds one scene, means [1, N, 3], not {shape}")
    if not all(tensor.isfinite().all() for tensor in gaussians):
        raise ValueError(f"{path}: the Gaussians are NaN or infinite")
    seen = (gaussians.opacities[0] >= 1 / 255).nonzero()[:, 0]
    with open(path, "wb") as file:
        blocks = seen.split(2**17) if len(seen) else [seen]  # bounds memory: 248 bytes a row
        for i, block in enumerate(blocks):
            columns = ply_columns(*(t[0][block].cpu().float() for t in gaussians))
            if i == 0:
                header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(seen)}"]
                header += [f"property float {name}" for name in " ".join(columns).split()]
                file.write("\n".join([*header, "end_header\n"]).encode("ascii"))
            file.write(torch.cat(list(columns.values()), 1).numpy().astype("<f4").tobytes())


def ply_columns(means, covars, opacities, harmonics):
    """The .ply's columns of N Gaussians: {"name name ...": [N, number of names]}."""
    variances, axes = torch.linalg.eigh(covars)
    axes = axes * torch.linalg.det(axes).sign()[:, None, None]  # reflections to rotations
    harmonics = F.pad(harmonics, (0, max(0, 16 - harmonics.shape[-1])))[..., :16]
    return {
        "x y z": means,
        "nx ny nz": torch.zeros_like(means),
        "f_dc_0 f_dc_1 f_dc_2": harmonics[..., 0],
        " ".join(f"f_rest_{i}" for i in range(45)): harmonics[..., 1:].flatten(1),
        "opacity": torch.logit(opacities, eps=1e-4)[:, None],
        "scale_0 scale_1 scale_2": 0.5 * variances.clamp(min=1e-20).log(),
        "rot_0 rot_1 rot_2 rot_3": quaternions(axes),
    }


def unproject(depths, Ks, extrinsics):
    """Depths [..., H, W] along z, Ks [..., 3, 3], extrinsics [..., 4, 4] -> [..., H, W, 3]."""
    y, x = (torch.arange(n, device=depths.device) + 0.5 for n in depths.shape[-2:])
    fx, fy, cx, cy = (Ks[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    rays = (x - cx) / fx, (y[:, None] - cy) / fy, torch.ones_like(depths)
    points = torch.stack(torch.broadcast_tensors(*rays), -1) * depths[..., None]
    R, t = extrinsics[..., None, None, :3, :3], extrinsics[..., None, None, :3, 3]
    # No matmul: in TF32 or bfloat16 it is off by a pixel
    return (R * points[..., None, :]).sum(-1) + t


class SensorDepth:
    """One Gaussian per pixel: round, of the pixel's colour, half a pixel wide (standard deviation),
    opaque, or transparent where depth is 0 (unknown).

    Takes context views {"images" [B, V, 3, H, W], "depths" [B, V, H, W], "Ks" [B, V, 3, 3],
    "extrinsics" [B, V, 4, 4]}. ValueError: there are no depths.
    """

    def __call__(self, context):
        if "depths" not in context:
            raise ValueError("geometry from sensor depth needs data with depth, and this has none")
        depths, Ks = context["depths"], context["Ks"]
        known = depths > 0
        z = torch.where(known, depths, 1.0)
        means = unproject(z, Ks, context["extrinsics"])
        focal = 0.5 * (Ks[..., 0, 0] + Ks[..., 1, 1])[..., None, None]
        covars = torch.eye(3, device=z.device) * ((0.5 * z / focal) ** 2)[..., None, None]
        harmonics = (context["images"].movedim(2, -1)[..., None] - 0.5) / SH_C0
        parts = means, covars, known.float(), harmonics  # [B, V, H, W, ...]
        return Gaussians(*(part.flatten(1, 3) for part in parts))


# ---------------------------------------------------------------------------- MVSplat


@dataclass(frozen=True)
class ReconstructorConfig:
    """Sizes and conventions of an MVSplat; the defaults are the published re10k model's."""

    stem: tuple = (64, 96, 128)  # channels of the CNN's three stages
    dim: int = 128  # of the matched features
    blocks: int = 6  # of the transformer
    candidates: int = 128  # depths in the cost volume
    cost_dim: int = 128  # of the cost volume's U-Net
    cost_levels: int = 3  # with attention at the last
    refine_dim: int = 32  # of the full-resolution U-Net
    refine_levels: int = 5  # with attention at the last
    sh_degree: int = 4  # of the colours
    cosine: bool = False  # match by the cosine of centred features, not by their product
    ray_depth: bool = True  # a Gaussian's depth is along its ray; False: along z, as candidates
    unit_near: bool = False  # scale scenes to near = 1 and back: the unit does not matter


# The model in weights/, sized for a CPU: 0.5 s a scene at 224 x 224
SMALL = ReconstructorConfig(
    stem=(16, 24, 32), dim=32, blocks=2, candidates=48, cost_dim=32, cost_levels=3,
    refine_dim=16, refine_levels=4, sh_degree=0, cosine=True, ray_depth=False, unit_near=True,
)  # fmt: skip


class MVSplat(nn.Module):
    """Photos of a scene to one Gaussian per pixel. Parameters have the public code's names."""

    def __init__(self, config=ReconstructorConfig()):
        super().__init__()
        self.config = config
        self.backbone = nn.Module()
        self.backbone.backbone = stem(config)
        self.backbone.transformer = MatchingTransformer(config)
        self.depth_predictor = DepthPredictor(config)

    def forward(self, images, extrinsics, intrinsics, near, far, coarse=False):
        """Images [B, V, 3, H, W] in 0..1, extrinsics [B, V, 4, 4], intrinsics [B, V, 3, 3], near
        and far [B, V] in the cameras' unit -> Gaussians with (sh_degree + 1)^2 harmonics.

        coarse=True: only the depths [B, V, h, w] from matching. ValueError: V < 2, H or W no
        multiple of 16, not 0 < near < far, a camera that is not rigid, or NaN.
        """
        check_views(images, extrinsics, intrinsics, near, far)
        B, V, predictor = *images.shape[:2], self.depth_predictor
        others = [[u for u in range(V) if u != v] for v in range(V)]
        others = torch.tensor(others, device=images.device)  # [V, V - 1]
        unit = near[:, :1] if self.config.unit_near else torch.ones_like(near[:, :1])  # [B, 1]
        near, far, extrinsics = near / unit, far / unit, extrinsics.clone()
        extrinsics[..., :3, 3] /= unit[..., None]
        cnn = self.backbone.backbone(normalise(images).flatten(0, 1)).unflatten(0, (B, V))
        matched = self.backbone.transformer(cnn, others)
        inverse, confidence = predictor.coarse(matched, intrinsics, extrinsics, near, far, others)
        if coarse:
            return unit[..., None, None] / inverse[:, 0].unflatten(0, (B, V))
        fine = predictor.fine(images, matched, cnn, inverse, confidence, near, far)
        return to_gaussians(*fine, intrinsics, extrinsics, self.config.ray_depth).scaled(unit)


def check_views(images, extrinsics, intrinsics, near, far):
    """Raise ValueError for inputs that `MVSplat.forward` does not take."""
    V, _, H, W = images.shape[1:]
    for name, tensor in dict(images=images, extrinsics=extrinsics, intrinsics=intrinsics).items():
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise ValueError(f"{name} must be finite numbers of a floating-point type")
    if V < 2:
        raise ValueError(f"reconstruction compares views and needs at least 2, not {V}")
    if H % 16 or W % 16:
        fits = " x ".join(str(max(1, round(size / 16)) * 16) for size in (H, W))
        raise ValueError(
            f"images must be multiples of 16 pixels high and wide, such as {fits}, not {H} x {W}"
        )
    if not ((0 < near) & (near < far)).all():
        raise ValueError("0 < near < far must hold for every view")
    R, identity = extrinsics[..., :3, :3], torch.eye(4).to(extrinsics)
    close = dict(rtol=0, atol=1e-3)
    rotates = torch.allclose(R @ R.mT, identity[:3, :3], **close) and (torch.det(R) > 0).all()
    if not (rotates and torch.allclose(extrinsics[..., 3, :], identity[3], **close)):
        rigid = "a rotation in the upper left 3 x 3, and 0 0 0 1 in the last row, of each"
        raise ValueError(f"extrinsics must be rigid: {rigid}")


# ---------------------------------------------------------------------------- its parts


def conv(c_in, c_out, size=3, stride=1, bias=True):
    return nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=bias)


class ResidualBlock(nn.Module):
    """Two convolutions and a skip connection, instance-normalised."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv1 = conv(c_in, c_out, stride=stride, bias=False)
        self.conv2 = conv(c_out, c_out, bias=False)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(conv(c_in, c_out, 1, stride))

    def forward(self, x):
        y = F.relu(F.instance_norm(self.conv1(x)))
        y = F.relu(F.instance_norm(self.conv2(y)))
        return F.relu(y + (F.instance_norm(self.downsample(x)) if self.downsample else x))


def stem(config):
    """Photos [B*V, 3, H, W] to features [B*V, dim, h, w]."""
    a, b, c = config.stem
    return nn.Sequential(OrderedDict(
        conv1=conv(3, a, 7, 2, bias=False), norm=nn.InstanceNorm2d(a), relu=nn.ReLU(),
        layer1=nn.Sequential(ResidualBlock(a, a), ResidualBlock(a, a)),
        layer2=nn.Sequential(ResidualBlock(a, b, 2), ResidualBlock(b, b)),
        layer3=nn.Sequential(ResidualBlock(b, c), ResidualBlock(c, c)),
        conv2=conv(c, config.dim, 1),
    ))  # fmt: skip


def to_windows(x, shifted=False):
    """Features [..., h, w, D] as 2 x 2 windows of tokens [..., 4, h/2 * w/2, D]. Shifted windows
    are moved by a quarter of the size and wrap around."""
    if shifted:
        x = torch.roll(x, (-(x.shape[-3] // 4), -(x.shape[-2] // 4)), (-3, -2))
    x = x.unflatten(-2, (2, -1)).unflatten(-4, (2, -1))  # [..., 2, h/2, 2, w/2, D]
    return x.transpose(-4, -3).flatten(-3, -2).flatten(-4, -3)


def from_windows(x, h, w, shifted=False):
    """The inverse of `to_windows`."""
    x = x.unflatten(-2, (h // 2, w // 2)).unflatten(-4, (2, 2))  # [..., 2, 2, h/2, w/2, D]
    x = x.transpose(-4, -3).flatten(-3, -2).flatten(-4, -3)
    return torch.roll(x, (h // 4, w // 4), (-3, -2)) if shifted else x


def sine_positions(h, w, dim, device=None):
    """DETR's sine embedding of a grid, coordinates from 1, normalised to 2 pi. [h, w, dim]"""
    frequency = 10000 ** (-2 * (torch.arange(dim // 2, device=device) // 2) / (dim // 2))
    axes = []
    for size in (h, w):
        x = 2 * math.pi * torch.arange(1, size + 1, device=device) / (size + 1e-6)
        x = x[:, None] * frequency
        axes.append(torch.stack([x[:, 0::2].sin(), x[:, 1::2].cos()], -1).flatten(1))
    return torch.cat([axes[0][:, None].expand(h, w, -1), axes[1].expand(h, w, -1)], -1)


@functools.lru_cache(maxsize=1)  # 0.93 GiB at 576 x 880
def shift_mask(h, w, device=None):
    """Attention bias [4, tokens, tokens] of shifted windows: -100 between tokens that are
    neighbours only because of the roll. Cached for one size."""

    def regions(size):  # the last half window wrapped around
        i = torch.arange(size, device=device)
        return (i >= size // 2).to(torch.uint8) + (i >= size - size // 4)

    with torch.inference_mode(False):  # an inference tensor could not be trained with later
        region = to_windows((3 * regions(h)[:, None] + regions(w))[..., None])[..., 0]
        mask = torch.zeros(4, h * w // 4, h * w // 4, device=device)
        return mask.masked_fill_(region[:, :, None] != region[:, None, :], -100.0)


class AttentionLayer(nn.Module):
    """Single-head attention within windows, with `mlp` followed by an MLP."""

    def __init__(self, dim, mlp):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "merge"):
            setattr(self, name, nn.Linear(dim, dim, bias=False))
        self.norm1, self.mlp = nn.LayerNorm(dim), None
        if mlp:
            up, down = nn.Linear(2 * dim, 8 * dim, bias=False), nn.Linear(8 * dim, dim, bias=False)
            self.mlp, self.norm2 = nn.Sequential(up, nn.GELU(), down), nn.LayerNorm(dim)

    def forward(self, x, keys, mask):
        """x [B, V, h, w, D] attends to S views, keys [B, V, S, h, w, D]. mask: `shift_mask` for
        shifted windows, or None."""
        (h, w), S, shifted = x.shape[2:4], keys.shape[2], mask is not None
        q = to_windows(self.q_proj(x), shifted)  # [B, V, 4, tokens, D]
        k, v = (to_windows(proj(keys), shifted) for proj in (self.k_proj, self.v_proj))
        k, v = (t.transpose(2, 3).flatten(3, 4) for t in (k, v))  # [B, V, 4, S * tokens, D]
        # Windows as heads, and a 4-dimensional mask: other shapes fall back to an attention that
        # stores tokens x tokens
        q4, k4, v4 = (t.flatten(0, 1) for t in (q, k, v))
        # [1, 4, tokens, S * tokens]; a copy only where S > 1
        bias = mask[None, :, :, None].expand(-1, -1, -1, S, -1).flatten(3) if shifted else None
        attended = F.scaled_dot_product_attention(q4, k4, v4, attn_mask=bias).view_as(q)
        message = self.norm1(self.merge(from_windows(attended, h, w, shifted)))
        if self.mlp is not None:
            message = self.norm2(self.mlp(torch.cat([x, message], -1)))
        return x + message


class MatchingTransformer(nn.Module):
    """Self- and cross-view attention. Windows shift in every second block (Swin)."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(config.blocks):
            within, across = (AttentionLayer(config.dim, mlp) for mlp in (False, True))
            self.layers.append(nn.ModuleDict({"self_attn": within, "cross_attn_ffn": across}))

    def forward(self, x, others):  # [B, V, D, h, w], [V, V - 1]
        x = x.permute(0, 1, 3, 4, 2)
        h, w, dim = x.shape[-3:]
        x = x + sine_positions(h // 2, w // 2, dim, x.device).to(x).repeat(2, 2, 1)
        mask = shift_mask(h, w, x.device).to(x)
        for i, block in enumerate(self.layers):
            shifted = mask if i % 2 else None
            seen = x[:, others]  # [B, V, V - 1, h, w, D], before this block
            x = block["self_attn"](x, x[:, :, None], shifted)
            x = block["cross_attn_ffn"](x, seen, shifted)
        return x.permute(0, 1, 4, 2, 3)


class Chain(nn.Sequential):
    """A Sequential that passes the number of views to the parts that need it."""

    def forward(self, x, views):  # [B*V, C, h, w]
        for part in self:
            x = part(x, views) if isinstance(part, (UNet, UNetAttention)) else part(x)
        return x


def group_norm(channels):
    return nn.GroupNorm(8 if channels % 8 == 0 else 4, channels)


class UNetResidual(nn.Module):
    """Latent diffusion's residual block, but with each norm after its convolution."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.in_layers = nn.Sequential(conv(c_in, c_out), group_norm(c_out), nn.SiLU())
        self.out_layers = nn.Sequential(conv(c_out, c_out), group_norm(c_out), nn.SiLU())
        self.skip_connection = conv(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        return self.skip_connection(x) + self.out_layers(self.in_layers(x))


class UNetAttention(nn.Module):
    """Attention over the pixels of all views of a scene together, heads of 32 channels."""

    def __init__(self, channels):
        super().__init__()
        self.heads = max(1, channels // 32)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        self.norm = group_norm(channels)

    def forward(self, x, views):  # [B*V, C, h, w]
        tokens = x.flatten(2).unflatten(0, (-1, views)).transpose(1, 2).flatten(2)  # [B, C, V*h*w]
        q, k, v = self.qkv(tokens).unflatten(1, (self.heads, 3, -1)).transpose(-1, -2).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)
        y = self.proj_out(y).unflatten(2, (views, -1)).transpose(1, 2).flatten(0, 1)
        return x + self.norm(y).view_as(x)  # each view is normalised alone


class UNet(nn.Module):
    """Latent diffusion's U-Net without time, of c channels, with attention at the last level."""

    def __init__(self, c, levels):
        super().__init__()
        down, up, last = [Chain(conv(c, c))], [], levels - 1
        for level in range(levels):
            down.append(Chain(UNetResidual(c, c), *[UNetAttention(c)] * (level == last)))
            if level != last:
                down.append(Chain(nn.Sequential(OrderedDict(op=conv(c, c, stride=2)))))
        self.input_blocks = nn.ModuleList(down)
        self.middle_block = Chain(UNetResidual(c, c), nn.Identity(), UNetResidual(c, c))
        for level in reversed(range(levels)):
            for second in (False, True):
                # Unused parts are made too: a seed's random draws depend on it
                parts = [UNetResidual(2 * c, c)] + [UNetAttention(c)] * (level == last)
                larger = OrderedDict(up=nn.Upsample(scale_factor=2), conv=conv(c, c))
                parts += [nn.Sequential(larger)] * (second and level > 0)
                up.append(Chain(*parts))
        self.output_blocks = nn.ModuleList(up)
        self.out = nn.Sequential(conv(c, c), group_norm(c), nn.SiLU())

    def forward(self, x, views):  # [B*V, C, h, w]
        kept = []
        for block in self.input_blocks:
            x = block(x, views)
            kept.append(x)
        x = self.middle_block(x, views)
        for block in self.output_blocks:
            x = block(torch.cat([x, kept.pop()], 1), views)
        return self.out(x)


class DepthPredictor(nn.Module):
    """From matched features to depth, opacity and raw Gaussian parameters per pixel."""

    def __init__(self, config):
        super().__init__()
        self.cosine = config.cosine
        c, r, d, n = config.cost_dim, config.refine_dim, config.dim, config.candidates
        self.corr_refine_net = Chain(
            conv(n + d, c), nn.GroupNorm(8, c), nn.GELU(), UNet(c, config.cost_levels), conv(c, n)
        )
        self.regressor_residual = conv(n + d, n, 1)
        self.depth_head_lowres = nn.Sequential(conv(n, 2 * n), nn.GELU(), conv(2 * n, n))
        four_times = nn.Upsample(scale_factor=4, mode="bilinear", align_corners=True)
        self.upsampler = nn.Sequential(conv(2 * d, d), four_times, nn.GELU())
        self.proj_feature = conv(d, r)
        self.refine_unet = Chain(
            conv(3 + r + 2, r), nn.GroupNorm(4, r), nn.GELU(), UNet(r, config.refine_levels)
        )
        raw = 2 + 3 + 4 + 3 * (config.sh_degree + 1) ** 2  # see to_gaussians
        self.to_gaussians = nn.Sequential(conv(r + 3 + d, 2 * raw), nn.GELU(), conv(2 * raw, raw))
        self.to_disparity = nn.Sequential(conv(r, 2 * r), nn.GELU(), conv(2 * r, 2))

    def coarse(self, matched, intrinsics, extrinsics, near, far, others):
        """Expected inverse depth over the candidates, and the largest probability (confidence),
        both [B*V, 1, h, w]."""
        V, n = matched.shape[1], self.regressor_residual.out_channels
        low, high = 1 / far[..., None], 1 / near[..., None]  # [B, V, 1]
        inverse = low + torch.linspace(0, 1, n, device=near.device) * (high - low)  # [B, V, n]
        features = matched
        if self.cosine:
            features = matched - matched.mean((1, 3, 4), keepdim=True)
            features = F.normalize(features, dim=2) * math.sqrt(matched.shape[2])
        cost = cost_volume(features, intrinsics, extrinsics, 1 / inverse, others)
        x = torch.cat([cost, matched], 2).flatten(0, 1)  # [B*V, n + D, h, w]
        refined = self.corr_refine_net(x, V) + self.regressor_residual(x)
        pdf = self.depth_head_lowres(refined).softmax(1)  # [B*V, n, h, w]
        mean = (pdf * inverse.flatten(0, 1)[..., None, None]).sum(1, keepdim=True)
        return mean, pdf.amax(1, keepdim=True)

    def fine(self, images, matched, cnn, coarse, confidence, near, far):
        """At full resolution: refined depths and opacities [B, V, H, W], raw Gaussian parameters
        [B, V, raw, H, W]."""
        B, V, _, H, W = images.shape
        coarse = F.interpolate(coarse, (H, W), mode="bilinear", align_corners=True)
        confidence = F.interpolate(confidence, (H, W), mode="nearest")
        photo = images.flatten(0, 1)
        features = self.upsampler(torch.cat([matched, cnn], 2).flatten(0, 1))
        x = torch.cat([photo, self.proj_feature(features), coarse, confidence], 1)
        x = self.refine_unet(x, V)
        delta, density = self.to_disparity(x).split(1, 1)
        bounds = (1 / t.flatten()[:, None, None, None] for t in (far, near))
        depths = 1 / torch.clamp(coarse + delta, *bounds)
        raw = self.to_gaussians(torch.cat([x, photo, features], 1))
        return (t.unflatten(0, (B, V)) for t in (depths[:, 0], density[:, 0].sigmoid(), raw))


def cost_volume(features, intrinsics, extrinsics, depths, others):
    """Matching scores [B, V, n, h, w] of depth candidates [B, V, n] along z: scaled dot products of
    features [B, V, D, h, w] with those of the other views [V, V - 1] seen there, averaged."""
    B, V, D, h, w = features.shape
    K = intrinsics * features.new_tensor([w, h, 1])[:, None]
    y, x = torch.meshgrid(*(torch.arange(s, device=K.device) for s in (h, w)), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).flatten(1).to(features)  # MVSplat: no + 0.5
    rays = torch.linalg.inv(K) @ pixels  # [B, V, 3, h*w]
    costs = []
    for candidates in depths.split(32, -1):  # all at once take 4 GB at the paper's size
        cost, n = 0, candidates.shape[-1]
        for other in others.T:
            to_other = torch.linalg.inv(extrinsics[:, other]) @ extrinsics  # [B, V, 4, 4]
            R, t = to_other[..., :3, :3], to_other[..., :3, 3:]
            points = (R @ rays)[:, :, :, None] * candidates[:, :, None, :, None] + t[..., None]
            seen = K[:, other] @ points.flatten(3)  # [B, V, 3, n*h*w]
            xy = seen[:, :, :2] / seen[:, :, 2:].clamp(min=1e-3)
            grid = 2 * xy / features.new_tensor([w - 1, h - 1]).view(2, 1) - 1
            grid = grid.mT.reshape(B * V, n, h * w, 2)
            warped = F.grid_sample(features[:, other].flatten(0, 1), grid, align_corners=True)
            warped = warped.view(B, V, D, n, h, w)
            cost = cost + torch.einsum("bvdhw,bvdnhw->bvnhw", features, warped)
        costs.append(cost / (math.sqrt(D) * (V - 1)))
    return torch.cat(costs, 2)


def to_gaussians(depths, opacities, raw, intrinsics, extrinsics, ray_depth=True):
    """Depths and opacities [B, V, H, W], raw parameters [B, V, raw, H, W] and cameras -> Gaussians.
    Raw are 2 for the pixel offset, 3 for scale, a quaternion x, y, z, w, and harmonics."""
    B, V, H, W = depths.shape
    raw = raw.permute(0, 1, 3, 4, 2)
    offset, scale, quaternion, harmonics = raw.split([2, 3, 4, raw.shape[-1] - 9], -1)
    # Mean: on the ray through the pixel's centre, offset by at most half a pixel
    size = raw.new_tensor([1 / W, 1 / H])
    y, x = torch.meshgrid(*(torch.arange(s).to(raw) + 0.5 for s in (H, W)), indexing="ij")
    xy = torch.stack([x, y], -1) * size + (offset.sigmoid() - 0.5) * size
    inverse = torch.linalg.inv(intrinsics)[:, :, None, None]
    rays = (inverse @ F.pad(xy, (0, 1), value=1.0)[..., None])[..., 0]  # z = 1
    if ray_depth:
        rays = F.normalize(rays, dim=-1)
    R, t = extrinsics[:, :, None, None, :3, :3], extrinsics[:, :, None, None, :3, 3]
    means = (R @ (rays * depths[..., None])[..., None])[..., 0] + t
    # Covariance: R S S^T R^T, with standard deviations in pixels at that depth
    pixel = 0.1 * (torch.linalg.inv(intrinsics[..., :2, :2]) @ size).sum(-1)  # [B, V]
    sigmas = (0.5 + 14.5 * scale.sigmoid()) * depths[..., None] * pixel[..., None, None, None]
    i, j, k, r = F.normalize(quaternion, dim=-1, eps=1e-8).unbind(-1)
    rotation = torch.stack([
        1 - 2 * (j * j + k * k), 2 * (i * j - k * r), 2 * (i * k + j * r),
        2 * (i * j + k * r), 1 - 2 * (i * i + k * k), 2 * (j * k - i * r),
        2 * (i * k - j * r), 2 * (j * k + i * r), 1 - 2 * (i * i + j * j),
    ], -1).unflatten(-1, (3, 3))  # fmt: skip
    L = R @ rotation * sigmas[..., None, :]
    covars = L @ L.mT
    # Colour: harmonics, damped beyond degree 0, rotated from camera to world axes
    harmonics = harmonics.unflatten(-1, (3, -1))  # [B, V, H, W, 3, (degree + 1)^2]
    degrees = torch.arange(harmonics.shape[-1], device=raw.device).sqrt().floor()
    harmonics = harmonics * torch.where(degrees > 0, 0.1 * 0.25**degrees, 1.0).to(raw)
    rotations = extrinsics[..., :3, :3].flatten(0, 1)
    harmonics = rotate_harmonics(harmonics.flatten(0, 1), rotations).unflatten(0, (B, V))
    parts = means, covars, opacities, harmonics
    return Gaussians(*(part.flatten(1, 3) for part in parts))


# ---------------------------------------------------------------------------- its weights


def pass_on(first, second, inputs, hidden, outputs, kernel, gain=1.0):
    """Make conv, GELU, conv pass `inputs` on to `outputs`, filtered by the kernel twice. Each
    channel takes two hidden ones: gelu(x) - gelu(-x) = x."""
    for sign, channels in zip((1, -1), hidden):
        first.weight[channels, inputs] += sign * kernel
        second.weight[outputs, channels] += sign * gain * kernel


@torch.no_grad()
def new_reconstructor(config=SMALL):
    """An MVSplat to train: random weights, set up to be plain stereo before any training.

    Depth is where 5 x 5 of the CNN's features match best; Gaussians are opaque, half a pixel wide
    and of their pixel's colour. (The public code starts from a trained matching network.)
    """
    reconstructor = MVSplat(config)
    predictor, n = reconstructor.depth_predictor, config.candidates
    features = reconstructor.backbone.backbone.conv2
    features.weight.mul_(4.0)  # features must outweigh the position embedding
    features.bias.zero_()
    for block in reconstructor.backbone.transformer.layers:  # residual branches start at 0
        block["self_attn"].norm1.weight.zero_()
        block["cross_attn_ffn"].norm2.weight.zero_()
    # The matching cost reaches the softmax, averaged over 3 x 3 pixels twice
    residual, (first, _, second) = predictor.regressor_residual, predictor.depth_head_lowres
    for layer in (residual, first, second, predictor.corr_refine_net[-1]):
        layer.weight.mul_(0.1)
        layer.bias.zero_()
    candidates = torch.arange(n)
    residual.weight[candidates, candidates] += 4.0
    hidden = candidates, n + candidates
    pass_on(first, second, candidates, hidden, candidates, torch.full((3, 3), 1 / 9))
    density = predictor.to_disparity[-1]
    density.weight.zero_()
    density.bias.copy_(torch.tensor([0.0, 2.0]))  # depth unchanged; opacity 0.88
    # Colours of degree 0 are (photo - 0.5) / SH_C0
    first, _, second = predictor.to_gaussians
    second.weight.mul_(0.1)
    second.bias.zero_()[2:5] = -2.0  # sigma is 0.45 pixels
    centre = F.pad(torch.ones(1, 1), (1, 1, 1, 1))
    for c in range(3):
        row = 9 + c * (config.sh_degree + 1) ** 2
        hidden = [2 * c, 2 * c + 1]
        first.weight[hidden], first.bias[hidden], second.weight[row] = 0.0, 0.0, 0.0
        pass_on(first, second, config.refine_dim + c, hidden, row, centre, 1 / SH_C0)
        second.bias[row] = -0.5 / SH_C0
    return reconstructor


def load_reconstructor(path=None):
    """An MVSplat, frozen, in eval mode: the one in weights/ (None or "shipped"), the published
    `re10k.ckpt`, or a safetensors file with `ReconstructorConfig`'s fields as JSON in its metadata,
    "config". ValueError: the file is missing or does not fit."""
    path = SHIPPED if path in (None, "shipped") else Path(path)
    state, config = read_state(path), ReconstructorConfig()
    try:
        if path.suffix == ".safetensors":
            config = ReconstructorConfig(**json.loads(read_metadata(path)["config"]))
        if max(config.blocks, config.cost_levels, config.refine_levels) > len(state):
            raise ValueError("more layers than the file has tensors")
        with torch.device("meta"):
            reconstructor = MVSplat(config)
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError) as error:
        why = f"no reconstructor's configuration in its metadata ({error})".partition("\n")[0]
        raise ValueError(f"{path}: {why}") from None
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    load_strictly(reconstructor, encoder or state, path)
    return reconstructor.eval().requires_grad_(False)


# ---------------------------------------------------------------------------- to use, to train


class FeedForward(nn.Module):
    """Gaussians from photos alone: context views {"images" [B, V, 3, H, W], "Ks", "extrinsics"}.

    near and far are in baselines, the distance from a scene's first camera to its last, which is
    the only unit that photos alone define. The network sees scenes scaled to a baseline of 1.
    """

    def __init__(self, reconstructor, near, far):
        super().__init__()
        if not 0 < near < far:
            raise ValueError(f"0 < near < far must hold, not near {near} and far {far}")
        self.reconstructor, self.near, self.far = reconstructor, near, far

    def forward(self, context, coarse=False):
        images, extrinsics = context["images"], context["extrinsics"].clone()
        H, W = images.shape[-2:]
        intrinsics = context["Ks"] / images.new_tensor([W, H, 1])[:, None]
        baseline = (extrinsics[:, 0, :3, 3] - extrinsics[:, -1, :3, 3]).norm(dim=-1)[:, None]
        # Without a baseline there is no depth: Gaussians land before NEAR_PLANE and leave holes
        baseline = baseline.clamp(min=1e-9)  # [B, 1]
        extrinsics[..., :3, 3] /= baseline[..., None]
        near, far = (images.new_full(images.shape[:2], d) for d in (self.near, self.far))
        out = self.reconstructor(images, extrinsics, intrinsics, near, far, coarse)
        return out * baseline[..., None, None] if coarse else out.scaled(baseline)


class Reconstruction(nn.Module):
    """One training step of a reconstructor (MVSplat, section 3.3).

    The loss is the mean squared error of the rendered target photo, plus depth_weight times the
    mean absolute error of log depth, of context pixels whose depth is known (MVSplat: plus LPIPS).
    """

    def __init__(self, reconstructor, near, far, depth_weight):
        super().__init__()
        self.reconstruct = FeedForward(reconstructor, near, far)
        self.depth_weight = depth_weight

    def forward(self, batch, coarse=False):
        """A batch as `SplatAndDistill`'s. Returns the loss, metrics {name: scalar tensor} and what
        to draw: "photo" [B, 3, H, W], "depth" and "alphas" [B, H, W], and "gaussians".

        coarse=True: the loss of the depths from matching alone, at a quarter of the size. It needs
        depth and draws nothing.
        """
        context, target = batch["context"], batch["target"]
        V, _, H, W = context["images"].shape[1:]
        if coarse:
            known = F.interpolate(context["depths"], (H // 4, W // 4), mode="nearest")
            error = log_depth_error(self.reconstruct(context, coarse=True), known, self.training)
            loss = self.depth_weight * error
            return loss, {"loss": loss.detach(), "log_depth": error.detach()}, {}
        gaussians = without_masked(self.reconstruct(context), context)
        photo, depth, alphas = render(gaussians, target["extrinsics"], target["Ks"], W, H)
        valid = target.get("valid", torch.ones_like(alphas, dtype=torch.bool))  # [B, H, W]
        squares = torch.where(valid[:, None], photo - target["images"], 0.0) ** 2
        loss = mean_of(squares.sum(), 3 * valid.sum(), self.training)
        metrics = {"mse": loss.detach()}
        if "depths" in context:
            forwards = torch.linalg.inv(context["extrinsics"])[:, :, 2]  # [B, V, 4] world to z
            points = F.pad(gaussians.means, (0, 1), value=1.0).unflatten(1, (V, H, W))
            z = (points * forwards[:, :, None, None]).sum(-1)
            error = log_depth_error(z, context["depths"], self.training)
            metrics["log_depth"], loss = error.detach(), loss + self.depth_weight * error
        drawn = dict(photo=photo, depth=depth, alphas=alphas, gaussians=gaussians)
        return loss, {"loss": loss.detach(), **metrics}, drawn


def log_depth_error(depths, truth, together=False):
    """Mean of |log(depths / truth)| where truth is not 0 (unknown). together: see `mean_of`."""
    known = truth > 0
    error = depths.clamp(min=1e-6).log() - truth.clamp(min=1e-6).log()
    return mean_of(torch.where(known, error, 0.0).abs().sum(), known.sum(), together)


# ---------------------------------------------------------------------------- fields of features

RANGE = (0.4, 2.0)  # near and far, over the distance to the scene: see `choose_ranges`
BASELINE = 0.1  # of a pair, over the distance to the scene; the shipped reconstructor's best


class Field(NamedTuple):
    """A scene as N Gaussians that carry a teacher's features."""

    gaussians: Gaussians  # of one scene, B = 1, in the world of the cameras
    features: torch.Tensor  # [N, C] float16, perhaps mapped from a file; without a teacher C = 0
    frames: torch.Tensor  # [N] int32: the view, from 0, whose pixel it is
    normals: torch.Tensor  # [N, 3] world, unit, towards that view; 0 where unknown
    meta: dict  # how it was made, for JSON

    @torch.no_grad()
    def render(self, extrinsics, K, width, height, features=True):
        """Seen by a camera, extrinsics [4, 4] and K [3, 3]: {"photo" [3, H, W], "depth" [H, W],
        "alpha" [H, W] and, if the field has them and `features`, "features" [H, W, C]}. Features
        and depth are means over the Gaussians seen."""
        rows = self.seen_by(extrinsics, K, width, height)
        gaussians = Gaussians(*(t[:, rows].to(DEVICE) for t in self.gaussians))
        E, Ks = extrinsics[None].to(DEVICE), K[None].to(DEVICE)
        photo, depth, alpha = (t[0] for t in render(gaussians, E, Ks, width, height))
        out = {"photo": photo, "depth": depth, "alpha": alpha}
        if not features or not self.features.shape[1]:
            return out
        camera, drawn = (torch.linalg.inv(E)[:, None], Ks[None], width, height), []
        for part in self.features.split(128, 1):  # features may be mapped from disk
            part = part[rows][None].to(DEVICE).float()
            seen, _ = rasterize(*gaussians[:3], part, *camera, near_plane=NEAR_PLANE)
            drawn.append(seen[0, 0] / alpha.clamp(min=1e-6)[..., None])
        return out | {"features": torch.cat(drawn, -1)}

    def seen_by(self, extrinsics, K, width, height):
        """Indices of the Gaussians that may touch a camera's image."""
        means, covars = self.gaussians.means[0], self.gaussians.covars[0]
        x, y, z = ((means - extrinsics[:3, 3]) @ extrinsics[:3, :3]).T
        reach = 4 * covars.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()  # alpha < 1/255 beyond
        inside = z > NEAR_PLANE
        for at, size, k in ((x, width, 0), (y, height, 1)):
            off = (K[k, k] * at + (K[k, 2] - size / 2) * z).abs()  # from the centre, pixels * z
            inside &= off < (size / 2 + 2) * z + K[k, k] * reach
        return inside.nonzero()[:, 0]

    def rgb(self):
        """Colours [N, 3] in 0..1, of degree 0: for no viewing direction."""
        return (0.5 + SH_C0 * self.gaussians.harmonics[0, ..., 0]).clamp(0, 1)

    def save(self, folder):
        """Write folder/scene.ply and points.npz: xyz [N, 3], rgb [N, 3] in 0..1, opacity [N],
        normal [N, 3], features [N, C] float16, frame [N] and meta, JSON."""
        from train import replace_file  # which imports this file

        opacities = self.gaussians.opacities[0]
        points = dict(xyz=self.gaussians.means[0], rgb=self.rgb(), opacity=opacities,
                      normal=self.normals, features=self.features, frame=self.frames,
                      meta=np.array(json.dumps(self.meta)))  # fmt: skip
        replace_file(Path(folder) / "scene.ply", lambda path: save_ply(path, self.gaussians))
        replace_file(Path(folder) / "points.npz", lambda path: save_npz(path, points))


def save_npz(path, arrays):
    """Write NumPy's .npz of {name: array} in blocks, without copying a whole array."""
    with zipfile.ZipFile(path, "w") as file:
        for name, array in arrays.items():
            array, npy = np.asarray(array), np.lib.format
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array_header_1_0(member, npy.header_data_from_array_1_0(array))
                flat = array.reshape(-1)
                for i in range(0, len(flat), 2**22):
                    member.write(flat[i : i + 2**22].tobytes())


def quiet(items, *_):  # as evaluate.counted, but prints nothing
    return items


@torch.no_grad()
def reconstruct(
    views, geometry, vit=None, *, tolerance=0.03, folder=None, meta=None, counted=quiet
):  # fmt: skip
    """Views of one scene -> a `Field`. A Gaussian's features are its own pixel's.

        views: {"images" [V, 3, H, W] in 0..1, "extrinsics" [V, 4, 4], "Ks" [V, 3, 3]} along the
            path; optional "depths", "masks" and "valid" [V, H, W], "numbers" [V] of the photos and
            "ranges" [V, 2], near and far in the cameras' unit, which `choose_ranges` may set else.
        geometry: `SensorDepth`, or a `FeedForward`, which gets the pairs that `pairs_of` chooses.
        vit: the teacher, or None. tolerance: depths agree if they differ by a smaller share.
        folder: for scratch files, default /tmp; features stay mapped from an unnamed one.
        counted(items, total, what): yields the items and may print progress.

    Two rules merge the views, by a Gaussian's depth and that of the pixel that it falls on in each
    other view. 1. It is dropped if more views see through it than agree with it. 2. Of those that
    agree, the one with the least depth over focal length is kept. Memory holds a pair, all depths
    and the result without features. ValueError: no depths, no views that overlap, nothing left.
    """
    views = choose_ranges(views, geometry)
    compare, at = dict(views=views, tolerance=tolerance), dict(dir=folder)
    with tempfile.TemporaryDirectory(**at) as scratch, tempfile.TemporaryFile(**at) as file:
        depths, normals = lift_views(views, geometry, scratch, counted)
        # Rule 1, with the depths of all views
        kept = torch.ones_like(depths, dtype=torch.bool)
        for i in counted(sorted(normals), len(normals), "view compared"):
            means = torch.load(f"{scratch}/{i}.pt", weights_only=True)[0][0]
            there, through, _ = agreement(means, i, depths=depths, **compare)
            kept[i] = through <= there
        depths *= kept
        # Rule 2, with the depths that are left
        parts = []
        for i in counted(sorted(normals), len(normals), "view merged"):
            gaussians = torch.load(f"{scratch}/{i}.pt", weights_only=True)
            finer = agreement(gaussians[0][0], i, depths=depths, **compare)[2]
            rows = ((depths[i] > 0) & (finer == 0)).nonzero()[:, 0]
            frame = torch.full_like(rows, i, dtype=torch.int32)
            parts.append((*(t[0, rows] for t in gaussians), frame, normals.pop(i)[rows]))
            if vit is not None and len(rows):
                features = lifted(vit, views, i, False)[0].half().cpu()  # [H * W, C]
                file.write(features[rows].numpy().tobytes())
        *gaussians, frames, normals = (torch.cat(t) for t in zip(*parts))
        if not len(frames):
            raise ValueError("nothing could be reconstructed: no depth that views agree on")
        file.flush()
        features = np.zeros((len(frames), 0), np.float16)
        if vit is not None:
            features = np.memmap(file, np.float16, "r+", shape=(len(frames), vit.embed_dim))
    gaussians, features = Gaussians(*(t[None] for t in gaussians)), torch.from_numpy(features)
    meta = (meta or {}) | {k: views[k].tolist() for k in {"ranges"} & views.keys()}
    return Field(gaussians, features, frames, normals, meta)


def lift_views(views, geometry, scratch, counted):
    """Write the Gaussians of each view's pixels to the folder scratch, pair by pair. Returns their
    depths [V, H*W], 0 where there is none, and normals {view: [H*W, 3] world}."""
    V, _, H, W = views["images"].shape
    depths, normals = torch.zeros(V, H * W), {}
    pairs = pairs_of(views) if isinstance(geometry, FeedForward) else [(i,) for i in range(V)]
    for pair in counted(pairs, len(pairs), "pair"):
        parts = (t.cpu().chunk(len(pair), 1) for t in lift_pair(views, geometry, pair))
        for i, gaussians in zip(pair, map(Gaussians, *parts)):
            if i in normals:  # of an earlier pair
                continue
            E, K = views["extrinsics"][i].cpu(), views["Ks"][i].cpu()
            z = (gaussians.means[0] - E[:3, 3]) @ E[:3, 2]  # [H * W]
            depths[i] = torch.where(gaussians.opacities[0] >= 1 / 255, z.clamp(min=0), 0.0)
            toward = data.normals_from_depth(depths[i].view(H, W), K).flatten(1)
            normals[i] = (E[:3, :3] @ toward).T
            own = [t.clone() for t in gaussians]  # a slice would be saved with its whole pair
            torch.save(own, f"{scratch}/{i}.pt")
    return depths, normals


def lift_pair(views, geometry, pair):
    """The Gaussians of the pixels of a pair of views."""
    keys = {"images", "extrinsics", "Ks", "depths", "valid"} & views.keys()
    context = {k: views[k][list(pair)][None] for k in keys}
    if isinstance(geometry, FeedForward):
        device = next(geometry.parameters()).device
        context = {k: v.to(device) for k, v in context.items()}
        if "ranges" in views:
            near, far = views["ranges"][list(pair), 0].min(), views["ranges"][list(pair), 1].max()
            baseline = (context["extrinsics"][0, 0] - context["extrinsics"][0, 1])[:3, 3].norm()
            near, far = float(near / baseline), float(far / baseline)
            geometry = FeedForward(geometry.reconstructor, near, far)
    return without_masked(geometry(context), context)


def choose_ranges(views, geometry):
    """Near and far planes for a capture without points: the geometry's own, or "ranges" of RANGE
    times the distance to the scene. Up to four pairs render a third view with both. Returns the
    views, with "ranges" if these have less than 0.8 of the squared error: a decibel."""
    E, Ks, (V, _, H, W) = views["extrinsics"], views["Ks"], views["images"].shape
    if "ranges" in views or V < 3 or not isinstance(geometry, FeedForward):
        return views
    distances = distances_of(views, E.cpu().double())[:, None]
    if not (distances > 0).all():  # cameras that stand still
        return views
    tried = views, views | {"ranges": (distances * torch.tensor(RANGE)).float()}
    errors = torch.zeros(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `lift_views` says which views overlap no other
        pairs = pairs_of(views)
    for pair in data.some(pairs, 4):
        away = (E[:, :3, 3] - E[list(pair), :3, 3].mean(0)).norm(dim=-1)  # [V]
        third = next(i for i in away.argsort().tolist() if i not in pair)
        for n, candidate in enumerate(tried):
            gaussians = lift_pair(candidate, geometry, pair)
            device = gaussians.means.device
            camera = E[third][None].to(device), Ks[third][None].to(device), W, H
            photo, truth = render(gaussians, *camera)[0][0], views["images"][third].to(device)
            errors[n] += (photo - truth).square().mean().cpu()
    return tried[errors[1] < 0.8 * errors[0]]


def lifted(vit, views, i, factored):
    """`lift_features` of one view. The teacher sees "photos" [V, 3, any size], if there are any."""
    H, W = views["images"].shape[-2:]
    images = views.get("photos", views["images"])[i : i + 1].to(vit.cls_token.device)
    tokens = patch_tokens(vit, images)  # [1, C, h, w]
    masks = views.get("masks", torch.zeros(len(views["images"]), H, W, dtype=torch.int64))
    return lift_features(tokens, masks[i : i + 1].to(tokens.device), 1, factored, centred=True)


def averaged(field, views, vit, *, counted=quiet):
    """The `Field` with features averaged over all views: each Gaussian's is the mean of the
    teacher's features of all pixels, weighted by its blending weight there. That takes one backward
    pass of the rasteriser per view. Gaussians seen by no view keep their features.

    Views and counted as in `reconstruct`. Memory holds [N, C] three times, float32.
    """
    (V, _, H, W), (N, C) = views["images"].shape, field.features.shape
    gaussians = [t.to(DEVICE) for t in field.gaussians[:3]]
    # Splatting is linear, so their gradient is the weighted sum of the pixels' values
    zeros = torch.zeros(1, N, C + 1, device=DEVICE, requires_grad=True)
    for i in counted(range(V), V, "view averaged"):
        with torch.no_grad():
            wanted = F.pad(lifted(vit, views, i, False), (0, 1), value=1.0).to(DEVICE)
        if "valid" in views:
            wanted = wanted * views["valid"][i].to(DEVICE).flatten()[:, None]
        camera = torch.linalg.inv(views["extrinsics"][i])[None, None], views["Ks"][i][None, None]
        camera = (t.to(DEVICE) for t in camera)
        drawn, _ = rasterize(*gaussians, zeros, *camera, W, H, near_plane=NEAR_PLANE)
        drawn.backward(wanted.view_as(drawn))
    total, weight = zeros.grad[0].cpu().split([C, 1], 1)
    features = torch.where(weight > 0, total / weight.clamp(min=1e-12), field.features.float())
    return field._replace(features=features.half(), meta=field.meta | {"averaged": True})


def optimise(field, views, vit, steps, geometry=False, *, counted=quiet):
    """Fit a `Field` to the teacher's features of all views by Adam, per scene as FiT3D does (arXiv
    2407.20229). Views and counted as in `reconstruct`.

    A step takes every fourth row and column of one view: sixteen steps see every pixel. The loss is
    the squared error to the teacher's upsampled features over their variance. (Cosine fits worse:
    blending depends on the length of features.) With geometry=True, means, covariances, opacities
    and colours are fitted too, and the photo's squared error over its variance is added. Memory
    holds [N, C] four times, float32. The meta gets "loss": [at the start, at the end]. ValueError:
    no views, features or steps, or a loss that is NaN or infinite.
    """
    (V, _, H, W), C = views["images"].shape, field.features.shape[1]
    if not V or not C or steps < 1:
        few = f"{V} views, {C} channels and {steps} steps"
        raise ValueError(f"optimise needs views, features and steps; there are {few}")
    views = {k: t.to(DEVICE) for k, t in views.items() if torch.is_tensor(t)}
    with torch.no_grad():
        maps = [Mixture(*(t[0] for t in lifted(vit, views, i, True))) for i in range(V)]
    spread = torch.cat([m.tokens for m in maps]).var(0).mean(), views["images"].var()
    features = field.features.to(DEVICE, torch.float32, copy=True).requires_grad_(True)  # [N, C]
    gaussians = Gaussians(*(t.to(DEVICE) for t in field.gaussians))
    scene, rates = Still(gaussians), [dict(params=[features], lr=0.05)]
    if geometry:
        scene = Moving(gaussians)
        rates.append(dict(params=list(scene.parameters()), lr=0.01))
    optimizer, losses = torch.optim.Adam(rates, fused=True), []
    for step in counted(range(steps), steps, "step"):
        i, corner = step % V, step // V * 7 % 16  # the 16 offsets, in a scattered order
        at = [torch.arange(c, n, 4, device=DEVICE) for c, n in zip(divmod(corner, 4), (H, W))]
        pixels = (at[0][:, None] * W + at[1]).flatten()  # [P]
        view = {k: views[k][i : i + 1] for k in ("extrinsics", "Ks")}
        drawn, alpha = scene.splat(features, view, at, pixels, (W, H))
        loss = fit_error(drawn, alpha, maps[i], views, i, pixels, spread)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"optimise: the loss is {losses[-1]} in step {step + 1}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gaussians = Gaussians(*(t.detach().cpu() for t in scene.gaussians()))
    end = max(1, min(steps // 2, 16 * V))  # a mean of steps: each sees few pixels
    ends = [mean(losses[:end]), mean(losses[-end:])]
    meta = field.meta | {"optimised": steps, "moved": geometry, "loss": ends}
    features = features.detach().half().cpu()
    return field._replace(gaussians=gaussians, features=features, meta=meta)


def fit_error(drawn, alpha, tokens, views, i, pixels, spread):
    """`optimise`'s loss of view i at pixels [P]: features drawn [P, C], or [P, C + 3] with colours,
    and alpha [P, 1], against a Mixture of tokens and the photo; spread holds their variances."""
    wanted = (tokens.tokens[tokens.indices[pixels]] * tokens.weights[pixels][..., None]).sum(1)
    C = wanted.shape[1]
    errors = [drawn[:, :C] - alpha * wanted]  # features are means over the Gaussians seen
    if drawn.shape[1] > C:  # colours are on black
        errors.append(drawn[:, C:] - views["images"][i].flatten(1).T[pixels])
    counts = views["valid"][i].flatten()[pixels, None] if "valid" in views else 1.0
    return sum((counts * e.square()).mean() / s.clamp(min=1e-8) for e, s in zip(errors, spread))


def linear_map(gaussians, camera, pixels):
    """Splatting of fixed Gaussians into pixels [P] of one view, as a linear map: the weights A,
    sparse [P, N], A' and alphas [P, 1]."""
    *_, W, H = camera
    weights, owner, pixel = pair_weights(*gaussians[:3], *camera, NEAR_PLANE, 1e10, 0.3)
    number = torch.full((H * W,), -1, device=pixel.device)
    number[pixels] = torch.arange(len(pixels), device=pixel.device)
    there = number[pixel] >= 0
    where = torch.stack([number[pixel][there], owner[there].long()])
    shape = len(pixels), len(gaussians.means[0])
    A = torch.sparse_coo_tensor(where, weights[there], shape, check_invariants=False).coalesce()
    return A, A.t().coalesce(), torch.sparse.sum(A, 1).to_dense()[:, None]


class SparseMap(torch.autograd.Function):
    """A @ x, with the transpose At given for the backward pass."""

    @staticmethod
    def forward(ctx, x, A, At):
        ctx.At = At
        return A @ x

    @staticmethod
    def backward(ctx, v):
        return ctx.At @ v, None, None


class Still:
    """Fixed Gaussians: splatting is a linear map, made once for each view and set of pixels."""

    def __init__(self, gaussians):
        self.fixed, self.maps = gaussians, {}

    def gaussians(self):
        return self.fixed

    def splat(self, features, view, at, pixels, size):
        """Features [P, C] of a view's pixels [P], rows and columns `at`, and alpha [P, 1]."""
        key = view["extrinsics"].cpu().numpy().tobytes(), int(pixels[0])
        if key not in self.maps:
            if len(self.maps) == 256:  # forget the oldest
                del self.maps[next(iter(self.maps))]
            camera = torch.linalg.inv(view["extrinsics"])[:, None], view["Ks"][:, None], *size
            self.maps[key] = linear_map(self.fixed, camera, pixels)
        A, At, alpha = self.maps[key]
        return SparseMap.apply(features, A, At), alpha


class Moving(nn.Module):
    """Gaussians to optimise. Lengths are in each one's axes and standard deviations: one learning
    rate suits all units."""

    def __init__(self, gaussians):
        super().__init__()
        variances, axes = torch.linalg.eigh(gaussians.covars)
        self.start = gaussians.means
        self.root = axes * variances.clamp(min=0).sqrt()[..., None, :]  # root root' = covars
        self.moved = nn.Parameter(torch.zeros_like(gaussians.means))
        self.stretched = nn.Parameter(torch.zeros_like(gaussians.covars))
        self.logits = nn.Parameter(gaussians.opacities.logit(1e-4))
        self.harmonics = nn.Parameter(gaussians.harmonics.clone())

    def gaussians(self):
        means = self.start + (self.root @ self.moved[..., None])[..., 0]
        root = self.root + self.root @ self.stretched
        return Gaussians(means, root @ root.mT, self.logits.sigmoid(), self.harmonics)

    def splat(self, features, view, at, pixels, size):
        """As `Still.splat`, with colours appended: [P, C + 3]."""
        gaussians, E = self.gaussians(), view["extrinsics"]
        channels = torch.cat([features[None], colours(gaussians, E)], -1)
        camera = torch.linalg.inv(E)[:, None], view["Ks"][:, None], *size
        options = dict(near_plane=NEAR_PLANE, at=at)
        drawn, alpha = rasterize(*gaussians[:3], channels, *camera, **options)
        return drawn.flatten(0, 3), alpha.detach().flatten()[pixels, None]


def agreement(points, own, *, views, depths, tolerance):
    """Compare points [P, 3] of view `own`, one per pixel, with depths [V, P] of all views (0 =
    unknown). Returns [P] each: how many other views have a surface there, how many see through to a
    surface behind, and how many have a surface there and see it finer."""
    there, through, finer = torch.zeros(3, len(points), dtype=torch.int32)
    (H, W), focal = views["images"].shape[-2:], views["Ks"][:, 0, 0].cpu()
    points = points.T.contiguous()
    for i in (i for i in range(len(depths)) if i != own):
        M = views["Ks"][i].cpu() @ torch.linalg.inv(views["extrinsics"][i].cpu())[:3]  # [3, 4]
        x, y, z = M[:, :3] @ points + M[:, 3:]  # pixels times depth, and depth
        inside = (z > NEAR_PLANE) & (x >= 0) & (x < W * z) & (y >= 0) & (y < H * z)
        inside = inside.nonzero()[:, 0]
        x, y, z = x[inside], y[inside], z[inside]
        at = (y / z).long().clamp(max=H - 1) * W + (x / z).long().clamp(max=W - 1)
        surface = depths[i][at]  # 0: unknown
        agree = (z / surface - 1).abs() < tolerance
        there[inside] += agree
        through[inside] += z < surface * (1 - tolerance)
        # A strict order, so that exactly one of those that agree is kept
        mine, other = depths[own][inside] / focal[own], surface / focal[i]
        finer[inside] += agree & ((other < mine) | (other == mine) & (i < own))
    return there, through, finer


def pairs_of(views):
    """Pairs (i, j) of overlapping views: in turn, the first view along the path without a pair, and
    its best partner. Overlap is the share of i's pixels that project into j's image from the
    distance of `distances_of`. Of the views that share half, or the most, the partner is the one
    whose baseline is closest to BASELINE times that distance.

    ValueError: no two views share a tenth. Warns about views without a pair.
    """
    E, Ks = views["extrinsics"].cpu().double(), views["Ks"].cpu().double()
    (V, H, W), centres = views["images"][:, 0].shape, E[:, :3, 3]
    distances = distances_of(views, E)  # [V]
    baselines = (centres[:, None] - centres).norm(dim=-1)  # [V, V]
    y, x = torch.meshgrid(*(n * (torch.arange(8.0) + 0.5) / 8 for n in (H, W)), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], -1).flatten(0, 1).double()  # [64, 3]
    points = pixels @ torch.linalg.inv(Ks).mT * distances[:, None, None]
    points = points @ E[:, :3, :3].mT + centres[:, None]  # [V, 64, 3]
    shares = torch.zeros(V, V)
    for j in range(V):
        seen = (points - centres[j]) @ E[j, :3, :3] @ Ks[j].T  # [V, 64, 3]
        x, y, z = (seen / seen[..., 2:].abs().clamp(min=1e-12)).unbind(-1)
        inside = (z > 0) & (x >= 0) & (x < W) & (y >= 0) & (y < H)
        shares[:, j] = inside.float().mean(-1) * (baselines[:, j] > 1e-6 * distances)
    off = (baselines / (BASELINE * distances[:, None])).clamp(min=1e-9).log().abs()  # [V, V]
    pairs, done = [], set()
    for i in (i for i in range(V) if shares[i].max() >= 0.1):
        if i not in done:
            enough = shares[i] >= min(0.5, float(shares[i].max()))
            pairs.append((i, int(torch.where(enough, off[i], torch.inf).argmin())))
            done |= set(pairs[-1])
    if not pairs:
        raise ValueError("no two photos overlap: none shows a tenth of what another one shows")
    if len(done) < V:
        warnings.warn(f"{V - len(done)} of {V} photos overlap no other, and are left out")
    return pairs


def distances_of(views, E):
    """How far each camera is from the scene, [V]: the geometric mean of "ranges"; else the distance
    to the point nearest to all optical axes; where those are parallel, the distance that makes
    BASELINE the baseline of views 10 numbers apart."""
    if "ranges" in views:
        return views["ranges"].double().prod(1).sqrt()
    centres, axes = E[:, :3, 3], E[:, :3, 2]
    across = torch.eye(3) - axes[:, :, None] * axes[:, None]  # [V, 3, 3], projects off an axis
    spread = torch.linalg.eigvalsh(across.mean(0))[0]  # the squared sine of the axes' angles
    point = torch.linalg.lstsq(across.sum(0), (across @ centres[..., None]).sum(0)).solution
    distances = ((point.T - centres) * axes).sum(-1)  # [V]
    numbers = torch.as_tensor(views.get("numbers", torch.arange(len(E))))
    partners = ((numbers[:, None] - numbers).abs() - 10).abs().argmin(1)
    usual = (centres - centres[partners]).norm(dim=-1) / BASELINE
    meet = (distances > 0) & (spread > math.sin(math.radians(3)) ** 2)
    return torch.where(meet, distances, usual)


# ---------------------------------------------------------------------------- how good it is

NEAREST, CONSTANT, SENSOR = "nearest context photo", "one constant depth", "sensor depth"


@torch.no_grad()
def reconstruction(settings, folder, counted, draw):
    """evaluate.py's task: how well target views are rendered. {way: [{metric: mean of scenes}]}

    The ways are the nearest context photo, Gaussians from photos alone (for each of --weights) and,
    with depth, Gaussians at its median and at sensor depth. counted as in `reconstruct`;
    draw(path, target, {way: (photo, depth, seen)}) draws a scene.
    """
    H, W = settings.image_size
    scenes = data.open_scenes(settings.data) if settings.data else data.Rooms("probe")
    options = {k: getattr(settings, k) for k in ("min_gap", "max_gap", "seed")}
    views = data.Views(scenes, H, W, **options, length=settings.scenes)
    networks = {}
    for name in settings.weights:
        network = load_reconstructor(name).to(DEVICE)
        networks[f"photos alone, {name}"] = FeedForward(network, settings.near, settings.far)
    ways, seconds = networks, {name: [] for name in networks}
    if not settings.data or all(scene.has_depth for scene in scenes):
        ways = {CONSTANT: constant_depth} | networks | {SENSOR: SensorDepth()}
    rows = {name: [] for name in (NEAREST, *ways)}
    for i in counted(range(settings.scenes), settings.scenes, "scene"):
        sample = views[i]
        context, target = ({k: v[None].to(DEVICE) for k, v in sample[part].items()}
                           for part in ("context", "target"))  # fmt: skip
        shown = {NEAREST: nearest_photo(context, target)}
        for name, way in ways.items():
            started = time.monotonic()
            gaussians = way(context)
            if name in networks:
                float(gaussians.means.sum())  # waits for a GPU
                seconds[name].append(time.monotonic() - started)
                if not (folder / "scene.ply").exists():
                    save_ply(folder / "scene.ply", gaussians)
            photo, depth, alphas = render(gaussians, target["extrinsics"], target["Ks"], W, H)
            shown[name] = photo, depth, alphas > 0.5
        for name, view in shown.items():
            rows[name].append(view_errors(*view, target))
        if i < 4:
            draw(folder / f"scene_{i}.png", target, shown)
    return over_scenes(rows, seconds, f"{H} x {W}")


def over_scenes(rows, seconds, size):
    """{way: [metrics of each scene]} -> {way: [means]}. Networks also get "closed", the share of
    the PSNR from median depth to sensor depth that they gain, and "seconds", the median."""
    table = {way: {k: mean(row[k] for row in each) for k in each[0]} for way, each in rows.items()}
    for name, times in seconds.items():
        if SENSOR in table and table[SENSOR]["psnr"] > (low := table[CONSTANT]["psnr"]):
            table[name]["closed"] = (table[name]["psnr"] - low) / (table[SENSOR]["psnr"] - low)
        table[name]["seconds"] = statistics.median(times)
        print(f"{name}: photos of {size} to Gaussians in {table[name]['seconds']:.2f} s")
    peak = 2**10 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated()
    print(f"Peak memory on {DEVICE}: {peak / 2**30:.2f} GiB")
    return {name: [row] for name, row in table.items()}


def mean(values):
    """The mean of those that are not None; None without any."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def constant_depth(context):
    """`SensorDepth`'s Gaussians with all depths set to their median."""
    depths = context["depths"]
    median = float(depths[depths > 0].median())
    return SensorDepth()(context | {"depths": torch.full_like(depths, median)})


def nearest_photo(context, target):
    """Photo, depth and seen pixels (all) of the context view nearest to the target."""
    away = (context["extrinsics"] - target["extrinsics"][:, None])[0, :, :3, 3].norm(dim=-1)  # [V]
    nearest = {k: v[:, away.argmin()] for k, v in context.items()}
    unknown = torch.zeros_like(nearest["images"][:, 0])
    return nearest["images"], nearest.get("depths", unknown), unknown == 0


def view_errors(photo, depth, seen, target):
    """{"psnr": of a photo [1, 3, H, W], dB, "holes": share of pixels [1, H, W] not seen} and
    `depth_errors`."""
    mse = (photo - target["images"]).square().mean().clamp(min=1e-10)
    truth = target.get("depths", torch.zeros_like(depth))
    row = {"psnr": float(-10 * mse.log10()), "holes": float((~seen).float().mean())}
    return row | depth_errors(depth, truth, seen)


def depth_errors(depth, truth, seen):
    """{"abs_rel": mean |depth / truth - 1| where seen, "abs_rel_scaled": with depth scaled by the
    median of truth / depth}. All of one shape; truth 0 is unknown. None: nothing is known."""
    known = (truth > 0) & seen & (depth > 0)
    if not known.any():
        return {"abs_rel": None, "abs_rel_scaled": None}
    ratio = depth[known] / truth[known]
    errors = {"abs_rel": ratio, "abs_rel_scaled": ratio * (1 / ratio).median()}
    return {name: float((r - 1).abs().mean()) for name, r in errors.items()}


# ---------------------------------------------------------------------------- the command


def voxels(field, side):
    """A `Field` as sparse voxels: {"indices" [M, 3] int32, floor(xyz / side), ascending; means of
    their Gaussians "xyz" [M, 3], "rgb" [M, 3] in 0..1 and "features" [M, C] float16; their number
    "counts" [M]; "side"}."""
    xyz = field.gaussians.means[0].double()
    indices, voxel, counts = torch.unique(
        (xyz / side).floor().int(), dim=0, return_inverse=True, return_counts=True
    )
    means = {}
    for name, values in (("xyz", xyz), ("rgb", field.rgb()), ("features", field.features)):
        means[name] = torch.zeros(len(indices), values.shape[1], dtype=values.dtype)
        for columns in torch.arange(values.shape[1]).split(32):  # features may be mapped from disk
            part = values[:, columns].float() if name == "features" else values[:, columns]
            sums = part.new_zeros(len(indices), len(columns)).index_add_(0, voxel, part)
            means[name][:, columns] = (sums / counts[:, None]).to(values.dtype)
    means["xyz"] = means["xyz"].float()
    return {"indices": indices, **means, "counts": counts.int(), "side": torch.tensor(side)}


def read_poses(path):
    """Cameras of a transforms.json, without its photos: extrinsics [P, 4, 4], Ks [P, 3, 3] and
    sizes [(width, height)]. Distortion is ignored. ValueError: not such a file."""
    from train import SIDE

    with data.naming(path, "not poses in the layout of transforms.json"):
        capture = json.loads(Path(path).read_text())
        frames = [capture | frame for frame in capture["frames"]]
        names = [f"{path}: frame {i}" for i in range(len(frames))]
        extrinsics = data.rigid([frame["transform_matrix"] for frame in frames], names)
        extrinsics[:, :3, 1:3] *= -1  # OpenGL's y is up and its z backward
        sizes = [(int(frame["w"]), int(frame["h"])) for frame in frames]
        Ks = torch.eye(3).repeat(len(frames), 1, 1)
        for K, frame, size in zip(Ks, frames, sizes):
            data.lens_of(frame)  # raises for values that are no numbers
            K[0, 0], K[1, 1], K[0, 2], K[1, 2] = map(float, data.pinhole(frame, *size))
        if not frames:
            raise ValueError("it has no frames")
        if not all(1 <= side <= SIDE for size in sizes for side in size):
            raise ValueError(f"w and h must be 1 to {SIDE}")
    return torch.from_numpy(extrinsics).float(), Ks, sizes


def along(extrinsics, count):
    """Cameras [count, 4, 4] interpolated along [V, 4, 4], from the first to the last."""
    at = torch.linspace(0, len(extrinsics) - 1, count)
    low = at.floor().long().clamp(max=max(0, len(extrinsics) - 2))
    high = (low + 1).clamp(max=len(extrinsics) - 1)
    E = torch.lerp(extrinsics[low], extrinsics[high], (at - low)[:, None, None])
    U, _, Vh = torch.linalg.svd(E[:, :3, :3])  # the nearest rotation
    E[:, :3, :3] = U @ Vh
    return E


def load_capture(settings):
    """The views of a folder's first scene, or of a room without a folder, for `reconstruct`; its
    name; the photos' names. By default photos have about 224 x 224 pixels in their own shape."""
    if settings["folder"]:
        scenes = data.open_scenes(settings["folder"], settings["split"])
        if len(scenes) > 1:
            others = f"{len(scenes)} scenes; this is {scenes[0].name}, --split FILE chooses another"
            warnings.warn(f"{settings['folder']}: {others}")
        scene = scenes[0]
        if len(scene) < 2:
            raise ValueError(f"{scene.path}: {len(scene)} photo, where at least 2 are needed")
        photo = data.open_photo(scene.shots[0])
        shape, frames, numbers = photo.height / photo.width, range(len(scene)), scene.numbers
        photos, points = [Path(shot.photo).name for shot in scene.shots], scene.point_depths()
    else:
        scene, shape, points = data.Rooms("val")[0], 1.0, None
        frames = numbers = range(0, 120, 8)
        photos = [f"frame {i}" for i in frames]
    usual = 224 * math.sqrt(shape), 224 / math.sqrt(shape)
    H, W = (settings[k] or 16 * max(1, round(n / 16)) for k, n in zip(("height", "width"), usual))
    frames = [scene.frame(i, H, W) for i in frames]
    views = {k: torch.stack([frame[k] for frame in frames]) for k in frames[0]}
    views["numbers"] = torch.as_tensor(numbers)
    if points and all((depths > 0).any() for depths in points):
        ranges = [np.percentile(d[d > 0], (1, 99)) * (0.8, 1.25) for d in points]
        views["ranges"] = torch.tensor(np.array(ranges)).float()
    return views, scene.name, photos


def draw(field, views, folder, poses, warning):
    """Write sheet.png, orbit.gif and the views of --render's cameras."""
    from PIL import Image

    from train import depth_colours, pca_pictures, replace_file, to_image, write_sheet

    samples = field.features[:: max(1, len(field.features) // 20_000)].float()
    (V, _, H, W), E, Ks = views["images"].shape, views["extrinsics"], views["Ks"]

    def panels(extrinsics, K, width, height):
        seen = {k: v.cpu() for k, v in field.render(extrinsics, K, width, height).items()}
        features = seen["features"].permute(2, 0, 1)
        known = seen["alpha"] > 0.5
        features = pca_pictures(samples, [features], (height, width))[0] * known[..., None]
        drawn = {"rendering": seen["photo"].permute(1, 2, 0), "features": features}
        return drawn | {"depth": depth_colours(seen["depth"], known)}, seen["depth"] * known

    i = int(field.frames.bincount(minlength=V).argmax())
    photo = {"photo": views["images"][i].permute(1, 2, 0)}
    write_sheet(folder / "sheet.png", photo | panels(E[i], Ks[i], W, H)[0], warning)
    orbit = [field.render(e, Ks[0], W, H, features=False)["photo"] for e in along(E, 13)]
    orbit = [to_image(image.permute(1, 2, 0)) for image in orbit]
    orbit += orbit[-2:0:-1]  # there and back
    options = dict(format="GIF", save_all=True, append_images=orbit[1:], duration=80, loop=0)
    replace_file(folder / "orbit.gif", lambda path: orbit[0].save(path, **options))
    for n, (extrinsics, K, size) in enumerate(zip(*poses)):
        drawn, depth = panels(extrinsics, K, *size)
        images = {"photo": to_image(drawn["rendering"]), "features": to_image(drawn["features"])}
        depth = (1000 * depth).clamp(0, 65535).numpy().astype(np.uint16)
        images["depth"] = Image.fromarray(depth)
        for name, image in images.items():
            replace_file(folder / f"{n:04d}_{name}.png", lambda path: image.save(path, "PNG"))


def parse_settings(arguments=None):
    """The command line as {setting: value}."""
    from train import SIDE, TEACHERS, VIEWS, Setting, add_settings, check_settings

    rows = {
        "features": Setting("dinov2_vits14", "dinov2_vits14", f"{TEACHERS}, or a file of one"),
        "geometry": Setting(None, None, "depth maps, the shipped reconstructor, or a file; default:"
                            " depth where all photos have it"),
        "average": Setting(True, True, "features over all photos; not where they fill a GiB"),
        "optimise": Setting(0, 0, "steps that fit the features to all photos: minutes", 0),
        "optimise_geometry": Setting(False, False, "and the Gaussians with them"),
        "voxel": Setting(0.0, 0.0, "side of the voxels of voxels.npz, in the cameras' unit", 0),
        "render": Setting(None, None, "transforms.json of cameras to draw"),
        "split": VIEWS["split"], "name": VIEWS["name"],
        "height": Setting(0, 0, "of the images, pixels; default: near 224 x 224 in their shape", 0,
                          SIDE),
        "width": Setting(0, 0, "likewise", 0, SIDE),
    }  # fmt: skip
    description = "A capture as Gaussians that carry features: scene.ply, points.npz and pictures."
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("folder", nargs="?", help="of photos (README); default: a procedural room")
    add_settings(parser, rows)
    settings = {name: row.demo for name, row in rows.items()} | vars(parser.parse_args(arguments))
    check_settings(rows, settings)
    if settings["optimise_geometry"] and not settings["optimise"]:
        raise SystemExit("--optimise-geometry goes with --optimise STEPS")
    return settings


def load_networks(settings, views):
    """The teacher, a warning about it or None, and the geometry. Sets settings to those used."""
    from evaluate import load_file
    from train import VIEWS, load_teacher

    if Path(settings["features"]).is_file():
        model = load_file(settings["features"])[0]
        vit, warning = model.vits[0], model.warning
    else:
        asked = dict(teacher=settings["features"], teacher_weights=None, seed=0, data=None)
        vit, warning = load_teacher(asked)
        settings["features"] = asked["teacher"]
    settings["geometry"] = settings["geometry"] or ("depth" if "depths" in views else "shipped")
    if settings["geometry"] != "depth":
        planes = VIEWS["near"].demo, VIEWS["far"].demo  # baselines; views may have "ranges"
        geometry = FeedForward(load_reconstructor(settings["geometry"]).to(DEVICE), *planes)
    elif "depths" in views:
        geometry = SensorDepth()
    else:
        lack = "not all photos have depth maps; with --geometry shipped photos suffice"
        raise ValueError(f"{settings['folder']}: {lack}")
    return vit.to(DEVICE), warning, geometry


def run(settings):
    """Reconstruct a capture and write its folder in runs/."""
    from evaluate import counted
    from train import banner, free_folder, replace_file

    started = time.monotonic()
    poses = read_poses(settings["render"]) if settings["render"] else ()
    views, name, photos = load_capture(settings)
    vit, warning, geometry = load_networks(settings, views)
    folder = free_folder(Path("runs"), "field")
    if settings["name"] and (folder := Path("runs") / settings["name"]).exists():
        raise SystemExit(f"{folder}: there is something of that name")
    V, _, H, W = views["images"].shape
    used = f"features {settings['features']}, geometry {settings['geometry']}"
    print(f"{folder}: {name}, {V} photos of {H} x {W}, {used}", flush=True)
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    meta = dict(teacher=settings["features"], geometry=settings["geometry"], warning=warning,
                commit=commit, settings=settings, photos=photos,
                extrinsics=views["extrinsics"].tolist(), Ks=views["Ks"].tolist())  # fmt: skip
    folder.mkdir(parents=True)
    try:
        field = reconstruct(views, geometry, vit, folder=folder, meta=meta, counted=counted)
        size = field.features.numel()
        if settings["average"] and 4 * size > 2**30:
            print(f"Features take {4 * size / 2**30:.1f} GiB in memory: not averaged over photos")
        elif settings["average"]:
            field = averaged(field, views, vit, counted=counted)
        if settings["optimise"]:
            fit = settings["optimise"], settings["optimise_geometry"]
            field = optimise(field, views, vit, *fit, counted=counted)
            print("optimised: loss {:.3f} at first, {:.3f} at last".format(*field.meta["loss"]))
    except BaseException:
        folder.rmdir()
        raise
    field.save(folder)
    if settings["voxel"]:
        arrays = voxels(field, settings["voxel"])
        replace_file(folder / "voxels.npz", lambda path: save_npz(path, arrays))
    draw(field, views, folder, poses, warning)
    print(f"{len(field.frames):,} Gaussians of {V * H * W:,} pixels, {vit.embed_dim} channels")
    print_psnr(field, views)
    if warning:
        banner(warning)
    written = " ".join(sorted(path.name for path in folder.iterdir()))
    print(f"Written to {folder}/ in {time.monotonic() - started:.0f} s: {written}")


def print_psnr(field, views):
    """Print how well up to eight of the photos are rendered."""
    (V, _, H, W), psnr, shares = views["images"].shape, [], []
    for i in range(0, V, -(-V // 8)):
        shown = field.render(views["extrinsics"][i], views["Ks"][i], W, H, features=False)
        photo, seen = shown["photo"].cpu(), shown["alpha"].cpu() > 0.5
        mse = (photo - views["images"][i]).square()[:, seen].mean()
        psnr.append(float(-10 * mse.clamp(min=1e-10).log10()) if seen.any() else None)
        shares.append(float(seen.float().mean()))
    seen = f"{100 * mean(shares):.0f} % of the pixels show something"
    print(f"{len(psnr)} of the photos, rendered: {seen}, at {mean(psnr) or 0:.1f} dB")


def main(arguments=None):
    from train import plain_messages

    with plain_messages():
        run(parse_settings(arguments))


if __name__ == "__main__":
    import reconstruct as module  # train.py imports this file by its name: one module, not two

    module.main()
