"""The model of Splat and Distill (arXiv 2602.06032), parts first, the method last.

    load_vit             DINOv2's vision transformer, its weights and names
    add_lora, merge_lora the student's few trainable numbers, and back to a plain DINOv2
    DINOHead             features to prototype logits
    upsample_features    patch tokens to pixels without crossing segment borders
    blend_segments       features drawn towards their segment's mean
    SensorDepth          one 3D Gaussian per context pixel, from measured depth
    MVSplat              the same from photos alone
    SplatAndDistill      the method: one step, from a batch to its loss

Legend, used in trailing comments:  B scenes, V context views (one target view per scene), H x W pixels,
C channels, h = H // 14, w = W // 14 patches, N = V * H * W Gaussians, D tokens' width inside the transformer.
Cameras: OpenCV axes (x right, y down, z forward); extrinsics camera-to-world, viewmats world-to-camera, Ks in pixels.
"""

import copy
import functools
import http.client
import json
import math
import pickle
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from kernels import Mixture, rasterize

PATCH = 14
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# ----------------------------------------------------------------------------- DINOv2's vision transformer


class PatchEmbed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH)

    def forward(self, images):  # (B, 3, H, W) -> (B, h*w, D)
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B, tokens, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, tokens, D/heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """vitg14's MLP: gate and value from one matrix, two thirds as wide so that the size stays the same."""

    def __init__(self, dim):
        super().__init__()
        hidden = (4 * dim * 2 // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, heads, mlp):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """DINOv2's transformer with its parameter names (facebookresearch/dinov2, arXiv 2304.07193 and 2309.16588).

    Images [B, 3, H, W] are ImageNet-normalised, H and W any multiples of 14.
    """

    def __init__(self, dim, depth, heads, mlp=Mlp, registers=0):
        super().__init__()
        self.embed_dim, self.registers = dim, registers
        self.patch_embed = PatchEmbed(dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 37 * 37, dim))  # cls, then a 37 x 37 grid: 518 pixels
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # unused here; DINOv2's files have it
        self.blocks = nn.ModuleList([Block(dim, heads, mlp) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def _positions(self, h, w):
        """The position embedding for a grid of h x w. (1, 1 + h*w, D)"""
        if (h, w) == (37, 37):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2).float()
        if self.registers:
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
        else:  # the plain models were trained with this scale factor, a shift of up to a tenth of a cell
            scale = ((h + 0.1) / 37, (w + 0.1) / 37)
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)], dim=1)

    def _tokens(self, images):  # (B, 3, H, W) -> (B, 1 + registers + h*w, D)
        H, W = images.shape[-2:]
        if H % PATCH or W % PATCH or not H * W:
            raise ValueError(f"images must be multiples of {PATCH} pixels high and wide, not {H} x {W}")
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self._positions(H // PATCH, W // PATCH)
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        return x

    def forward_features(self, images):
        """Dict, as DINOv2's: x_norm_clstoken [B, D], x_norm_regtokens [B, registers, D], x_norm_patchtokens
        [B, h*w, D] after the final norm, x_prenorm [B, tokens, D] before it."""
        x = self._tokens(images)
        for block in self.blocks:
            x = block(x)
        normed = self.norm(x)
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1 : 1 + self.registers],
            "x_norm_patchtokens": normed[:, 1 + self.registers :],
            "x_prenorm": x,
        }

    def get_intermediate_layers(self, images, n=1, reshape=False, return_class_token=False, norm=True):
        """Tuple of patch tokens [B, h*w, D] ([B, D, h, w] if reshape), with their cls token [B, D] if
        return_class_token, of the last n blocks or of the blocks whose indices n lists, normed or not."""
        x, kept = self._tokens(images), []
        wanted = range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n
        if not all(0 <= i < len(self.blocks) for i in wanted):
            raise ValueError(f"n asks for blocks {list(wanted)}; there are {len(self.blocks)}, counted from 0")
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in wanted:
                kept.append(self.norm(x) if norm else x)
        patches, classes = [x[:, 1 + self.registers :] for x in kept], [x[:, 0] for x in kept]
        if reshape:
            patches = [p.transpose(1, 2).unflatten(2, (images.shape[-2] // PATCH, -1)) for p in patches]
        return tuple(zip(patches, classes)) if return_class_token else tuple(patches)

    def forward(self, images):  # as torch hub's DINOv2: the normed cls token (B, D)
        return self.forward_features(images)["x_norm_clstoken"]


ARCHITECTURES = {
    "dinov2_vits14": dict(dim=384, depth=12, heads=6),
    "dinov2_vitb14": dict(dim=768, depth=12, heads=12),
    "dinov2_vitl14": dict(dim=1024, depth=24, heads=16),
    "dinov2_vitg14": dict(dim=1536, depth=40, heads=24, mlp=SwiGLU),
}


class WeightsNotFound(ValueError):
    """DINOv2's weights are neither in torch hub's cache nor to be had from the network."""


def load_vit(name, weights=None, seed=0):
    """A DINOv2 ViT in eval mode.

    Args:
        name: dinov2_vits14, dinov2_vitb14, dinov2_vitl14 or dinov2_vitg14; with `_reg` the one with 4 registers.
        weights: a path to a .pth or .safetensors file with DINOv2's names (the public files, the released Splat and
            Distill weights, our students) or timm's (`vit_*_patch14_dinov2`, `vit_*_patch14_reg4_dinov2`); None for
            the public weights, from torch hub's cache or by download; "random" for a random initialisation.
        seed: of the random initialisation.

    Raises:
        ValueError: the name is unknown, or the file is missing, is no weights file, or does not fit the architecture.
        WeightsNotFound (a ValueError): weights is None, and they are neither in the cache nor to be downloaded.
    """
    base, registers = name.removesuffix("_reg"), name.endswith("_reg")
    if base not in ARCHITECTURES:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(ARCHITECTURES)}, each also with _reg")
    with torch.device("meta"):  # the weights come next; do not spend seconds on initialising what they replace
        vit = ViT(**ARCHITECTURES[base], registers=4 if registers else 0)
    if weights == "random":
        _initialise(vit.to_empty(device="cpu"), seed)
    else:
        state, source = (read_state(weights), weights) if weights is not None else _public_weights(base, registers)
        load_strictly(vit, _dinov2_names(state, vit), source)
    return vit.eval()


def architecture_of(state, source):
    """The name that `load_vit` knows a state dict's architecture by. ValueError: it is that of no DINOv2."""
    token = state.get("cls_token")
    dim = token.shape[-1] if token is not None and token.ndim else None
    for name, sizes in ARCHITECTURES.items():
        if sizes["dim"] == dim:
            return name + ("_reg" if {"register_tokens", "reg_token"} & state.keys() else "")
    raise ValueError(f"{source}: not a DINOv2: no cls_token of a known width")


def read_state(path):
    """A state dict, from a .safetensors file or one that torch.load(weights_only=True) reads."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # Lightning's wrapping
            state = state["state_dict"]
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a weights file that can be read ({_first_line(error)})") from None
    except Exception as error:  # pickle.UnpicklingError, whose text is long: torch explains how to run the pickle
        raise ValueError(f"{path}: holds more than weights, or is damaged ({type(error).__name__})") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(t) for k, t in state.items()):
        raise ValueError(f"{path}: not a state dict: expected parameter names with one tensor each")
    return state


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_strictly(module, state, source):
    """Give a module (possibly on the meta device) all its tensors, or raise ValueError and leave it as it was."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    for what, names in (("lacks", missing), ("has unknown", extra), ("has wrongly shaped", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{source}: does not fit this architecture: it {what} {', '.join(names[:3])}{more}")
    module.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)


