"""The model of Splat and Distill (arXiv 2602.06032), parts first, the method last.

    load_vit             the vision transformer of DINOv2 and DINOv3, its weights and names
    add_lora, merge_lora the student's few trainable numbers, and back to a plain ViT
    DINOHead             features to prototype logits
    upsample_features    patch tokens to pixels without crossing segment borders
    blend_segments       features drawn towards their segment's mean
    SensorDepth          one 3D Gaussian per context pixel, from measured depth
    MVSplat              the same from photos alone
    SplatAndDistill      the method: one step, from a batch to its loss

Legend, used in trailing comments:  B scenes, V context views (one target view per scene), H x W pixels,
C channels, h x w patches (14 or 16 pixels wide: `vit.patch_size`), N = V * H * W Gaussians,
D tokens' width inside the transformer.
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

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# ----------------------------------------------------------------------------- the vision transformer


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images):  # (B, 3, H, W) -> (B, h*w, D)
        return self.proj(images).flatten(2).transpose(1, 2)


def rope_periods(count):
    """Of DINOv3's angles, in halves of the image: 1 and up, towards 100. (count,)

    timm and transformers compute these too. A file of Meta's has its own, perhaps rounded; they
    are taken as they are."""
    return 100.0 ** (torch.arange(count) / count)


class Rope(nn.Module):
    """A patch's position as angles (DINOv3, arXiv 2508.10104; RoFormer, 2104.09864)."""

    def __init__(self, head_dim):
        super().__init__()
        self.register_buffer("periods", rope_periods(head_dim // 4))  # Meta's files keep them

    def forward(self, h, w):  # -> cosines and sines (h*w, D/heads/2), rows' angles before columns'
        periods = self.periods.float()
        y, x = (2 * (torch.arange(n, device=periods.device) + 0.5) / n - 1 for n in (h, w))
        centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).view(-1, 2, 1)  # in -1..1
        angles = (2 * math.pi * centres / periods).flatten(1)  # float32, under autocast too
        return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Queries or keys (B, heads, tokens, D/heads), the patches' turned: they are the last tokens.
    A channel's partner in the plane of its angle is half the channels further on."""
    others, patches = x.split([x.shape[-2] - len(cos), len(cos)], dim=-2)
    a, b = patches.chunk(2, dim=-1)  # (B, heads, h*w, D/heads/2)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([others, turned.to(x.dtype)], -2)


def key_mask(size):
    """1 for queries and values, 0 for keys. (size,)"""
    return torch.ones(3, size // 3).index_fill(0, torch.tensor([1]), 0.0).flatten()


class MaskedLinear(nn.Linear):
    """DINOv3's qkv: a mask beside the bias, which switches the keys' off."""

    def __init__(self, inside, outside):
        super().__init__(inside, outside)
        self.register_buffer("bias_mask", key_mask(outside))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class Attention(nn.Module):
    def __init__(self, dim, heads, linear=nn.Linear):
        super().__init__()
        self.heads = heads
        self.qkv = linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, angles=None):  # (B, tokens, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, tokens, D/heads)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
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


class GatedMlp(nn.Module):
    """vits16plus's MLP: the same of DINOv3, gate and value from a matrix each, and not narrower."""

    def __init__(self, dim):
        super().__init__()
        self.w1 = nn.Linear(dim, 4 * dim)
        self.w2 = nn.Linear(dim, 4 * dim)
        self.w3 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, heads, mlp, eps, linear):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, linear)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = mlp(dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x, angles=None):
        x = x + self.ls1(self.attn(self.norm1(x), angles))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """DINOv2's transformer with its parameter names (facebookresearch/dinov2, arXiv 2304.07193 and 2309.16588).

    With rope=True it is DINOv3's, likewise (facebookresearch/dinov3, arXiv 2508.10104): positions
    by rotation, a masked bias, a larger epsilon; and its registers are called storage tokens.
    Images [B, 3, H, W] are ImageNet-normalised, H and W any multiples of `patch_size`.
    """

    def __init__(self, dim, depth, heads, mlp=Mlp, registers=0, patch=14, rope=False):
        super().__init__()
        self.embed_dim, self.registers, self.patch_size = dim, registers, patch
        self.patch_embed = PatchEmbed(dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if not rope:
            # cls, then a 37 x 37 grid: 518 pixels
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 37 * 37, dim))
        self.rope_embed = Rope(dim // heads) if rope else None
        self.register_name = "storage_tokens" if rope else "register_tokens"
        if registers:
            setattr(self, self.register_name, nn.Parameter(torch.zeros(1, registers, dim)))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # unused here; the public files have it
        eps, linear = (1e-5, MaskedLinear) if rope else (1e-6, nn.Linear)
        self.blocks = nn.ModuleList([Block(dim, heads, mlp, eps, linear) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=eps)

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
        (H, W), patch = images.shape[-2:], self.patch_size
        if H % patch or W % patch or not H * W:
            raise ValueError(
                f"images must be multiples of {patch} pixels high and wide, not {H} x {W}"
            )
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        if self.rope_embed is None:
            x = x + self._positions(H // patch, W // patch)
        if self.registers:
            registers = getattr(self, self.register_name).expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        return x

    def _angles(self, images):  # that every block turns its queries and keys by; None is DINOv2
        h, w = (size // self.patch_size for size in images.shape[-2:])
        return None if self.rope_embed is None else self.rope_embed(h, w)

    def forward_features(self, images):
        """Dict, as DINOv2's: x_norm_clstoken [B, D], x_norm_regtokens [B, registers, D], x_norm_patchtokens
        [B, h*w, D] after the final norm, x_prenorm [B, tokens, D] before it."""
        x, angles = self._tokens(images), self._angles(images)
        for block in self.blocks:
            x = block(x, angles)
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
        x, angles, kept = self._tokens(images), self._angles(images), []
        wanted = range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n
        if not all(0 <= i < len(self.blocks) for i in wanted):
            raise ValueError(f"n asks for blocks {list(wanted)}; there are {len(self.blocks)}, counted from 0")
        for i, block in enumerate(self.blocks):
            x = block(x, angles)
            if i in wanted:
                kept.append(self.norm(x) if norm else x)
        patches, classes = [x[:, 1 + self.registers :] for x in kept], [x[:, 0] for x in kept]
        if reshape:
            h = images.shape[-2] // self.patch_size
            patches = [p.transpose(1, 2).unflatten(2, (h, -1)) for p in patches]
        return tuple(zip(patches, classes)) if return_class_token else tuple(patches)

    def forward(self, images):  # as torch hub's DINOv2: the normed cls token (B, D)
        return self.forward_features(images)["x_norm_clstoken"]


DINOV3 = dict(registers=4, patch=16, rope=True)
ARCHITECTURES = {
    "dinov2_vits14": dict(dim=384, depth=12, heads=6),
    "dinov2_vitb14": dict(dim=768, depth=12, heads=12),
    "dinov2_vitl14": dict(dim=1024, depth=24, heads=16),
    "dinov2_vitg14": dict(dim=1536, depth=40, heads=24, mlp=SwiGLU),
    "dinov3_vits16": dict(dim=384, depth=12, heads=6, **DINOV3),
    "dinov3_vits16plus": dict(dim=384, depth=12, heads=6, mlp=GatedMlp, **DINOV3),
    "dinov3_vitb16": dict(dim=768, depth=12, heads=12, **DINOV3),
    "dinov3_vitl16": dict(dim=1024, depth=24, heads=16, **DINOV3),
    "vit_tiny14": dict(dim=192, depth=6, heads=3),  # ours: its weights ship in weights/
}
SHIPPED_TEACHER = Path(__file__).parent / "weights" / "teacher.safetensors"


class WeightsNotFound(ValueError):
    """DINOv2's weights are neither in torch hub's cache nor to be had from the network."""


def load_vit(name, weights=None, seed=0):
    """A DINOv2 or DINOv3 ViT in eval mode.

    Args:
        name: vit_tiny14, the small one that this repository trained; dinov2_vits14, dinov2_vitb14,
            dinov2_vitl14 or dinov2_vitg14, each with `_reg` the one with 4 registers; dinov3_vits16,
            dinov3_vits16plus, dinov3_vitb16 or dinov3_vitl16.
        weights: a path to a .pth or .safetensors file with Meta's names (the public files, the
            released Splat and Distill weights, our students), timm's (`vit_*_patch14_dinov2`,
            `vit_*_patch14_reg4_dinov2`, `vit_*_patch16_dinov3`) or, for DINOv3, transformers'
            (`facebook/dinov3-*`); None for the public weights, from torch hub's cache, or for
            DINOv2 by download, or the shipped ones of vit_tiny14; "random" for a random
            initialisation.
        seed: of the random initialisation.

    Raises:
        ValueError: the name is unknown, or the file is missing, is no weights file, or does not fit
            the architecture; or weights is None, and DINOv3's, which need a form, are not cached.
        WeightsNotFound (a ValueError): weights is None, and DINOv2's are neither in the cache nor
            to be downloaded.
    """
    with torch.device("meta"):  # the weights come next; do not spend seconds on initialising what they replace
        vit = ViT(**sizes_of(name))
    if weights == "random":
        _initialise(vit.to_empty(device="cpu"), seed)
        return vit.eval()
    if weights is None and name == "vit_tiny14":
        weights = SHIPPED_TEACHER
    state, source = (read_state(weights), weights) if weights is not None else _public_weights(name)
    metas_names = _dinov2_names if vit.rope_embed is None else _dinov3_names
    load_strictly(vit, metas_names(state, vit), source)
    return vit.eval()


def sizes_of(name):
    """`ViT`'s arguments for a name, "patch" among them. ValueError: `load_vit` knows no such name."""
    sizes, registers = ARCHITECTURES.get(name.removesuffix("_reg")), name.endswith("_reg")
    if sizes is None or registers and "registers" in sizes:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"unknown model {name!r}; known are {known}; dinov2's each also with _reg")
    return dict(patch=14) | sizes | (dict(registers=4) if registers else {})


def architecture_of(state, source):
    """The name that `load_vit` knows a state dict's architecture by. ValueError: it is of none."""
    names = state.keys()
    token = state.get("cls_token", state.get("embeddings.cls_token"))
    dim = token.shape[-1] if token is not None and token.ndim else None
    rope = bool({"storage_tokens", "embeddings.register_tokens"} & names)
    rope |= "reg_token" in names and "pos_embed" not in names  # timm's DINOv3
    gates = (".mlp.w1.", ".mlp.fc1_g.", ".mlp.gate_proj.")  # Meta's, timm's, transformers'
    gated = any(gate in name for name in names for gate in gates)
    for name, sizes in ARCHITECTURES.items():
        found = sizes["dim"], sizes.get("rope", False), sizes.get("mlp") is GatedMlp
        if found == (dim, rope, gated):
            registers = not rope and {"register_tokens", "reg_token"} & names
            return name + ("_reg" if registers else "")
    raise ValueError(f"{source}: not a DINOv2 or DINOv3: no cls_token of a known width")


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


# Meta's names for the files have the beginning of their hash
DINOV3_FILES = {
    "dinov3_vits16": "dinov3_vits16_pretrain_lvd1689m-08c60483.pth",
    "dinov3_vits16plus": "dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
    "dinov3_vitb16": "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth",
    "dinov3_vitl16": "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth",
}
DINOV3_FORM = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"


def _public_weights(name):
    """Torch hub's way: its cache, else the public address (which is where the cache's file names come from)."""
    base = name.removesuffix("_reg")
    file = f"{base}{'_reg4' if name != base else ''}_pretrain.pth"
    url = f"https://dl.fbaipublicfiles.com/dinov2/{base}/{file}"
    cached = Path(torch.hub.get_dir()) / "checkpoints" / DINOV3_FILES.get(name, file)
    if cached.is_file():
        return read_state(cached), cached
    if name in DINOV3_FILES:
        raise ValueError(
            f"{name}'s weights are behind a licence form: fill it in at {DINOV3_FORM}, "
            f"fetch {cached.name} and put it in {cached.parent}, "
            "or pass the file itself as the weights"
        )
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # torch hub sets none, and a firewall that drops packets would hang us
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True), url
    except (OSError, RuntimeError, http.client.HTTPException, pickle.UnpicklingError) as error:
        cached.unlink(missing_ok=True)  # what a proxy or a broken line left is not to be found there next time
        raise WeightsNotFound(
            f"{name}'s weights are not in torch hub's cache ({cached}), nor to be downloaded ({_first_line(error)}): "
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


# One after another, in this order: what of a name of theirs is called what by Meta
TRANSFORMERS_NAMES = {
    "embeddings.patch_embeddings.": "patch_embed.proj.", "embeddings.register_": "storage_",
    "embeddings.": "", "model.layer.": "layer.", "layer.": "blocks.",
    "attention.o_proj.": "attn.proj.", "attention.": "attn.",
    "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
}  # fmt: skip
TIMM_NAMES = {
    "reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma",
    "attn.q_bias": "attn.q_proj.bias", "attn.v_bias": "attn.v_proj.bias",
}  # fmt: skip
MLP_NAMES = {"mlp.up_proj.": "mlp.fc1.", "mlp.down_proj.": "mlp.fc2."}
GATED_MLP_NAMES = {
    "mlp.fc1_g.": "mlp.w1.", "mlp.fc1_x.": "mlp.w2.", "mlp.fc2.": "mlp.w3.",
    "mlp.gate_proj.": "mlp.w1.", "mlp.up_proj.": "mlp.w2.", "mlp.down_proj.": "mlp.w3.",
}  # fmt: skip


def _dinov3_names(state, vit):
    """Timm's or transformers' names and layout turned into Meta's, which are left alone."""
    if "embeddings.cls_token" in state:
        names = TRANSFORMERS_NAMES
    elif "reg_token" in state:
        names = TIMM_NAMES
    else:
        return state
    gated = isinstance(vit.blocks[0].mlp, GatedMlp)
    names = names | (GATED_MLP_NAMES if gated else MLP_NAMES)
    ours = {}
    for name, tensor in state.items():
        for theirs, metas in names.items():
            name = name.replace(theirs, metas)
        ours[name] = tensor
    for i in range(len(vit.blocks)):
        _join_qkv(ours, f"blocks.{i}.attn.", vit.embed_dim)
    # timm drops it; transformers' has a dimension more
    mask = ours.get("mask_token", torch.zeros(1, vit.embed_dim))
    return ours | {"mask_token": mask.flatten(0, -2)} | _constants(vit)


def _join_qkv(state, prefix, dim):
    """One matrix and one bias for queries, keys and values, in place. What is missing or does not
    fit stays as it is, for `load_strictly` to name."""
    q, k, v = (f"{prefix}{part}_proj" for part in "qkv")
    zeros = torch.zeros(dim)

    def join(kind, names, parts, shape):
        fits = all(part is not None and part.shape == shape for part in parts)
        if fits and f"{prefix}qkv.{kind}" not in state:
            state[f"{prefix}qkv.{kind}"] = torch.cat(parts)
            for name in names:
                state.pop(f"{name}.{kind}", None)

    join("weight", (q, k, v), [state.get(f"{name}.weight") for name in (q, k, v)], (dim, dim))
    # The keys' bias is masked, and in no such file. Where the others are 0, they may be left out
    q_bias, v_bias = (state.get(f"{name}.bias", zeros) for name in (q, v))
    join("bias", (q, v), [q_bias, zeros, v_bias], (dim,))


def _constants(vit):
    """The buffers of a DINOv3, which no training changes, by name. A DINOv2 has none."""
    made = {"periods": rope_periods, "bias_mask": key_mask}
    return {name: made[name.rsplit(".", 1)[1]](len(b)) for name, b in vit.named_buffers()}


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
    for name, value in _constants(vit).items():
        vit.get_buffer(name).copy_(value)


def normalise(images):
    """Images [..., 3, H, W] in 0..1 by ImageNet's mean and standard deviation."""
    mean, std = (images.new_tensor(c).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def patch_tokens(vit, images):
    """Images [..., 3, H, W] in 0..1 -> normed patch tokens [..., C, h, w], h = H // patch_size.

    The image is resized to the multiples of the ViT's patch_size at or below its size.
    ValueError: it is smaller than a patch.
    """
    (H, W), patch = images.shape[-2:], vit.patch_size
    if H < patch or W < patch:
        raise ValueError(f"images of {H} x {W} pixels are smaller than one {patch} x {patch} patch")
    h, w = H // patch, W // patch
    x = images.flatten(0, -4)  # (B*, 3, H, W)
    x = F.interpolate(x, (h * patch, w * patch), mode="bilinear", align_corners=False)
    tokens = vit.forward_features(normalise(x))["x_norm_patchtokens"]  # (B*, h*w, C)
    return tokens.transpose(1, 2).unflatten(2, (h, w)).unflatten(0, images.shape[:-3])


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
    """A plain state dict (DINOv2's or DINOv3's names, contiguous CPU copies) that computes what the
    ViT with LoRA does in eval mode."""
    state = {k: v.cpu() for k, v in vit.state_dict().items()}  # merged on the CPU, where a product is float32
    for name, module in vit.named_modules():
        if isinstance(module, LoRALinear):
            A, B = state.pop(f"{name}.A"), state.pop(f"{name}.B")
            weight = state[f"{name}.linear.weight"]
            state[f"{name}.linear.weight"] = weight + module.scale * (B @ A.flatten(1)).view_as(weight)
    return {k.replace(".linear.", "."): v.clone().contiguous() for k, v in state.items()}


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


def upsample_weights(masks, h, w, strict=False, centred=False):
    """Where each pixel's feature comes from on an h x w grid: four cells and their weights.

    Bilinear, but a cell counts only for the pixels of its own segment: the one that the mask shows where the cell is.
    The weights of the cells that count are made to sum to one. Where none counts, plain bilinear; with strict=True,
    zero, as in the public code.

    Args:
        masks: [B, H, W] segment ids.
        centred: a cell is at the centre of its patch, where it is. False: the corner cells are at the corner pixels, as
            in the public code, which moves features outwards, by half a patch at the border.
    Returns:
        indices [B, H, W, 4] into the B*h*w cells, and weights [B, H, W, 4] float32.
    """
    B, H, W = masks.shape
    device = masks.device

    def positions(size, pixels):  # along one axis: of cells in pixels, of pixels in cells
        if centred:
            at, back = ((torch.arange(n, device=device) + 0.5) * m / n - 0.5 for n, m in ((size, pixels), (pixels, size)))
            return at.round().long(), back.clamp(0, size - 1)
        at = torch.linspace(0, pixels - 1, size, device=device).round().long()
        return at, torch.linspace(0, size - 1, pixels, device=device)

    (rows, y), (columns, x) = positions(h, H), positions(w, W)
    cell_ids = masks[:, rows][:, :, columns].reshape(-1)  # (B*h*w,)

    def neighbours(x, size):  # along one axis: two cells [pixels, 2] and their weights
        low = x.floor().long().clamp(max=size - 1)
        return torch.stack([low, (low + 1).clamp(max=size - 1)], -1), torch.stack([1 - (x - low), x - low], -1)

    (y, wy), (x, wx) = neighbours(y, h), neighbours(x, w)
    cells = (y[:, None, :, None] * w + x[None, :, None, :]).reshape(H, W, 4)
    indices = cells + h * w * torch.arange(B, device=device).view(B, 1, 1, 1)  # (B, H, W, 4)
    plain = (wy[:, None, :, None] * wx[None, :, None, :]).reshape(H, W, 4)
    weights = plain * (cell_ids[indices] == masks[..., None])
    total = weights.sum(-1, keepdim=True)
    found = total > 1e-6  # a weight that is zero but for rounding is a cell that does not count
    return indices, torch.where(found, weights / total.clamp(min=1e-6), torch.zeros_like(plain) if strict else plain)


def upsample_features(features, masks, strict=False, centred=False):
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
    indices, weights = upsample_weights(masks, h, w, strict, centred)
    table = features.permute(0, 2, 3, 1).reshape(B * h * w, C)
    out = F.embedding_bag(  # a weighted sum of four rows per pixel, never holding the four
        indices.reshape(-1, 4), table, per_sample_weights=weights.reshape(-1, 4).to(table.dtype), mode="sum"
    )
    return out.view(*masks.shape, C).permute(0, 3, 1, 2)


def lift_features(tokens, masks, V, factored, centred=False):
    """The features of the Gaussians of V views per scene, for `rasterize`: tokens [B*V, C, h, w] upsampled to masks
    [B*V, H, W], as [B, V*H*W, C] or, factored, as a Mixture of the tokens, which holds the same in far less memory and,
    without tensor cores, four times the work."""
    BV, C, h, w = tokens.shape
    if not factored:
        return upsample_features(tokens, masks, False, centred).permute(0, 2, 3, 1).reshape(BV // V, -1, C)
    indices, weights = upsample_weights(masks, h, w, False, centred)  # into all tokens; a Mixture counts each scene's from 0
    scenes = V * h * w * torch.arange(BV // V, device=tokens.device)[:, None, None]
    table = tokens.permute(0, 2, 3, 1).reshape(BV // V, V * h * w, C)
    return Mixture(table, indices.view(BV // V, -1, 4) - scenes, weights.view(BV // V, -1, 4))


def number_segments(masks):
    """Segment ids [B, H, W], whatever they are, as 0, 1, ... for each image of its own."""
    ids = masks - masks.min()
    apart = (ids.max() + 1) * torch.arange(len(masks), device=masks.device).view(-1, 1, 1)
    labels = torch.unique(ids + apart, return_inverse=True)[1]
    return labels - labels.flatten(1).amin(1)[:, None, None]


def bilinear_taps(pixels, cells, device=None):
    """Which pixels of an axis bilinear downsampling reads (align_corners=False): two for each cell.

    Returns the pixels [2 * cells] and their weights [cells, 2].
    """
    at = ((torch.arange(cells, device=device) + 0.5) * pixels / cells - 0.5).clamp(min=0)
    low = at.floor().long()
    taps = torch.stack([low, (low + 1).clamp(max=pixels - 1)], -1)
    return taps.flatten(), torch.stack([1 - (at - low), at - low], -1)


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


def without_masked(gaussians, context):
    """Gaussians of pixels that a validity mask leaves out, "valid" [B, V, H, W], get opacity 0."""
    if "valid" not in context:
        return gaussians
    return gaussians._replace(opacities=gaussians.opacities * context["valid"].flatten(1))


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
        gaussians = without_masked(self.reconstruct(context), context)
        photo, depth, alphas = render(gaussians, target["extrinsics"], target["Ks"], W, H)
        loss = F.mse_loss(photo, target["images"])
        if "valid" in target:
            valid = target["valid"][:, None].expand_as(photo)
            squares = torch.where(valid, photo - target["images"], 0.0) ** 2
            loss = squares.sum() / valid.sum().clamp(min=1)
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
        vit: a ViT (`load_vit`). It becomes the student, with LoRA; the teacher starts as a copy of the student.
        reconstruct: context views -> Gaussians (`SensorDepth`, `FeedForward`).
        prototypes, head_dim, bottleneck_dim: of the heads.
        lora_rank, lora_alpha, lora_dropout: of the student's LoRA.
        upsampling: "mask-aware", as the paper's code; "bilinear" across segments; or "centred": mask-aware, with patch
            tokens at the centres of their patches.
        blend: how much of its own a splatted feature keeps against its segment's mean; 1 is no blending.
        centring: momentum of the running mean that is taken off the teacher's logits (DINO); 1 keeps it at 0.
        teacher_temperature, student_temperature: that logits are divided by.
        loss: "prototypes" (the paper's), "contrastive" (`contrastive_loss` of the features themselves) or "both".
        temperature: of the contrastive loss.
        targets: "splatted" features, or "own": the teacher's features of the target view itself. The latter is the
            control: the same training without geometry.
    """

    def __init__(
        self, vit, reconstruct, *, prototypes, head_dim, bottleneck_dim, lora_rank, lora_alpha, lora_dropout,
        upsampling, blend, centring, teacher_temperature, student_temperature,
        loss="prototypes", temperature=0.07, targets="splatted",
    ):  # fmt: skip
        super().__init__()
        self.reconstruct = reconstruct
        self.loss, self.temperature, self.targets = loss, temperature, targets
        self.upsampling, self.blend, self.centring = upsampling, blend, centring
        self.teacher_temperature, self.student_temperature = teacher_temperature, student_temperature
        for name, value, known in (
            ("upsampling", upsampling, ("mask-aware", "bilinear", "centred")),
            ("loss", loss, ("prototypes", "contrastive", "both")),
            ("targets", targets, ("splatted", "own")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {' or '.join(known)}, not {value!r}")
        # Rank 0 trains all weights instead
        self.student = add_lora(vit, lora_rank, lora_alpha, lora_dropout) if lora_rank else vit.requires_grad_(True)
        head = (vit.embed_dim, prototypes, head_dim, bottleneck_dim)
        self.student_head = nn.Identity() if loss == "contrastive" else DINOHead(*head)  # it has no use for one
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

        Returns {"splatted" features [B, C, h, w], "holes" [B, h, w] bool, "rendered" features [B, C, H, W] (in
        training only of the pixels that count), "alphas" [B, H, W], "gaussians"}.
        """
        B, V, _, H, W = context["images"].shape
        # 1. Reconstruct: one Gaussian per context pixel
        with torch.autocast(context["images"].device.type, enabled=False):  # positions do not survive bfloat16
            gaussians = without_masked(self.reconstruct(context), context)
            viewmats = torch.linalg.inv(target["extrinsics"])[:, None]
        # 2. Teacher features of the context views
        tokens = patch_tokens(self.teacher, context["images"]).flatten(0, 1)  # (B*V, C, h, w)
        if torch.is_autocast_enabled(tokens.device.type):  # the last norm gives float32: twice the memory to lift
            tokens = tokens.to(torch.get_autocast_dtype(tokens.device.type))
        # 3. and 4. Mask-aware upsampling to pixels, and lift: a pixel's feature is its Gaussian's
        masks = context["masks"].flatten(0, 1)
        if self.upsampling == "bilinear":
            masks = torch.zeros_like(masks)  # one segment
        factored, centred = tokens.is_cuda or self.training, self.upsampling == "centred"
        features = lift_features(tokens, masks, V, factored, centred)
        # 5. Splat into the target camera; in training only what the next two steps read
        blends = self.blend < 1 and bool(has_masks.any())
        h, w = tokens.shape[-2:]
        (rows, wy), (columns, wx) = (bilinear_taps(*n, tokens.device) for n in ((H, h), (W, w)))
        at = (rows, columns) if self.training else None
        labels = number_segments(target["masks"]) if self.training and blends else None
        scene = gaussians.means, gaussians.covars, gaussians.opacities, features
        rendered, alphas, *means = rasterize(
            *scene, viewmats, target["Ks"][:, None], W, H, near_plane=NEAR_PLANE, at=at,
            labels=None if labels is None else labels[:, None],
        )  # fmt: skip
        # (B, 1, H, W, C), (B, 1, H, W)
        rendered, alphas = rendered[:, 0].permute(0, 3, 1, 2), alphas[:, 0]
        # 6. Semantic blending, in the scenes that have segments
        keep = torch.where(has_masks, self.blend, 1.0).to(rendered.dtype).view(B, 1, 1, 1)
        if means:
            labels = labels[:, rows[:, None], columns]
            own = means[0][torch.arange(B, device=labels.device)[:, None, None], 0, labels]
            rendered = torch.lerp(own.permute(0, 3, 1, 2), rendered, keep)
        elif blends:
            rendered = blend_segments(rendered, target["masks"], keep)
        # 7. Down to the student's grid, and which of its locations nothing was splatted to
        taps = rendered if self.training else rendered[:, :, rows[:, None], columns]  # (B, C, 2h, 2w)
        weights = wy[:, :, None, None] * wx  # (h, 2, w, 2): bilinear, as F.interpolate would
        splatted = (taps.unflatten(3, (w, 2)).unflatten(2, (h, 2)) * weights.to(taps.dtype)).sum((3, 5))
        unseen = alphas < 0.5
        if "valid" in target:
            unseen = unseen | ~target["valid"]
        holes = F.interpolate(unseen.float()[:, None], (h, w), mode="nearest")[:, 0] > 0.5
        return dict(splatted=splatted, holes=holes, rendered=rendered, alphas=alphas, gaussians=gaussians)

    def forward(self, batch):
        """A batch {"context": views [B, V, ...], "target": view [B, ...], "has_masks": [B]} (see data.py).

        Returns the loss (a scalar to differentiate), metrics {name: scalar tensor}, and what to draw: what `splat`
        returns and "student" features [B, C, h, w].
        """
        target = batch["target"]
        if self.targets == "own":  # the control: no geometry, and so no holes
            with torch.no_grad():
                own = patch_tokens(self.teacher, target["images"])  # (B, C, h, w)
            drawn = dict(splatted=own, holes=torch.zeros_like(own[:, 0], dtype=torch.bool))
        else:
            drawn = self.splat(batch["context"], target, batch["has_masks"])
        seen = ~drawn["holes"]
        # 8. The student looks through the target camera
        student = patch_tokens(self.student, target["images"])  # (B, C, h, w)
        # 9. Compare the two at every location that is no hole
        teacher_features, student_features = (
            f.permute(0, 2, 3, 1)[seen].float() for f in (drawn["splatted"], student)
        )  # (locations, C)
        loss, metrics = student_features.new_zeros(()), {}
        if self.loss != "contrastive":
            prototypes, entropy = self.prototypes_loss(teacher_features, student_features)
            loss = loss + prototypes
            # It cannot fall below the teacher's entropy; what is above that is the distance to the teacher
            metrics["above_entropy"] = prototypes.detach() - entropy
        if self.loss != "prototypes":
            contrast, metrics["matched"] = contrastive_loss(student_features, teacher_features, self.temperature)
            loss = loss + contrast
        metrics |= {"loss": loss.detach(), "holes": drawn["holes"].float().mean()}
        return loss, metrics, dict(drawn, student=student.detach())

    def prototypes_loss(self, teacher_features, student_features):
        """The paper's: cross-entropy between the two heads' distributions over prototypes. Features [locations, C].
        Returns it and the teacher's entropy."""
        with torch.no_grad():
            teacher_logits = self.teacher_head(teacher_features).float()  # (locations, prototypes)
            centre = self.centre.clone()
            if self.training and len(teacher_logits):
                self.centre.lerp_(teacher_logits.mean(0), 1 - self.centring)
        student_logits = self.student_head(student_features).float()
        return distillation_loss(
            (teacher_logits - centre) / self.teacher_temperature, student_logits / self.student_temperature
        )

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


def contrastive_loss(queries, keys, temperature):
    """InfoNCE both ways between features [locations, C], of which row i of the one belongs to row i of the other.

    With unit vectors q_i and k_j and temperature t, location i is to be told from all others j of the batch:

        s_ij = q_i . k_j / t        L = - mean_i log( exp s_ii / sum_j exp s_ij )

    and the same with i and j swapped. The first pulls q_i to its own k_i and pushes it from every other: the softmax is
    what nearest-neighbour matching decides by, at a temperature. (CPC, arXiv 1807.03748; both ways as CLIP, 2103.00020.)

    Returns the mean of the two, 0 without locations, and the share of queries whose nearest key is their own.
    """
    scores = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T / temperature  # (locations, locations)
    own = torch.arange(len(scores), device=scores.device)
    locations = max(1, len(scores))
    both = F.cross_entropy(scores, own, reduction="sum") + F.cross_entropy(scores.T, own, reduction="sum")
    matched = (scores.detach().argmax(1) == own).sum() / locations if len(scores) else scores.new_zeros(())
    return both / (2 * locations), matched


# ----------------------------------------------------------------------------- a teacher from single photos


class Pretraining(nn.Module):
    """One training step of a teacher: the same spot in two crops of one photo is to have the same feature, and no
    other spot of the batch (dense contrast, as VADeR, arXiv 2011.05499, on the features themselves, without a head).

    With place_weight above 0 a linear layer also has to tell from each patch's feature where in the photo it lies. From
    a crop that takes an idea of the whole: of what is above and below, near and far.

    Args:
        vit: a ViT (`load_vit`).
        temperature: of the contrast.
        place_weight: of the mean squared error of places, in half photos.
        fresh: begin from random weights made for this, whatever those of the ViT.
    """

    def __init__(self, vit, temperature, place_weight, fresh):
        super().__init__()
        self.vit, self.temperature, self.place_weight = vit.requires_grad_(True), temperature, place_weight
        for name, p in vit.named_parameters() if fresh else ():
            if name.endswith("gamma"):  # residual branches count fully from the start: few blocks, few steps
                nn.init.ones_(p)
            elif p.ndim >= 2:
                nn.init.trunc_normal_(p, std=0.04 if name.endswith("weight") else 0.02)
        if place_weight:
            self.place = nn.Linear(vit.embed_dim, 2)

    def forward(self, batch):
        """A batch {"crops": [B, 2, 3, S, S], "windows": [B, 2, 2, 3], "first_to_second": [B, 2, 3]} (data.Crops).
        Returns the loss, metrics {name: scalar tensor} and {}."""
        tokens = patch_tokens(self.vit, batch["crops"])  # (B, 2, C, h, w)
        queries, keys = tokens[:, 0].flatten(2).mT, tokens[:, 1]  # (B, h*w, C), (B, C, h, w)
        # Where the centres of the first crop's patches lie in the second crop, in -1..1
        h, w = keys.shape[-2:]
        y, x = ((torch.arange(n, device=keys.device) + 0.5) / n * 2 - 1 for n in (h, w))
        centres = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1).view(h * w, 2)
        places = moved(centres, batch["first_to_second"])  # (B, h*w, 2)
        inside = places.abs().amax(-1) < 1 - 1 / (2 * w)  # half a patch from the border there is no feature yet
        keys = F.grid_sample(keys, places[:, None], align_corners=False)[:, :, 0].mT  # (B, h*w, C)
        loss, matched = contrastive_loss(queries[inside].float(), keys[inside].float(), self.temperature)
        metrics = {"matched": matched}
        if self.place_weight:
            in_photo = moved(centres, batch["windows"])  # (B, 2, h*w, 2)
            # A mirrored crop looks like one of a mirrored photo, and counts as that
            mirrored = torch.linalg.det(batch["windows"][..., :2]).sign()[..., None]  # (B, 2, 1)
            in_photo = torch.stack([in_photo[..., 0] * mirrored, in_photo[..., 1]], -1)
            metrics["place"] = error = F.mse_loss(self.place(tokens.flatten(3).mT).float(), in_photo)
            loss = loss + self.place_weight * error
        return loss, {"loss": loss.detach()} | {k: v.detach() for k, v in metrics.items()}, {}


def moved(points, affine):
    """Points [P, 2] under affine maps [..., 2, 3]. [..., P, 2]"""
    return points @ affine[..., :2].mT + affine[..., None, :, 2]