def _public_weights(base, registers):
    """Torch hub's way: its cache, else the public address (which is where the cache's file names come from)."""
    url = f"https://dl.fbaipublicfiles.com/dinov2/{base}/{base}{'_reg4' if registers else ''}_pretrain.pth"
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if cached.is_file():
        return read_state(cached), cached
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # torch hub sets none, and a firewall that drops packets would hang us
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True), url
    except (OSError, RuntimeError, http.client.HTTPException, pickle.UnpicklingError) as error:
        cached.unlink(missing_ok=True)  # what a proxy or a broken line left is not to be found there next time
        raise WeightsNotFound(
            f"{base}'s weights are not in torch hub's cache ({cached}), nor to be downloaded ({_first_line(error)}): "
            f"fetch {url} on another machine and put it there, or pass the file itself as the weights"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _dinov2_names(state, vit):
    """Timm's names and layout turned into DINOv2's; DINOv2's own are left alone."""
    state = dict(state)
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
    if isinstance(vit.blocks[0].mlp, SwiGLU):
        state = {k.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): v for k, v in state.items()}
    position = state.get("pos_embed")
    if position is not None and position.ndim == 3 and position.shape[1] == 37 * 37:
        # timm adds cls's position to the cls token itself where there are registers
        state["pos_embed"] = F.pad(position, (0, 0, 1, 0))
    state.setdefault("mask_token", torch.zeros(1, vit.embed_dim))  # timm drops it
    return state


@torch.no_grad()
def _initialise(vit, seed):
    """Random weights that make lively features: unit variance through every layer, and positions and what attention
    mixes in the background, so that a token tells what it sees rather than where it is or what all see."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in vit.named_parameters():
        if p.ndim >= 2:
            std = 1 / math.sqrt(p[0].numel()) if "weight" in name else 0.02
            p.normal_(0, std, generator=generator)
        else:
            p.fill_(0.0 if name.endswith("bias") else 0.1 if name.endswith("gamma") else 1.0)


def normalise(images):
    """Images [..., 3, H, W] in 0..1 by ImageNet's mean and standard deviation."""
    mean, std = (images.new_tensor(c).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def patch_tokens(vit, images):
    """Images [..., 3, H, W] in 0..1 -> normed patch tokens [..., C, h, w], h = H // 14, w = W // 14.

    The image is resized to the multiples of 14 at or below its size.
    """
    H, W = images.shape[-2:]
    if H < PATCH or W < PATCH:
        raise ValueError(f"images of {H} x {W} pixels are smaller than one {PATCH} x {PATCH} patch")
    x = images.flatten(0, -4)  # (B*, 3, H, W)
    x = F.interpolate(x, (H // PATCH * PATCH, W // PATCH * PATCH), mode="bilinear", align_corners=False)
    tokens = vit.forward_features(normalise(x))["x_norm_patchtokens"]  # (B*, h*w, C)
    tokens = tokens.transpose(1, 2).unflatten(2, (H // PATCH, W // PATCH))
    return tokens.unflatten(0, images.shape[:-3])


# ----------------------------------------------------------------------------- LoRA


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / rank) B A dropout(x), with W and b frozen (Hu et al., arXiv 2106.09685)."""

    def __init__(self, linear, rank, alpha, dropout):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))  # zero: the start is the model as it was
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(self.dropout(x), self.A), self.B) * self.scale


class LoRAConv(LoRALinear):
    """The same around a convolution, as peft has it: A is a convolution of the same window to
    `rank` channels, B one of 1 x 1 after it."""

    def __init__(self, conv, rank, alpha, dropout):
        nn.Module.__init__(self)
        self.linear = conv.requires_grad_(False)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(torch.empty(rank, *conv.weight.shape[1:]))
        self.B = nn.Parameter(torch.zeros(conv.out_channels, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        down = F.conv2d(self.dropout(x), self.A, stride=self.linear.stride)
        return self.linear(x) + F.conv2d(down, self.B[:, :, None, None]) * self.scale


def add_lora(vit, rank=8, alpha=8, dropout=0.1):
    """Freeze a ViT and put LoRA on every block's qkv and proj (of attention) and on
    patch_embed.proj, in place, as the paper's code does: it adapts what ends in "qkv" or "proj".
    Returns the ViT."""
    vit.requires_grad_(False)
    vit.patch_embed.proj = LoRAConv(vit.patch_embed.proj, rank, alpha, dropout)
    for block in vit.blocks:
        block.attn.qkv = LoRALinear(block.attn.qkv, rank, alpha, dropout)
        block.attn.proj = LoRALinear(block.attn.proj, rank, alpha, dropout)
    return vit


@torch.no_grad()
def merge_lora(vit):
    """A plain DINOv2 state dict (its names, contiguous CPU copies) that computes what the ViT with LoRA does in eval
    mode."""
    state = {k: v.cpu() for k, v in vit.state_dict().items()}  # merged on the CPU, where a product is float32
    for name, module in vit.named_modules():
        if isinstance(module, LoRALinear):
            A, B = state.pop(f"{name}.A"), state.pop(f"{name}.B")
            weight = state.pop(f"{name}.linear.weight")
            state[f"{name}.weight"] = weight + module.scale * (B @ A.flatten(1)).view_as(weight)
            state[f"{name}.bias"] = state.pop(f"{name}.linear.bias")
    return {k: v.clone().contiguous() for k, v in state.items()}


# ----------------------------------------------------------------------------- the head


class DINOHead(nn.Module):
    """Features [..., in_dim] -> logits [..., out_dim] over prototypes: MLP, L2 normalisation, and the cosine with each
    prototype times its own scale weight_g (a weight-normalised linear without bias). DINO, arXiv 2104.14294."""

    def __init__(self, in_dim, out_dim, hidden_dim=2048, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )  # fmt: skip
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = nn.Module()  # DINO's names: last_layer.weight_g, last_layer.weight_v
        self.last_layer.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        # As nn.Linear starts, a norm of 0.58: the larger, the slower Adam turns it
        self.last_layer.weight_v = nn.Parameter(torch.empty(out_dim, bottleneck_dim))
        nn.init.kaiming_uniform_(self.last_layer.weight_v, a=math.sqrt(5))

    def forward(self, x):
        prototypes = self.last_layer.weight_g * F.normalize(self.last_layer.weight_v, dim=-1)
        return F.linear(F.normalize(self.mlp(x), dim=-1), prototypes)


# ----------------------------------------------------------------------------- segments


def upsample_weights(masks, h, w, strict=False):
    """Where each pixel's feature comes from on an h x w grid: four cells and their weights.

    Bilinear with aligned corners, but a cell counts only for the pixels of its own segment: the one that the mask
    shows at the cell's corner-aligned position. The weights of the cells that count are made to sum to one. Where none
    counts, plain bilinear; with strict=True, zero, as in the public code.

    Args:
        masks: [B, H, W] segment ids.
    Returns:
        indices [B, H, W, 4] into the B*h*w cells, and weights [B, H, W, 4] float32.
    """
    B, H, W = masks.shape
    device = masks.device
    rows = torch.linspace(0, H - 1, h, device=device).round().long()
    columns = torch.linspace(0, W - 1, w, device=device).round().long()
    cell_ids = masks[:, rows][:, :, columns].reshape(-1)  # (B*h*w,)

    def neighbours(size, pixels):  # along one axis: two cells [pixels, 2] and their weights
        x = torch.linspace(0, size - 1, pixels, device=device)
        low = x.floor().long().clamp(max=size - 1)
        return torch.stack([low, (low + 1).clamp(max=size - 1)], -1), torch.stack([1 - (x - low), x - low], -1)

    (y, wy), (x, wx) = neighbours(h, H), neighbours(w, W)
    cells = (y[:, None, :, None] * w + x[None, :, None, :]).reshape(H, W, 4)
    indices = cells + h * w * torch.arange(B, device=device).view(B, 1, 1, 1)  # (B, H, W, 4)
    plain = (wy[:, None, :, None] * wx[None, :, None, :]).reshape(H, W, 4)
    weights = plain * (cell_ids[indices] == masks[..., None])
    total = weights.sum(-1, keepdim=True)
    found = total > 1e-6  # a weight that is zero but for rounding is a cell that does not count
    return indices, torch.where(found, weights / total.clamp(min=1e-6), torch.zeros_like(plain) if strict else plain)


def upsample_features(features, masks, strict=False):
    """Features [B, C, h, w] at the size of masks [B, H, W], without mixing segments. Returns [B, C, H, W].

    Mask-aware bilinear upsampling (paper, section 3): see `upsample_weights`. Unlike the public code, a pixel none of
    whose four cells lies in its segment gets plain bilinear instead of 0; strict=True gives 0.
    The result is a channels-last view, [B, H, W, C] in memory: what lifting wants.
    """
    B, C, h, w = features.shape
    if masks.shape[0] != B or masks.ndim != 3:
        raise ValueError(
            f"masks must be [{B}, H, W] to go with features {list(features.shape)}, not {list(masks.shape)}"
        )
    indices, weights = upsample_weights(masks, h, w, strict)
    table = features.permute(0, 2, 3, 1).reshape(B * h * w, C)
    out = F.embedding_bag(  # a weighted sum of four rows per pixel, never holding the four
        indices.reshape(-1, 4), table, per_sample_weights=weights.reshape(-1, 4).to(table.dtype), mode="sum"
    )
    return out.view(*masks.shape, C).permute(0, 3, 1, 2)


def lift_features(tokens, masks, V, factored):
    """The features of the Gaussians of V views per scene, for `rasterize`: tokens [B*V, C, h, w] upsampled to masks
    [B*V, H, W], as [B, V*H*W, C] or, factored, as a Mixture of the tokens, which holds the same in far less memory and,
    without tensor cores, four times the work."""
    BV, C, h, w = tokens.shape
    if not factored:
        return upsample_features(tokens, masks).permute(0, 2, 3, 1).reshape(BV // V, -1, C)
    indices, weights = upsample_weights(masks, h, w)  # into all tokens; a Mixture counts each scene's from 0
    scenes = V * h * w * torch.arange(BV // V, device=tokens.device)[:, None, None]
    table = tokens.permute(0, 2, 3, 1).reshape(BV // V, V * h * w, C)
    return Mixture(table, indices.view(BV // V, -1, 4) - scenes, weights.view(BV // V, -1, 4))


def blend_segments(features, masks, alpha):
    """alpha * features + (1 - alpha) * the mean over each pixel's segment.

    Semantic blending (paper, section 3). features [B, C, H, W], masks [B, H, W] segment ids, alpha a number, or a
    tensor that broadcasts against [B, 1, 1, 1]. Returns [B, C, H, W].
    """
    B, C, H, W = features.shape
    if masks.shape != (B, H, W):
        raise ValueError(f"masks must be [{B}, {H}, {W}] to go with features, not {list(masks.shape)}")
    ids = masks - masks.min()  # from 0, whatever they are, and then apart for every scene
    ids = ids + (ids.max() + 1) * torch.arange(B, device=masks.device).view(B, 1, 1)
    _, segment, counts = torch.unique(ids.flatten(), return_inverse=True, return_counts=True)
    flat = features.permute(0, 2, 3, 1).reshape(-1, C)  # (B*H*W, C)
    sums = torch.zeros(len(counts), C, dtype=torch.float32, device=flat.device).index_add_(0, segment, flat.float())
    means = (sums / counts[:, None]).to(flat.dtype)[segment].view(B, H, W, C).permute(0, 3, 1, 2)
    return torch.lerp(means, features, alpha)


# ----------------------------------------------------------------------------- geometry


class Gaussians(NamedTuple):
    """What any reconstructor returns: N = V*H*W Gaussians, in view-row-column order of the context pixels."""

    means: torch.Tensor  # [B, N, 3] world
    covars: torch.Tensor  # [B, N, 3, 3] world
    opacities: torch.Tensor  # [B, N] 0..1
    harmonics: torch.Tensor  # [B, N, 3, (degree + 1)^2] colours as spherical harmonics: see `render`


SH_C0 = 0.5 / math.sqrt(math.pi)  # the harmonic of degree 0
NEAR_PLANE = 1e-6  # of the rasteriser: a capture's unit may be anything, so only what is at the camera is cut off


def sh_basis(degree, directions):
    """3D Gaussian Splatting's spherical harmonics up to a degree, at unit directions [..., 3]. [..., (degree + 1)^2]"""
    bases = []
    for n in range(degree + 1):
        signs = (-1.0) ** torch.arange(-n, n + 1, device=directions.device).abs()
        scale = math.sqrt((2 * n + 1) / (4 * math.pi))
        bases.append(real_harmonics(n, directions[..., [1, 2, 0]]) * signs * scale)
    return torch.cat(bases, -1)


def render(gaussians, extrinsics, Ks, width, height):
    """Photo [B, 3, H, W], depth [B, H, W] and alpha [B, H, W] of Gaussians with harmonics, one camera per scene.

    Extrinsics [B, 4, 4] camera-to-world, Ks [B, 3, 3] in pixels. Colour is 0.5 + harmonics * basis(direction from the
    camera), no less than 0, on black. Degree 4 is seen by no viewer, nor by MVSplat's own renderer, nor here.
    Depth is along z, the mean over what is seen; 0 where nothing is.
    """
    means, covars, opacities, harmonics = gaussians
    directions = F.normalize(means - extrinsics[:, None, :3, 3], dim=-1)
    basis = sh_basis(min(3, math.isqrt(harmonics.shape[-1]) - 1), directions)[:, :, None]  # (B, N, 1, up to 16)
    colours = (harmonics[..., : basis.shape[-1]] * basis).sum(-1) + 0.5  # (B, N, 3)
    viewmats = torch.linalg.inv(extrinsics)
    z = (means * viewmats[:, None, 2, :3]).sum(-1, keepdim=True) + viewmats[:, 2, 3, None, None]  # (B, N, 1)
    features = torch.cat([colours.clamp(min=0), z], -1)
    out, alphas = rasterize(
        means, covars, opacities, features, viewmats[:, None], Ks[:, None], width, height,
        near_plane=NEAR_PLANE, precision="ieee",
    )  # fmt: skip
    photo, depth = out[:, 0].permute(0, 3, 1, 2).split([3, 1], 1)
    return photo, depth[:, 0] / alphas[:, 0].clamp(min=1e-6), alphas[:, 0]


def quaternions(R):
    """Rotations [..., 3, 3] as unit quaternions w, x, y, z [..., 4]."""
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in R.unbind(-2))
    rows = [  # row k is q times 4 q_k: the longest is the one that rounding hurts least
        [1 + a + e + i, h - f, c - g, d - b],
        [h - f, 1 + a - e - i, b + d, c + g],
        [c - g, b + d, 1 - a + e - i, f + h],
        [d - b, c + g, f + h, 1 - a - e + i],
    ]
    rows = torch.stack([torch.stack(row, -1) for row in rows], -2)  # (..., 4, 4)
    longest = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*R.shape[:-2], 1, 4)
    return F.normalize(rows.gather(-2, longest)[..., 0, :], dim=-1)


@torch.no_grad()
def save_ply(path, gaussians):
    """Write the Gaussians of one scene (B = 1) as the .ply of 3D Gaussian Splatting, which its viewers open.

    Per Gaussian, float32: x y z, a normal of zeros, f_dc and f_rest (harmonics of degree 0, and of degrees 1 to 3 with
    the colour outermost), opacity before its sigmoid, the logarithms of three standard deviations along the
    covariance's axes, and those axes as a quaternion w x y z. Gaussians of opacity below 1/255 are left out.

    Raises ValueError: there is more than one scene.
    """
    if len(gaussians.means) != 1:
        raise ValueError(f"{path}: a .ply holds one scene, not {len(gaussians.means)}")
    means, covars, opacities, harmonics = (t[0][gaussians.opacities[0] >= 1 / 255].cpu().float() for t in gaussians)
    variances, axes = torch.linalg.eigh(covars)
    axes = axes * torch.linalg.det(axes).sign()[:, None, None]  # no reflection, which no quaternion turns into
    harmonics = F.pad(harmonics, (0, max(0, 16 - harmonics.shape[-1])))[..., :16]
    columns = {
        "x y z": means,
        "nx ny nz": torch.zeros_like(means),
        "f_dc_0 f_dc_1 f_dc_2": harmonics[..., 0],
        " ".join(f"f_rest_{i}" for i in range(45)): harmonics[..., 1:].flatten(1),
        "opacity": torch.logit(opacities, eps=1e-4)[:, None],
        "scale_0 scale_1 scale_2": 0.5 * variances.clamp(min=1e-20).log(),
        "rot_0 rot_1 rot_2 rot_3": quaternions(axes),
    }
    properties = "".join(f"property float {name}\n" for name in " ".join(columns).split())
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(means)}\n{properties}end_header\n"
    with open(path, "wb") as file:
        file.write(header.encode("ascii"))
        file.write(torch.cat(list(columns.values()), 1).numpy().astype("<f4").tobytes())


def unproject(depths, Ks, extrinsics):
    """Depths [..., H, W] (along z), Ks [..., 3, 3] and extrinsics [..., 4, 4] -> world points [..., H, W, 3]."""
    H, W = depths.shape[-2:]
    x = torch.arange(W, device=depths.device) + 0.5
    y = torch.arange(H, device=depths.device) + 0.5
    fx, fy, cx, cy = (Ks[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    rays = [(x - cx) / fx * torch.ones_like(depths), (y[:, None] - cy) / fy * torch.ones_like(depths)]
    points = torch.stack([*rays, torch.ones_like(depths)], -1) * depths[..., None]
    R, t = extrinsics[..., None, None, :3, :3], extrinsics[..., None, None, :3, 3]
    # Not a matmul: on a GPU that may be TF32 or bfloat16, and a thousandth of a position is a pixel
    return (R * points[..., None, :]).sum(-1) + t


class SensorDepth:
    """Gaussians from measured depth: one per pixel, at its point, round, half a pixel's footprint wide (one standard
    deviation: half of depth / focal length), of the pixel's colour, opaque; where depth is 0 (unknown), opacity 0.

    Call it with context views {"images" [B, V, 3, H, W], "depths" [B, V, H, W], "Ks" [B, V, 3, 3], "extrinsics"
    [B, V, 4, 4]}.
    """

    def __call__(self, context):
        if "depths" not in context:
            raise ValueError("geometry from sensor depth needs data with depth, and this has none")
        depths, Ks = context["depths"], context["Ks"]
        known = depths > 0
        z = torch.where(known, depths, 1.0)
        means = unproject(z, Ks, context["extrinsics"])
        sigmas = 0.5 * z / (0.5 * (Ks[..., 0, 0] + Ks[..., 1, 1]))[..., None, None]  # (B, V, H, W)
        covars = torch.eye(3, device=z.device) * (sigmas**2)[..., None, None]
        harmonics = (context["images"].movedim(2, -1).flatten(1, 3)[..., None] - 0.5) / SH_C0  # (B, N, 3, 1)
        return Gaussians(means.flatten(1, 3), covars.flatten(1, 3), known.float().flatten(1, 3), harmonics)


# ----------------------------------------------------------------------------- feed-forward geometry: MVSplat


@dataclass(frozen=True)
class ReconstructorConfig:
    """Sizes and conventions of an MVSplat; the defaults are the published re10k model's. `SMALL` is ours."""

    stem: tuple = (64, 96, 128)  # channels of the CNN's three stages
    dim: int = 128  # of the features that are matched
    blocks: int = 6  # of the transformer
    candidates: int = 128  # depths that the cost volume tries
    cost_dim: int = 128  # of the cost volume's U-Net
    cost_levels: int = 3  # attention at the last
    refine_dim: int = 32  # of the full-resolution U-Net
    refine_levels: int = 5  # attention at the last
    sh_degree: int = 4  # of the colours
    cosine: bool = False  # views are matched by their centred features' cosine, not their features' product
    ray_depth: bool = True  # a Gaussian's depth counts along its ray; False: along z, as the candidates' does
    unit_near: bool = False  # scenes are scaled to near = 1 and back, so that the capture's unit does not matter


SHIPPED = Path(__file__).parent / "weights" / "reconstructor.safetensors"
# The one that comes with this repository. Its sizes were chosen for a CPU: 0.5 s a scene at 224 x 224
SMALL = ReconstructorConfig(
    stem=(16, 24, 32), dim=32, blocks=2, candidates=48, cost_dim=32, cost_levels=3, refine_dim=16, refine_levels=4,
    sh_degree=0, cosine=True, ray_depth=False, unit_near=True,
)  # fmt: skip


def conv(inside, outside, size=3, stride=1, bias=True):
    return nn.Conv2d(inside, outside, size, stride, size // 2, bias=bias)


class ResidualBlock(nn.Module):
    """Two convolutions and a skip, instance-normalised."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = conv(inside, outside, stride=stride, bias=False)
        self.conv2 = conv(outside, outside, bias=False)
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(conv(inside, outside, 1, stride))

    def forward(self, x):
        y = F.relu(F.instance_norm(self.conv1(x)))
        y = F.relu(F.instance_norm(self.conv2(y)))
        if hasattr(self, "downsample"):
            x = F.instance_norm(self.downsample(x))
        return F.relu(x + y)


class Stem(nn.Module):
    """Photos to features at a quarter of the resolution."""

    def __init__(self, config):
        super().__init__()
        a, b, c = config.stem
        self.conv1 = conv(3, a, 7, 2, bias=False)
        self.layer1 = nn.Sequential(ResidualBlock(a, a, 1), ResidualBlock(a, a, 1))
        self.layer2 = nn.Sequential(ResidualBlock(a, b, 2), ResidualBlock(b, b, 1))
        self.layer3 = nn.Sequential(ResidualBlock(b, c, 1), ResidualBlock(c, c, 1))
        self.conv2 = conv(c, config.dim, 1)

    def forward(self, x):  # (B, 3, H, W) -> (B, dim, H/4, W/4)
        x = F.relu(F.instance_norm(self.conv1(x)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


def windows(x, back=None):
    """Features [..., h, w, D] as 2 x 2 windows of tokens [..., 4, h/2 * w/2, D]; with back=(h, w) the other way."""
    if back:
        h, w = back
        return x.unflatten(-2, (h // 2, w // 2)).unflatten(-4, (2, 2)).transpose(-4, -3).flatten(-3, -2).flatten(-4, -3)
    x = x.unflatten(-2, (2, -1)).unflatten(-4, (2, -1)).transpose(-4, -3)  # (..., 2, 2, h/2, w/2, D)
    return x.flatten(-3, -2).flatten(-4, -3)


def sine_positions(h, w, dim, device=None):
    """DETR's sine embedding of an h x w grid, coordinates from 1, normalised to 2 pi. (h, w, dim)"""
    frequency = 10000 ** (-2 * (torch.arange(dim // 2, device=device) // 2) / (dim // 2))

    def along(size):
        x = 2 * math.pi * torch.arange(1, size + 1, device=device) / (size + 1e-6)
        x = x[:, None] * frequency
        return torch.stack([x[:, 0::2].sin(), x[:, 1::2].cos()], -1).flatten(1)

    y, x = along(h)[:, None].expand(h, w, -1), along(w).expand(h, w, -1)
    return torch.cat([y, x], -1)


@functools.lru_cache(maxsize=1)  # 0.93 GiB at 576 x 880
def shift_mask(h, w, device=None):
    """Added to the attention of shifted windows: -100 between tokens that only the roll made neighbours.
    (4, tokens, tokens) on the device; made once per size."""

    def regions(size):  # the last half window came from the other side, and its window from its neighbour
        i = torch.arange(size, device=device)
        return (i >= size // 2).to(torch.uint8) + (i >= size - size // 4)

    with torch.inference_mode(False):  # a mask made there could not be trained with
        region = windows((3 * regions(h)[:, None] + regions(w))[..., None])[..., 0]  # (4, tokens)
        mask = torch.zeros(4, h * w // 4, h * w // 4, device=device)
        return mask.masked_fill_(region[:, :, None] != region[:, None, :], -100.0)


class AttentionLayer(nn.Module):
    """Single-head attention within windows; with `mlp`, from other views and followed by an MLP."""

    def __init__(self, dim, mlp):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.merge = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm1 = nn.LayerNorm(dim)
        if mlp:
            self.mlp = nn.Sequential(
                nn.Linear(2 * dim, 8 * dim, bias=False), nn.GELU(), nn.Linear(8 * dim, dim, bias=False)
            )
            self.norm2 = nn.LayerNorm(dim)

    def forward(self, x, keys, mask):
        """x [B, V, h, w, D], keys [B, V, S, h, w, D] of S views that each sees, mask for shifted windows or None."""
        h, w = x.shape[-3:-1]

        def roll(t, sign):
            return t if mask is None else torch.roll(t, (sign * (h // 4), sign * (w // 4)), (-3, -2))

        q = windows(roll(self.q_proj(x), -1))  # (B, V, 4, tokens, D)
        k, v = (windows(roll(p(keys), -1)).transpose(2, 3).flatten(3, 4) for p in (self.k_proj, self.v_proj))
        views = keys.shape[2]
        bias = None if mask is None else (mask.repeat(1, 1, views) if views > 1 else mask)[None]
        # Windows in the place of heads: only what is 4-dimensional gets the kernel that never holds tokens x tokens
        q4, k4, v4 = (t.flatten(0, 1) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q4, k4, v4, attn_mask=bias).view_as(q)
        message = self.norm1(self.merge(roll(windows(attended, (h, w)), 1)))
        if hasattr(self, "mlp"):
            message = self.norm2(self.mlp(torch.cat([x, message], -1)))
        return x + message


class MatchingTransformer(nn.Module):
    """Features of each view that know of the others: within 2 x 2 windows, shifted in every second block (Swin)."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(config.blocks):
            block = nn.Module()
            block.self_attn = AttentionLayer(config.dim, mlp=False)
            block.cross_attn_ffn = AttentionLayer(config.dim, mlp=True)
            self.layers.append(block)

    def forward(self, x, others):  # (B, V, D, h, w), (V, V-1)
        x = x.permute(0, 1, 3, 4, 2)
        h, w, dim = x.shape[-3:]
        x = x + sine_positions(h // 2, w // 2, dim, x.device).to(x).repeat(2, 2, 1)
        mask = shift_mask(h, w, x.device).to(x)
        for i, block in enumerate(self.layers):
            shifted = mask if i % 2 else None
            seen = x[:, others]  # (B, V, V-1, h, w, D), as they were before the block
            x = block.self_attn(x, x[:, :, None], shifted)
            x = block.cross_attn_ffn(x, seen, shifted)
        return x.permute(0, 1, 4, 2, 3)


def group_norm(channels):
    return nn.GroupNorm(8 if channels % 8 == 0 else 4, channels)


class UNetResidual(nn.Module):
    """Latent diffusion's residual block, each norm after its convolution."""

    def __init__(self, inside, outside):
        super().__init__()
        self.in_layers = nn.Sequential(conv(inside, outside), group_norm(outside), nn.SiLU())
        self.out_layers = nn.Sequential(conv(outside, outside), group_norm(outside), nn.SiLU())
        self.skip_connection = conv(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x, views):
        return self.skip_connection(x) + self.out_layers(self.in_layers(x))


class UNetAttention(nn.Module):
    """Attention over the pixels of all views of a scene together, heads of 32 channels."""

    def __init__(self, channels):
        super().__init__()
        self.heads = max(1, channels // 32)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        self.norm = group_norm(channels)

    def forward(self, x, views):  # (B*V, C, h, w)
        tokens = x.flatten(2).unflatten(0, (-1, views)).transpose(1, 2).flatten(2)  # (B, C, V*h*w)
        q, k, v = self.qkv(tokens).unflatten(1, (self.heads, 3, -1)).transpose(-1, -2).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)
        y = self.proj_out(y).unflatten(2, (views, -1)).transpose(1, 2).flatten(0, 1)  # (B*V, C, h*w)
        return x + self.norm(y).view_as(x)  # the norm is each view's own


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = conv(channels, channels, stride=2)

    def forward(self, x, views):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x, views):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNet(nn.Module):
    """Latent diffusion's U-Net without time, of one width: a residual block per level down and two per level up."""

    def __init__(self, channels, levels):
        super().__init__()
        c, last = channels, levels - 1
        self.input_blocks = nn.ModuleList([nn.ModuleList([conv(c, c)])])
        for level in range(levels):
            self.input_blocks.append(nn.ModuleList([UNetResidual(c, c)] + [UNetAttention(c)] * (level == last)))
            if level != last:
                self.input_blocks.append(nn.ModuleList([Down(c)]))
        self.middle_block = nn.ModuleList([UNetResidual(c, c), nn.Identity(), UNetResidual(c, c)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            for i in range(2):
                parts = (
                    [UNetResidual(2 * c, c)] + [UNetAttention(c)] * (level == last) + [Up(c)] * (i == 1 and level > 0)
                )
                self.output_blocks.append(nn.ModuleList(parts))
        self.out = nn.Sequential(conv(c, c), group_norm(c), nn.SiLU())

    def forward(self, x, views):
        kept = []
        for block in self.input_blocks:
            for part in block:
                x = part(x) if isinstance(part, nn.Conv2d) else part(x, views)
            kept.append(x)
        x = self.middle_block[2](self.middle_block[0](x, views), views)
        for block in self.output_blocks:
            x = torch.cat([x, kept.pop()], 1)
            for part in block:
                x = part(x, views)
        return self.out(x)


class DepthPredictor(nn.Module):
    """Matched features to depth, opacity and the raw numbers of a Gaussian per pixel."""

    def __init__(self, config):
        super().__init__()
        self.cosine = config.cosine
        c, r, d = config.cost_dim, config.refine_dim, config.dim
        n = config.candidates
        self.corr_refine_net = nn.ModuleList(
            [conv(n + d, c), nn.GroupNorm(8, c), nn.GELU(), UNet(c, config.cost_levels), conv(c, n)]
        )
        self.regressor_residual = conv(n + d, n, 1)
        self.depth_head_lowres = nn.Sequential(conv(n, 2 * n), nn.GELU(), conv(2 * n, n))
        self.upsampler = nn.Sequential(
            conv(2 * d, d), nn.Upsample(scale_factor=4, mode="bilinear", align_corners=True), nn.GELU()
        )
        self.proj_feature = conv(d, r)
        self.refine_unet = nn.ModuleList(
            [conv(3 + r + 2, r), nn.GroupNorm(4, r), nn.GELU(), UNet(r, config.refine_levels)]
        )
        raw = 2 + 3 + 4 + 3 * (config.sh_degree + 1) ** 2
        self.to_gaussians = nn.Sequential(conv(r + 3 + d, 2 * raw), nn.GELU(), conv(2 * raw, raw))
        self.to_disparity = nn.Sequential(conv(r, 2 * r), nn.GELU(), conv(2 * r, 2))

    def coarse(self, matched, intrinsics, extrinsics, near, far, others):
        """Each depth candidate's matching cost, refined, as a distribution over candidates: the mean of the inverse
        depth and the largest probability, both (B*V, 1, h, w)."""
        V, n = matched.shape[1], self.regressor_residual.out_channels
        low, high = 1 / far, 1 / near  # (B, V)
        inverse = low[..., None] + torch.linspace(0, 1, n, device=near.device) * (high - low)[..., None]  # (B, V, n)
        features = matched
        if self.cosine:
            features = matched - matched.mean((1, 3, 4), keepdim=True)
            features = F.normalize(features, dim=2) * math.sqrt(matched.shape[2])
        cost = cost_volume(features, intrinsics, extrinsics, 1 / inverse, others)  # (B, V, n, h, w)
        x = torch.cat([cost, matched], 2).flatten(0, 1)
        refined = x
        for part in self.corr_refine_net:
            refined = part(refined, V) if isinstance(part, UNet) else part(refined)
        pdf = self.depth_head_lowres(refined + self.regressor_residual(x)).softmax(1)  # (B*V, n, h, w)
        return (pdf * inverse.flatten(0, 1)[..., None, None]).sum(1, keepdim=True), pdf.amax(1, keepdim=True)

    def fine(self, images, matched, cnn, coarse, confidence, near, far):
        """A correction of the inverse depth at full resolution, and what else a Gaussian is made of: depths and
        opacities (B, V, H, W), raw numbers (B, V, 9 + 3 * (degree + 1)^2, H, W)."""
        B, V, _, H, W = images.shape
        coarse = F.interpolate(coarse, (H, W), mode="bilinear", align_corners=True)
        confidence = F.interpolate(confidence, (H, W), mode="nearest")
        photo = images.flatten(0, 1)
        features = self.upsampler(torch.cat([matched, cnn], 2).flatten(0, 1))
        x = torch.cat([photo, self.proj_feature(features), coarse, confidence], 1)
        for part in self.refine_unet:
            x = part(x, V) if isinstance(part, UNet) else part(x)
        delta, density = self.to_disparity(x).split(1, 1)
        bounds = (1 / t.flatten()[:, None, None, None] for t in (far, near))
        depths = 1 / torch.clamp(coarse + delta, *bounds)
        raw = self.to_gaussians(torch.cat([x, photo, features], 1))
        return (t.unflatten(0, (B, V)) for t in (depths[:, 0], density[:, 0].sigmoid(), raw))


def cost_volume(features, intrinsics, extrinsics, depths, others):
    """How well each depth candidate explains the other views.

    Features [B, V, D, h, w], intrinsics [B, V, 3, 3] normalised, extrinsics [B, V, 4, 4], depths [B, V, n] along z,
    others [V, V - 1] -> [B, V, n, h, w], the scaled dot product with what the other views show there, averaged.
    """
    B, V, D, h, w = features.shape
    K = intrinsics * features.new_tensor([w, h, 1])[:, None]
    y, x = torch.meshgrid(*(torch.arange(s, device=K.device) for s in (h, w)), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).flatten(1).to(features)  # (3, h*w): MVSplat has no half pixel here
    rays = torch.linalg.inv(K) @ pixels  # (B, V, 3, h*w)
    costs = []
    for candidates in depths.split(32, -1):  # at the paper's size all at once would be 4 GB
        cost, n = 0, candidates.shape[-1]
        for other in others.T:
            to_other = torch.linalg.inv(extrinsics[:, other]) @ extrinsics  # (B, V, 4, 4)
            R, t = to_other[..., :3, :3], to_other[..., :3, 3:]
            points = (R @ rays)[:, :, :, None] * candidates[:, :, None, :, None] + t[..., None]  # (B, V, 3, n, h*w)
            seen = (K[:, other] @ points.flatten(3)).unflatten(3, (n, h * w))
            xy = seen[:, :, :2] / seen[:, :, 2:].clamp(min=1e-3)
            grid = 2 * xy / features.new_tensor([w - 1, h - 1]).view(2, 1, 1) - 1  # (B, V, 2, n, h*w)
            warped = F.grid_sample(
                features[:, other].flatten(0, 1), grid.permute(0, 1, 3, 4, 2).flatten(0, 1), align_corners=True
            ).view(B, V, D, n, h, w)
            cost = cost + torch.einsum("bvdhw,bvdnhw->bvnhw", features, warped)
        costs.append(cost / (math.sqrt(D) * (V - 1)))
    return torch.cat(costs, 2)


def real_harmonics(degree, directions):
    """The real spherical harmonics of one degree, orders -degree..degree, at unit directions [..., 3], up to a factor
    that all of a degree share. In e3nn's axes: its (x, y, z) are the textbook's (y, z, x). [..., 2 * degree + 1]"""
    y, z, x = directions.unbind(-1)
    cosines, sines = [torch.ones_like(x)], [torch.zeros_like(x)]  # r^m cos(m phi), r^m sin(m phi), r^2 = x^2 + y^2
    for _ in range(degree):
        c, s = cosines[-1], sines[-1]
        cosines.append(c * x - s * y)
        sines.append(s * x + c * y)
    out = [None] * (2 * degree + 1)
    for m in range(degree + 1):  # the associated Legendre function of order m over r^m, by its recurrence in degree
        p, before = torch.full_like(z, math.prod(range(1, 2 * m, 2))), torch.zeros_like(z)
        for n in range(m + 1, degree + 1):
            p, before = ((2 * n - 1) * z * p - (n + m - 1) * before) / (n - m), p
        p = p * math.sqrt((2 if m else 1) * math.factorial(degree - m) / math.factorial(degree + m))
        out[degree - m], out[degree + m] = p * sines[m], p * cosines[m]
    return torch.stack(out, -1)


@functools.cache
def sphere_fit(degree, device):
    """Directions [64, 3] that determine a degree's functions, and the inverse of its harmonics."""
    r = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode(False):
        r = F.normalize(r, dim=-1)
        return r.to(device), torch.linalg.pinv(real_harmonics(degree, r)).to(device)


def rotate_harmonics(harmonics, R):
    """Coefficients [B, ..., (degree + 1)^2] of functions on the sphere, turned by rotations R [B, 3, 3].

    A degree's matrix D (Wigner's) is what takes its harmonics at directions r to those at R r, for enough r.
    """
    R, out = R.double(), []
    for degree in range(math.isqrt(harmonics.shape[-1])):
        r, inverse = sphere_fit(degree, R.device)
        Dt = inverse @ real_harmonics(degree, r @ R.mT)  # (B, k, k), transposed
        part = harmonics[..., degree**2 : (degree + 1) ** 2]
        out.append(torch.einsum("bji,b...j->b...i", Dt.to(part), part))
    return torch.cat(out, -1)


def to_gaussians(depths, opacities, raw, intrinsics, extrinsics, ray_depth=True):
    """Depths and opacities [B, V, H, W], raw numbers [B, V, 9 + 3 * (degree + 1)^2, H, W], cameras -> Gaussians."""
    B, V, H, W = depths.shape
    raw = raw.permute(0, 1, 3, 4, 2)
    offset, scale, quaternion, harmonics = raw.split([2, 3, 4, raw.shape[-1] - 9], -1)
    size = raw.new_tensor([1 / W, 1 / H])
    sides = (torch.arange(s, device=raw.device) + 0.5 for s in (H, W))
    y, x = torch.meshgrid(*sides, indexing="ij")
    centre = torch.stack([x, y], -1).to(raw) * size
    xy = centre + (offset.sigmoid() - 0.5) * size
    inverse = torch.linalg.inv(intrinsics)[:, :, None, None]
    rays = (inverse @ F.pad(xy, (0, 1), value=1.0)[..., None])[..., 0]  # z = 1
    if ray_depth:
        rays = F.normalize(rays, dim=-1)
    R, t = extrinsics[:, :, None, None, :3, :3], extrinsics[:, :, None, None, :3, 3]
    means = (R @ (rays * depths[..., None])[..., None])[..., 0] + t
    pixel = 0.1 * (torch.linalg.inv(intrinsics[..., :2, :2]) @ size).sum(-1)  # (B, V)
    sigmas = (0.5 + 14.5 * scale.sigmoid()) * depths[..., None] * pixel[..., None, None, None]
    i, j, k, r = F.normalize(quaternion, dim=-1, eps=1e-8).unbind(-1)
    rotation = torch.stack(
        [
            1 - 2 * (j * j + k * k),
            2 * (i * j - k * r),
            2 * (i * k + j * r),
            2 * (i * j + k * r),
            1 - 2 * (i * i + k * k),
            2 * (j * k - i * r),
            2 * (i * k - j * r),
            2 * (j * k + i * r),
            1 - 2 * (i * i + j * j),
        ],
        -1,
    ).unflatten(-1, (3, 3))
    L = R @ rotation * sigmas[..., None, :]
    covars = L @ L.mT
    harmonics = harmonics.unflatten(-1, (3, -1))  # (B, V, H, W, 3, (degree + 1)^2)
    degrees = torch.arange(harmonics.shape[-1], device=raw.device).sqrt().floor()
    harmonics = (harmonics * torch.where(degrees > 0, 0.1 * 0.25**degrees, 1.0).to(raw)).flatten(0, 1)
    harmonics = rotate_harmonics(harmonics, extrinsics[..., :3, :3].flatten(0, 1)).unflatten(0, (B, V))
    return Gaussians(means.flatten(1, 3), covars.flatten(1, 3), opacities.flatten(1), harmonics.flatten(1, 3))


class MVSplat(nn.Module):
    """Photos of a scene to one Gaussian per pixel, in one pass (Chen et al., ECCV 2024, arXiv 2403.14627).

    Parameters have the public code's names. `load_reconstructor` loads one.
    """

    def __init__(self, config=ReconstructorConfig()):
        super().__init__()
        self.config = config
        self.backbone = nn.Module()
        self.backbone.backbone = Stem(config)
        self.backbone.transformer = MatchingTransformer(config)
        self.depth_predictor = DepthPredictor(config)

    def forward(self, images, extrinsics, intrinsics, near, far, coarse=False):
        """Images [B, V, 3, H, W] in 0..1, extrinsics [B, V, 4, 4] camera-to-world, intrinsics [B, V, 3, 3] normalised
        by width and height, near and far [B, V] in the cameras' unit -> Gaussians, with the
        config's (sh_degree + 1)^2 harmonics.
        With coarse=True it stops where views are matched: depths [B, V, H/4, W/4].

        Raises ValueError: V < 2, H or W no multiple of 16, not 0 < near < far, or a camera that is not rigid.
        """
        B, V, _, H, W = images.shape
        R, t = extrinsics[..., :3, :3], extrinsics[..., :3, 3:]
        if V < 2:
            raise ValueError(f"reconstruction compares views and needs at least 2, not {V}")
        if H % 16 or W % 16:
            fits = " x ".join(str(max(1, round(size / 16)) * 16) for size in (H, W))
            raise ValueError(f"images must be multiples of 16 pixels high and wide, such as {fits}, not {H} x {W}")
        if not ((0 < near) & (near < far)).all():
            raise ValueError("0 < near < far must hold for every view")
        last = extrinsics.new_tensor([0, 0, 0, 1])
        straight = (R @ R.mT - torch.eye(3, device=R.device)).abs().max() <= 1e-3 and (torch.linalg.det(R) > 0).all()
        if not straight or (extrinsics[..., 3, :] - last).abs().max() > 1e-3:
            raise ValueError(
                "extrinsics must be rigid: a rotation in the upper left 3 x 3, and 0 0 0 1 in the last row, of each"
            )
        others = torch.tensor([[u for u in range(V) if u != v] for v in range(V)], device=images.device)
        unit = near[:, :1] if self.config.unit_near else torch.ones_like(near[:, :1])  # (B, 1)
        extrinsics = torch.cat([torch.cat([R, t / unit[..., None, None]], -1), extrinsics[..., 3:, :]], -2)
        near, far = near / unit, far / unit
        cnn = self.backbone.backbone(normalise(images).flatten(0, 1)).unflatten(0, (B, V))
        matched = self.backbone.transformer(cnn, others)
        inverse, confidence = self.depth_predictor.coarse(matched, intrinsics, extrinsics, near, far, others)
        if coarse:
            return unit[..., None, None] / inverse[:, 0].unflatten(0, (B, V))
        depths, opacities, raw = self.depth_predictor.fine(images, matched, cnn, inverse, confidence, near, far)
        gaussians = to_gaussians(depths, opacities, raw, intrinsics, extrinsics, self.config.ray_depth)
        return gaussians._replace(
            means=gaussians.means * unit[..., None], covars=gaussians.covars * unit[..., None, None] ** 2
        )


@torch.no_grad()
def new_reconstructor(config=SMALL):
    """An MVSplat to train, random but where something is known without learning. It starts as plain stereo: views are
    matched by the CNN's features, depth is where 5 x 5 of them match best, and a Gaussian is opaque, half a pixel wide
    and of its pixel's colour. (MVSplat itself starts from the weights of a trained matching network.)"""
    reconstructor = MVSplat(config)
    stem, predictor = reconstructor.backbone.backbone, reconstructor.depth_predictor
    stem.conv2.weight.mul_(4.0)  # matching must not drown in the position embedding
    stem.conv2.bias.zero_()
    for block in reconstructor.backbone.transformer.layers:  # residual branches start at nothing
        block.self_attn.norm1.weight.zero_()
        block.cross_attn_ffn.norm2.weight.zero_()
    residual, (first, _, second) = predictor.regressor_residual, predictor.depth_head_lowres
    n = config.candidates
    for layer in (residual, first, second, predictor.corr_refine_net[-1]):
        layer.weight.mul_(0.1)
        layer.bias.zero_()
    candidates = torch.arange(n)
    residual.weight[candidates, candidates] += 4.0
    # gelu(x) - gelu(-x) = x: the head passes the matching cost on, twice averaged over 3 x 3 pixels
    for layer, ins, outs in ((first, (0, 0), (0, n)), (second, (0, n), (0, 0))):
        for sign, i, o in zip((1, -1), ins, outs):
            layer.weight[o + candidates, i + candidates] += sign / 9
    density = predictor.to_disparity[-1]
    density.weight.zero_()
    density.bias.copy_(torch.tensor([0.0, 2.0]))  # no correction of the depth; opacity 0.88
    inside, _, outside = predictor.to_gaussians
    outside.weight.mul_(0.1)
    outside.bias.zero_()[2:5] = -2.0  # sigma is 0.45 pixels
    for c in range(3):  # degree 0 of the harmonics becomes (photo - 0.5) / SH_C0, by the same trick
        row = 9 + c * (config.sh_degree + 1) ** 2
        inside.weight[[2 * c, 2 * c + 1]] = 0.0
        inside.weight[2 * c, config.refine_dim + c, 1, 1] = 1.0
        inside.weight[2 * c + 1, config.refine_dim + c, 1, 1] = -1.0
        inside.bias[[2 * c, 2 * c + 1]] = 0.0
        outside.weight[row] = 0.0
        outside.weight[row, 2 * c, 1, 1] = 1 / SH_C0
        outside.weight[row, 2 * c + 1, 1, 1] = -1 / SH_C0
        outside.bias[row] = -0.5 / SH_C0
    return reconstructor


def load_reconstructor(path=None):
    """An MVSplat in eval mode, frozen: None for the one in weights/, or a path to the published `re10k.ckpt`, or to a
    safetensors file whose metadata has a "config": JSON of `ReconstructorConfig`'s fields.

    Raises ValueError: the file is missing, is no such file, or does not fit: which tensors, and nothing is half loaded.
    """
    path = Path(path or SHIPPED)
    state, config = read_state(path), ReconstructorConfig()
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get("config")
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text or "").items()}
            config = ReconstructorConfig(**fields)
        with torch.device("meta"):
            reconstructor = MVSplat(config)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: no reconstructor's configuration in its metadata ({_first_line(error)})") from None
    state = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")} or state
    load_strictly(reconstructor, state, path)
    return reconstructor.eval().requires_grad_(False)


class FeedForward(nn.Module):
    """Gaussians from photos alone, behind the same interface as `SensorDepth`: images [B, V, 3, H, W] in 0..1, Ks in
    pixels, extrinsics.

    near and far are in baselines, the distance between the first and the last camera of a scene: photos alone tell no
    other unit. The network sees scenes scaled to a baseline of 1, and its Gaussians are scaled back.
    """

    def __init__(self, reconstructor, near, far):
        super().__init__()
        if not 0 < near < far:
            raise ValueError(f"0 < near < far must hold, not near {near} and far {far}")
        self.reconstructor, self.near, self.far = reconstructor, near, far

    def forward(self, context, coarse=False):
        images, extrinsics = context["images"], context["extrinsics"].clone()
        intrinsics = context["Ks"] / images.new_tensor([images.shape[-1], images.shape[-2], 1])[:, None]
        baseline = (extrinsics[:, 0, :3, 3] - extrinsics[:, -1, :3, 3]).norm(dim=-1)
        # A camera that only turned sees no depth: its Gaussians then land before NEAR_PLANE, as holes
        baseline = baseline.clamp(min=1e-9)[:, None, None]  # (B, 1, 1)
        extrinsics[..., :3, 3] /= baseline
        near, far = (images.new_full(images.shape[:2], d) for d in (self.near, self.far))
        out = self.reconstructor(images, extrinsics, intrinsics, near, far, coarse)
        if coarse:
            return out * baseline[..., None]
        return out._replace(means=out.means * baseline, covars=out.covars * baseline[..., None] ** 2)


class Reconstruction(nn.Module):
    """One training step of a reconstructor (MVSplat, section 3.3): lift the context views, render the target view.

    The loss is the mean squared error of the rendered photo, plus depth_weight times the mean absolute error of the
    logarithm of depth, of every context pixel whose depth is known (MVSplat has no depth term, and LPIPS instead).
    """

    def __init__(self, reconstructor, near, far, depth_weight):
        super().__init__()
        self.reconstruct = FeedForward(reconstructor, near, far)
        self.depth_weight = depth_weight

    def forward(self, batch, coarse=False):
        """A batch as `SplatAndDistill`'s. Returns the loss, metrics {name: scalar tensor} and what to draw: "photo"
        [B, 3, H, W], "depth" [B, H, W], "alphas" [B, H, W] and "gaussians".

        With coarse=True the loss is that of the depth where views are matched, at a quarter of the size: nothing is
        rendered, nothing to draw. It needs depth.
        """
        context, target = batch["context"], batch["target"]
        B, V, _, H, W = context["images"].shape
        if coarse:
            known = F.interpolate(context["depths"], (H // 4, W // 4), mode="nearest")
            error = log_depth_error(self.reconstruct(context, coarse=True), known)
            loss = self.depth_weight * error
            return loss, {"loss": loss.detach(), "log_depth": error.detach()}, {}
        gaussians = self.reconstruct(context)
        photo, depth, alphas = render(gaussians, target["extrinsics"], target["Ks"], W, H)
        loss = F.mse_loss(photo, target["images"])
        metrics = {"mse": loss.detach()}
        if "depths" in context:
            forwards = torch.linalg.inv(context["extrinsics"])[:, :, 2]  # (B, V, 4): world to depth along z
            points = F.pad(gaussians.means, (0, 1), value=1.0).view(B, V, H, W, 4)
            z = (points * forwards[:, :, None, None]).sum(-1)
            metrics["log_depth"] = error = log_depth_error(z, context["depths"])
            loss = loss + self.depth_weight * error
        drawn = dict(photo=photo, depth=depth, alphas=alphas, gaussians=gaussians)
        return loss, {"loss": loss.detach()} | {k: v.detach() for k, v in metrics.items()}, drawn


def log_depth_error(depths, truth):
    """Mean of |log(depths / truth)| where the truth is known, that is not 0."""
    known = truth > 0
    error = depths.clamp(min=1e-6).log() - truth.clamp(min=1e-6).log()
    return torch.where(known, error, 0.0).abs().sum() / known.sum().clamp(min=1)


# ----------------------------------------------------------------------------- the method


class SplatAndDistill(nn.Module):
    """One training step of Splat and Distill (arXiv 2602.06032, section 3).

    Args:
        vit: a DINOv2 (`load_vit`). It becomes the student, with LoRA; the teacher starts as a copy of the student.
        reconstruct: context views -> Gaussians (`SensorDepth`, `FeedForward`).
        prototypes, head_dim, bottleneck_dim: of the heads.
        lora_rank, lora_alpha, lora_dropout: of the student's LoRA.
        upsampling: "mask-aware", or "bilinear" across segments.
        blend: how much of its own a splatted feature keeps against its segment's mean; 1 is no blending.
        centring: momentum of the running mean that is taken off the teacher's logits (DINO); 1 keeps it at 0.
        teacher_temperature, student_temperature: that logits are divided by.
    """

    def __init__(
        self, vit, reconstruct, *, prototypes, head_dim, bottleneck_dim, lora_rank, lora_alpha, lora_dropout,
        upsampling, blend, centring, teacher_temperature, student_temperature,
    ):  # fmt: skip
        super().__init__()
        if upsampling not in ("mask-aware", "bilinear"):
            raise ValueError(f"upsampling is mask-aware or bilinear, not {upsampling!r}")
        self.reconstruct = reconstruct
        self.upsampling, self.blend, self.centring = upsampling, blend, centring
        self.teacher_temperature, self.student_temperature = teacher_temperature, student_temperature
        self.student = add_lora(vit, lora_rank, lora_alpha, lora_dropout)
        self.student_head = DINOHead(vit.embed_dim, prototypes, head_dim, bottleneck_dim)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.student_head).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(prototypes))  # of the teacher's logits

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()  # its LoRA has dropout too, and targets are not to be dropped
        self.teacher_head.eval()
        return self

    @torch.no_grad()
    def splat(self, context, target, has_masks):
        """Steps 1 to 7: the teacher's features of the context, seen from the target camera.

        Returns {"splatted" features [B, C, h, w], "holes" [B, h, w] bool, "rendered" features [B, C, H, W], "alphas"
        [B, H, W], "gaussians"}.
        """
        B, V, _, H, W = context["images"].shape
        # 1. Reconstruct: one Gaussian per context pixel
        with torch.autocast(context["images"].device.type, enabled=False):  # positions do not survive bfloat16
            gaussians = self.reconstruct(context)
            viewmats = torch.linalg.inv(target["extrinsics"])[:, None]
        # 2. Teacher features of the context views
        tokens = patch_tokens(self.teacher, context["images"]).flatten(0, 1)  # (B*V, C, h, w)
        if torch.is_autocast_enabled(tokens.device.type):  # the last norm gives float32: twice the memory to lift
            tokens = tokens.to(torch.get_autocast_dtype(tokens.device.type))
        # 3. and 4. Mask-aware upsampling to pixels, and lift: a pixel's feature is its Gaussian's
        masks = context["masks"].flatten(0, 1)
        if self.upsampling == "bilinear":
            masks = torch.zeros_like(masks)  # one segment
        features = lift_features(tokens, masks, V, factored=tokens.is_cuda)
        # 5. Splat into the target camera
        scene = gaussians.means, gaussians.covars, gaussians.opacities, features
        rendered, alphas = rasterize(*scene, viewmats, target["Ks"][:, None], W, H, near_plane=NEAR_PLANE)
        # (B, 1, H, W, C), (B, 1, H, W)
        rendered, alphas = rendered[:, 0].permute(0, 3, 1, 2), alphas[:, 0]
        # 6. Semantic blending, in the scenes that have segments
        if self.blend < 1 and has_masks.any():
            keep = torch.where(has_masks, self.blend, 1.0).to(rendered.dtype).view(B, 1, 1, 1)
            rendered = blend_segments(rendered, target["masks"], keep)
        # 7. Down to the student's grid, and which of its locations nothing was splatted to
        size = H // PATCH, W // PATCH
        splatted = F.interpolate(rendered, size, mode="bilinear", align_corners=False)
        holes = F.interpolate((alphas < 0.5).float()[:, None], size, mode="nearest")[:, 0] > 0.5
        return dict(splatted=splatted, holes=holes, rendered=rendered, alphas=alphas, gaussians=gaussians)

    def forward(self, batch):
        """A batch {"context": views [B, V, ...], "target": view [B, ...], "has_masks": [B]} (see data.py).

        Returns the loss (a scalar to differentiate), metrics {name: scalar tensor}, and what to draw: what `splat`
        returns and "student" features [B, C, h, w].
        """
        target = batch["target"]
        drawn = self.splat(batch["context"], target, batch["has_masks"])
        splatted, holes = drawn["splatted"], drawn["holes"]
        # 8. The student looks through the target camera
        student = patch_tokens(self.student, target["images"])  # (B, C, h, w)
        # 9. Cross-entropy between the two heads' distributions over prototypes, at every location that is no hole
        with torch.no_grad():
            teacher_logits = self.teacher_head(splatted.permute(0, 2, 3, 1)[~holes]).float()  # (locations, prototypes)
            centre = self.centre.clone()
            if self.training and len(teacher_logits):
                self.centre.lerp_(teacher_logits.mean(0), 1 - self.centring)
        student_logits = self.student_head(student.permute(0, 2, 3, 1)[~holes]).float()
        loss, entropy = distillation_loss(
            (teacher_logits - centre) / self.teacher_temperature, student_logits / self.student_temperature
        )
        # The loss cannot fall below the teacher's entropy; what is above it is the distance to the teacher
        metrics = {"loss": loss.detach(), "above_entropy": loss.detach() - entropy, "holes": holes.float().mean()}
        return loss, metrics, dict(drawn, student=student.detach())

    @torch.no_grad()
    def update_teacher(self, momentum):
        """10. teacher = momentum * teacher + (1 - momentum) * student, for what is trained, backbone and head."""
        for student, teacher in ((self.student, self.teacher), (self.student_head, self.teacher_head)):
            for s, t in zip(student.parameters(), teacher.parameters()):
                if s.requires_grad:
                    t.lerp_(s, 1 - momentum)

    @torch.no_grad()
    def alignment(self, batch, drawn):
        """Is the geometry right? Mean cosine, where there are no holes, of the teacher's own features of the target
        with the splatted features, and with those of the first context view left where they are."""
        own = patch_tokens(self.teacher, batch["target"]["images"])
        unwarped = patch_tokens(self.teacher, batch["context"]["images"][:, 0])
        seen = ~drawn["holes"]  # where nothing is, the cosine is not a number
        cosines = [F.cosine_similarity(own, f, dim=1)[seen].mean() for f in (drawn["splatted"], unwarped)]
        return {"cosine_splatted": cosines[0], "cosine_unwarped": cosines[1]}


def distillation_loss(teacher_logits, student_logits):
    """Cross-entropy of softmax(student) under softmax(teacher), and the teacher's entropy: means over the locations.

    Both [locations, prototypes], already divided by their temperatures. Without locations the loss is 0.
    """
    teacher_log, student_log = F.log_softmax(teacher_logits, -1), F.log_softmax(student_logits, -1)
    p = teacher_log.exp()
    locations = max(1, len(p))
    return -(p * student_log).sum() / locations, -(p * teacher_log).sum() / locations
