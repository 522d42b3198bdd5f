"""Splat and Distill (arXiv 2602.06032): the method, its parts, the ViT, and its weights.

Shapes, in trailing comments: B scenes, V context views (one target view per scene), H x W pixels,
C channels, h x w patches (14 or 16 pixels wide: `vit.patch_size`), N = V * H * W Gaussians.
Cameras: OpenCV axes (x right, y down, z forward); extrinsics camera-to-world, viewmats
world-to-camera, Ks in pixels. data.py describes batches and views.
"""

import copy
import http.client
import math
import pickle
import re
import socket
import textwrap
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from data import naming, unpacked
from kernels import Mixture, rasterize

NEAR_PLANE = 1e-6  # of the rasteriser; tiny, as a capture's unit may be anything

# ---------------------------------------------------------------------------- the method
class SplatAndDistill(nn.Module):
    """One training step of the method (paper, section 3), in ten numbered steps.

    Args:
        vit: a ViT (`load_vit`). It becomes the student; the teacher starts as a copy of it.
        reconstruct: a callable, context views -> Gaussians (reconstruct.py).
        prototypes, head_dim, bottleneck_dim: sizes of the heads.
        lora_rank, lora_alpha, lora_dropout: of the student's LoRA. Rank 0 trains all weights.
        upsampling: "mask-aware" (the paper's code), "centred" (mask-aware, tokens at the centres
            of their patches) or "bilinear" (across segments).
        blend: weight of a splatted feature against its segment's mean; 1 is no blending.
        centring: momentum of the mean subtracted from the teacher's logits; 1 is no centring.
        teacher_temperature, student_temperature: of the logits.
        loss: "prototypes" (the paper's), "contrastive" or "both".
        temperature: of the contrastive loss.
        targets: "splatted", or "own": a control without geometry, taught by the teacher's
            features of the target view itself.
    """

    def __init__(
        self, vit, reconstruct, *, prototypes, head_dim, bottleneck_dim,
        lora_rank, lora_alpha, lora_dropout, upsampling, blend, centring,
        teacher_temperature, student_temperature,
        loss="prototypes", temperature=0.07, targets="splatted",
    ):  # fmt: skip
        super().__init__()
        for name, value, known in (
            ("upsampling", upsampling, ("mask-aware", "bilinear", "centred")),
            ("loss", loss, ("prototypes", "contrastive", "both")),
            ("targets", targets, ("splatted", "own")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {' or '.join(known)}, not {value!r}")
        self.reconstruct, self.upsampling, self.blend = reconstruct, upsampling, blend
        self.loss, self.temperature, self.targets = loss, temperature, targets
        self.centring, self.teacher_temperature = centring, teacher_temperature
        self.student_temperature = student_temperature
        lora = lora_rank, lora_alpha, lora_dropout
        self.student = add_lora(vit, *lora) if lora_rank else vit.requires_grad_(True)
        head = vit.embed_dim, prototypes, head_dim, bottleneck_dim
        self.student_head = nn.Identity() if loss == "contrastive" else DINOHead(*head)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.student_head).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(prototypes))  # of the teacher's logits

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()  # targets have no dropout
        self.teacher_head.eval()
        return self

    def forward(self, batch):
        """A batch {"context": views [B, V, ...], "target": view [B, ...], "has_masks": [B]}.

        Returns the loss, metrics {name: scalar tensor} and, to draw, what `splat` returns with
        "student" features [B, C, h, w].
        """
        target = batch["target"]
        # 1. to 7. The teacher's features of the context views, seen from the target camera
        if self.targets == "splatted":
            drawn = self.splat(batch["context"], target, batch["has_masks"])
        else:  # the control has no geometry, and so no holes
            with torch.no_grad():
                own = patch_tokens(self.teacher, target["images"])  # [B, C, h, w]
            drawn = dict(splatted=own, holes=torch.zeros_like(own[:, 0], dtype=torch.bool))
        # 8. The student's features of the target view
        student = patch_tokens(self.student, target["images"])  # [B, C, h, w]
        # 9. Compare the two wherever there is no hole: [locations, C]
        holes = drawn["holes"]  # [B, h, w]
        taught = drawn["splatted"].permute(0, 2, 3, 1)[~holes].float()
        learnt = student.permute(0, 2, 3, 1)[~holes].float()
        loss, metrics = 0.0, {}
        if self.loss != "contrastive":
            cross_entropy, entropy = self.prototypes_loss(taught, learnt)
            loss = loss + cross_entropy
            metrics["above_entropy"] = cross_entropy.detach() - entropy  # the KL divergence
        if self.loss != "prototypes":
            contrast, metrics["matched"] = contrastive_loss(
                learnt, taught, self.temperature, self.training
            )
            loss = loss + contrast
        metrics["loss"] = loss.detach()
        metrics["holes"] = mean_of(holes.sum(), holes.numel(), self.training)
        return loss, metrics, dict(drawn, student=student.detach())

    @torch.no_grad()
    def splat(self, context, target, has_masks):
        """Steps 1 to 7: the teacher's features of the context views, seen from the target camera.

        Returns {"splatted" features [B, C, h, w], "holes" [B, h, w] bool, "rendered" features
        [B, C, H, W] (in training [B, C, 2h, 2w]), "alphas" [B, H, W], "gaussians"}.
        """
        (B, V, _, H, W), device = context["images"].shape, context["images"].device
        # 1. Reconstruct: one Gaussian per context pixel. bfloat16 would round positions
        with torch.autocast(device.type, enabled=False):
            gaussians = without_masked(self.reconstruct(context), context)
            viewmats = torch.linalg.inv(target["extrinsics"])[:, None]  # [B, 1, 4, 4]
        # 2. Teacher features of the context views
        tokens = patch_tokens(self.teacher, context["images"]).flatten(0, 1)  # [B*V, C, h, w]
        if torch.is_autocast_enabled(device.type):  # the last norm returns float32
            tokens = tokens.to(torch.get_autocast_dtype(device.type))
        # 3. Mask-aware upsampling to pixels, and 4. lift: a pixel's feature is its Gaussian's
        masks = context["masks"].flatten(0, 1)  # [B*V, H, W]
        if self.upsampling == "bilinear":  # one segment everywhere
            masks = torch.zeros_like(masks)
        factored, centred = tokens.is_cuda or self.training, self.upsampling == "centred"
        features = lift_features(tokens, masks, V, factored, centred)
        # 5. Splat into the target camera. In training the rasteriser draws only the pixels that
        # step 7 reads; it returns the means of segments, which step 6 needs
        h, w = tokens.shape[-2:]
        (rows, wy), (columns, wx) = bilinear_taps(H, h, device), bilinear_taps(W, w, device)
        blends = self.blend < 1 and bool(has_masks.any())
        labels = number_segments(target["masks"])[:, None] if blends and self.training else None
        rendered, alphas, *means = rasterize(
            *gaussians[:3], features, viewmats, target["Ks"][:, None], W, H, near_plane=NEAR_PLANE,
            precision="tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
            at=(rows, columns) if self.training else None, labels=labels,
        )  # fmt: skip
        rendered, alphas = rendered[:, 0].permute(0, 3, 1, 2), alphas[:, 0]
        # 6. Blend each pixel with its segment's mean, in the scenes that have segments
        keep = torch.where(has_masks, self.blend, 1.0).to(rendered.dtype).view(B, 1, 1, 1)
        if means:  # [B, 1, labels, C]
            scene = torch.arange(B, device=device).view(B, 1, 1)
            means = means[0][scene, 0, labels[:, 0, rows[:, None], columns]]  # [B, 2h, 2w, C]
            rendered = torch.lerp(means.permute(0, 3, 1, 2), rendered, keep)
        elif blends:
            rendered = blend_segments(rendered, target["masks"], keep)
        # 7. Resize to the student's grid; holes by nearest
        taps = rendered if self.training else rendered[:, :, rows[:, None], columns]
        weights = (wy[:, :, None, None] * wx).to(taps.dtype)  # [h, 2, w, 2]
        splatted = (taps.unflatten(3, (w, 2)).unflatten(2, (h, 2)) * weights).sum((3, 5))
        unseen = (alphas < 0.5) | ~target.get("valid", alphas.new_ones(1, dtype=torch.bool))
        holes = F.interpolate(unseen.float()[:, None], (h, w), mode="nearest")[:, 0] > 0.5
        return dict(splatted=splatted, holes=holes, rendered=rendered, alphas=alphas,
                    gaussians=gaussians)  # fmt: skip

    def prototypes_loss(self, teacher, student):
        """`distillation_loss` between the two heads' logits of features [locations, C]."""
        with torch.no_grad():
            teacher_logits = self.teacher_head(teacher).float()  # [locations, prototypes]
            centred = teacher_logits - self.centre
            if self.training and self.centring < 1:
                mean = mean_of(teacher_logits.sum(0), len(teacher), True, none=self.centre)
                self.centre.lerp_(mean, 1 - self.centring)
        student_logits = self.student_head(student).float() / self.student_temperature
        return distillation_loss(centred / self.teacher_temperature, student_logits, self.training)

    @torch.no_grad()
    def update_teacher(self, momentum):
        """10. teacher = momentum * teacher + (1 - momentum) * student, backbone and head."""
        pairs = (self.student, self.teacher), (self.student_head, self.teacher_head)
        for student, teacher in pairs:
            for s, t in zip(student.parameters(), teacher.parameters()):
                if s.requires_grad:
                    t.lerp_(s, 1 - momentum)

    @torch.no_grad()
    def alignment(self, batch, drawn):
        """Is the geometry right? Mean cosine, outside the holes, of the teacher's own features of
        the target view with the splatted ones, and with the first context view's, unwarped."""
        own = patch_tokens(self.teacher, batch["target"]["images"])  # [B, C, h, w]
        unwarped = patch_tokens(self.teacher, batch["context"]["images"][:, 0])
        maps = {"cosine_splatted": drawn["splatted"], "cosine_unwarped": unwarped}
        seen = ~drawn["holes"]
        return {k: F.cosine_similarity(own, f, dim=1)[seen].mean() for k, f in maps.items()}


def without_masked(gaussians, context):
    """The Gaussians, with opacity 0 outside the validity mask "valid" [B, V, H, W], if any."""
    if "valid" not in context:
        return gaussians
    return gaussians._replace(opacities=gaussians.opacities * context["valid"].flatten(1))


# ---------------------------------------------------------------------------- its parts
def mean_of(total, count, together, none=0.0):
    """total / count, or `none` where the count is 0; if `together`, over all processes.
    DistributedDataParallel averages their gradients: each is therefore multiplied by their number.
    """
    whole = total.detach().clone()
    count = torch.as_tensor(count, device=total.device).float().clone()
    processes = dist.get_world_size() if together and dist.is_initialized() else 1
    if processes > 1:
        dist.all_reduce(whole)
        dist.all_reduce(count)
    part = processes * total / count.clamp(min=1)
    mean = part + (whole / count.clamp(min=1) - part).detach()  # whole's value, part's gradient
    return torch.where(count > 0, mean, none)


class SumOfProcesses(torch.autograd.Function):
    """x summed over all processes, and in the backward pass the gradients of all their losses."""

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x := x.contiguous().clone())
        return x

    backward = forward


def gather_rows(x, together):
    """Rows [M, C], M different in each process -> if `together` those of all processes, and the
    index of this one's first."""
    if not (together and dist.is_initialized()):
        return x, 0
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=x.device)
    dist.all_gather_into_tensor(counts, torch.tensor([len(x)], device=x.device))
    before, total = int(counts[: dist.get_rank()].sum()), int(counts.sum())
    return SumOfProcesses.apply(F.pad(x, (0, 0, before, total - before - len(x)))), before


def distillation_loss(teacher_logits, student_logits, together=False):
    """Cross-entropy of softmax(student) under softmax(teacher), and the teacher's entropy: means
    over the locations (`mean_of`) of logits [locations, prototypes] / temperature."""
    teacher_log, student_log = F.log_softmax(teacher_logits, -1), F.log_softmax(student_logits, -1)
    p, locations = teacher_log.exp(), len(teacher_log)
    cross_entropy = mean_of(-(p * student_log).sum(), locations, together)
    entropy = mean_of(-(p * teacher_log).sum(), locations, together)
    return cross_entropy, entropy


def contrastive_loss(queries, keys, temperature, together=False):
    """InfoNCE (CPC, arXiv 1807.03748), both ways as in CLIP (2103.00020), between [locations, C].

    Row i of the queries belongs to row i of the keys. With unit vectors and temperature t

        s_ij = q_i . k_j / t        L = - mean_i log( exp s_ii / sum_j exp s_ij )

    Returns the mean of L and of L with i and j swapped, and the share of queries whose nearest
    key is their own; 0 and 0 without locations. `together`, over those of all processes.
    """
    queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
    all_queries, first = gather_rows(queries, together)
    all_keys, _ = gather_rows(keys, together)
    own = first + torch.arange(len(queries), device=queries.device)
    scores = queries @ all_keys.T / temperature  # [locations, locations of all]
    swapped = keys @ all_queries.T / temperature
    both = sum(F.cross_entropy(s, own, reduction="sum") for s in (scores, swapped))
    nearest = scores.detach().argmax(1) if len(scores) else own
    matched = mean_of((nearest == own).sum(), len(own), together)
    return mean_of(both / 2, len(own), together), matched


class DINOHead(nn.Module):
    """Features [..., in_dim] -> logits [..., out_dim] (DINO, arXiv 2104.14294): an MLP, then the
    cosine with each prototype times its own scale weight_g."""

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
        self.last_layer.weight_v = nn.Parameter(torch.empty(out_dim, bottleneck_dim))
        # As nn.Linear's: Adam would turn longer vectors more slowly
        nn.init.kaiming_uniform_(self.last_layer.weight_v, a=math.sqrt(5))

    def forward(self, x):
        prototypes = self.last_layer.weight_g * F.normalize(self.last_layer.weight_v, dim=-1)
        return F.linear(F.normalize(self.mlp(x), dim=-1), prototypes)


def positions(cells, pixels, centred, device):
    """Cells on an axis of pixels: at their centres, or from the first pixel to the last. [cells]"""
    if centred:
        return (torch.arange(cells, device=device) + 0.5) * pixels / cells - 0.5
    return torch.linspace(0, pixels - 1, cells, device=device)


def neighbours(at, cells):
    """The two cells around each position on an axis [n], and their linear weights: both [n, 2]."""
    at = at.clamp(0, cells - 1)
    low = at.floor().long()
    both = torch.stack([low, (low + 1).clamp(max=cells - 1)], -1)
    return both, torch.stack([1 - (at - low), at - low], -1)


def bilinear_taps(pixels, cells, device=None):
    """The pixels [2 * cells] of an axis that bilinear downsampling (align_corners=False) reads,
    two per cell, and their weights [cells, 2]."""
    taps, weights = neighbours(positions(cells, pixels, True, device), pixels)
    return taps.flatten(), weights


def upsample_weights(masks, h, w, strict=False, centred=False):
    """The four cells of an h x w grid around each pixel, and their weights (paper, section 3).

    Bilinear weights, kept where cell and pixel are of one segment in the masks [B, H, W], and
    scaled to sum to 1. Where none is kept: plain bilinear or, if `strict`, 0 as in the public
    code. Cells are at the centres of their patches if `centred`; else the corner cells are at
    the corner pixels, as in the public code, which moves features outwards.

    Returns indices [B, H, W, 4] into the B*h*w cells, and weights [B, H, W, 4] float32.
    """
    (B, H, W), where = masks.shape, (centred, masks.device)
    y, wy = neighbours(positions(H, h, *where), h)  # [H, 2]
    x, wx = neighbours(positions(W, w, *where), w)  # [W, 2]
    cells = (y[:, None, :, None] * w + x[None, :, None, :]).reshape(H, W, 4)
    plain = (wy[:, None, :, None] * wx[None, :, None, :]).reshape(H, W, 4)
    indices = cells + h * w * torch.arange(B, device=masks.device).view(B, 1, 1, 1)
    rows = positions(h, H, *where).round().long()
    columns = positions(w, W, *where).round().long()
    cell_ids = masks[:, rows[:, None], columns].flatten()  # [B*h*w]
    weights = plain * (cell_ids[indices] == masks[..., None])  # [B, H, W, 4]
    total = weights.sum(-1, keepdim=True)
    fallback = torch.zeros_like(plain) if strict else plain
    return indices, torch.where(total > 1e-6, weights / total.clamp(min=1e-6), fallback)


def upsample_features(features, masks, strict=False, centred=False):
    """Features [B, C, h, w] upsampled by `upsample_weights` to masks [B, H, W]: a channels-last
    view [B, C, H, W]."""
    B, C, h, w = features.shape
    if masks.ndim != 3 or len(masks) != B:
        shapes = f"features {list(features.shape)}, not {list(masks.shape)}"
        raise ValueError(f"masks must be [{B}, H, W] to go with {shapes}")
    indices, weights = upsample_weights(masks, h, w, strict, centred)
    table = features.permute(0, 2, 3, 1).reshape(B * h * w, C)
    weights = weights.reshape(-1, 4).to(table.dtype)
    # Weighted sums of four rows, without a copy [B*H*W, 4, C] of them
    out = F.embedding_bag(indices.view(-1, 4), table, per_sample_weights=weights, mode="sum")
    return out.view(*masks.shape, C).permute(0, 3, 1, 2)


def lift_features(tokens, masks, V, factored, centred=False):
    """Tokens [B*V, C, h, w] upsampled to masks [B*V, H, W]: the features [B, N, C] of the scenes'
    Gaussians or, if `factored`, the same as a Mixture, which takes far less memory but is slower
    without tensor cores."""
    BV, C, h, w = tokens.shape
    B = BV // V
    if not factored:
        pixels = upsample_features(tokens, masks, centred=centred)  # [B*V, C, H, W]
        return pixels.permute(0, 2, 3, 1).reshape(B, -1, C)
    indices, weights = upsample_weights(masks, h, w, centred=centred)  # into all scenes' tokens
    first = V * h * w * torch.arange(B, device=tokens.device)[:, None, None]  # of each scene
    table = tokens.permute(0, 2, 3, 1).reshape(B, V * h * w, C)
    return Mixture(table, indices.view(B, -1, 4) - first, weights.view(B, -1, 4))


def number_segments(masks):
    """Segment ids [B, H, W] of any value as labels 0, 1, ... within each image."""
    ids = masks - masks.min()
    image = torch.arange(len(masks), device=masks.device).view(-1, 1, 1)
    labels = torch.unique(ids + (ids.max() + 1) * image, return_inverse=True)[1]
    return labels - labels.flatten(1).amin(1)[:, None, None]


def blend_segments(features, masks, alpha):
    """alpha * features + (1 - alpha) * the mean over each pixel's segment (paper, section 3):
    [B, C, H, W]. masks [B, H, W] are segment ids, alpha a number or [B, 1, 1, 1]."""
    B, C, H, W = features.shape
    if masks.shape != (B, H, W):
        raise ValueError(f"masks must be {[B, H, W]} to go with features, not {list(masks.shape)}")
    labels = number_segments(masks)
    count = int(labels.max()) + 1  # of labels per image
    labels = (labels + count * torch.arange(B, device=masks.device).view(B, 1, 1)).flatten()
    flat = features.permute(0, 2, 3, 1).reshape(-1, C)  # [B*H*W, C]
    sums = torch.zeros(B * count, C, device=flat.device).index_add_(0, labels, flat.float())
    sizes = torch.bincount(labels, minlength=B * count).clamp(min=1)[:, None]
    means = (sums / sizes).to(flat.dtype)[labels].view(B, H, W, C).permute(0, 3, 1, 2)
    return torch.lerp(means, features, alpha)


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / rank) B A dropout(x), with W and b frozen (arXiv 2106.09685)."""

    def __init__(self, layer, rank, alpha, dropout):
        super().__init__()
        self.linear = layer.requires_grad_(False)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(torch.empty(rank, *layer.weight.shape[1:]))
        self.B = nn.Parameter(torch.zeros(len(layer.weight), rank))  # zero: starts as the layer
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(self.dropout(x), self.A), self.B) * self.scale


class LoRAConv(LoRALinear):
    """LoRA of a convolution, as in peft: A has its kernel size, B is 1 x 1."""

    def forward(self, x):
        down = F.conv2d(self.dropout(x), self.A, stride=self.linear.stride)
        return self.linear(x) + F.conv2d(down, self.B[:, :, None, None]) * self.scale


def add_lora(vit, rank=8, alpha=8, dropout=0.1):
    """Freeze a ViT and add LoRA, in place, to every qkv and proj, patch_embed.proj too, as the
    paper's code does. Returns the ViT."""
    vit.requires_grad_(False)
    vit.patch_embed.proj = LoRAConv(vit.patch_embed.proj, rank, alpha, dropout)
    for block in vit.blocks:
        block.attn.qkv = LoRALinear(block.attn.qkv, rank, alpha, dropout)
        block.attn.proj = LoRALinear(block.attn.proj, rank, alpha, dropout)
    return vit


@torch.no_grad()
def merge_lora(vit):
    """The state dict (Meta's names, on the CPU) of a plain ViT that computes the same."""
    state = {k: v.cpu() for k, v in vit.state_dict().items()}  # products on a GPU may be TF32
    for name, module in vit.named_modules():
        if isinstance(module, LoRALinear):
            A, B = state.pop(f"{name}.A"), state.pop(f"{name}.B")
            weight = state[f"{name}.linear.weight"]
            change = module.scale * (B @ A.flatten(1)).view_as(weight)
            state[f"{name}.linear.weight"] = weight + change
    return {k.replace(".linear.", "."): v.clone().contiguous() for k, v in state.items()}


class Pretraining(nn.Module):
    """One training step of a teacher: a spot has the same feature in two crops of its photo.

    All other spots of the batch are negatives (dense contrast as in VADeR, arXiv 2011.05499,
    without a head). With a place_weight a linear layer also predicts where in the photo a patch
    lies (mean squared error, in half photos). `fresh` initialises the ViT anew.
    """

    def __init__(self, vit, temperature, place_weight, fresh):
        super().__init__()
        self.vit = vit.requires_grad_(True)
        self.temperature, self.place_weight = temperature, place_weight
        for name, p in vit.named_parameters() if fresh else ():
            if name.endswith("gamma"):  # residual branches count fully: few blocks, few steps
                nn.init.ones_(p)
            elif p.ndim >= 2:
                nn.init.trunc_normal_(p, std=0.04 if name.endswith("weight") else 0.02)
        if place_weight:
            self.place = nn.Linear(vit.embed_dim, 2)

    def forward(self, batch):
        """A batch of data.Crops: "crops" [B, 2, 3, S, S] and the affine maps "windows" [B, 2, 2, 3]
        and "first_to_second" [B, 2, 3]. Returns the loss, metrics {name: scalar tensor} and {}."""
        tokens = patch_tokens(self.vit, batch["crops"])  # [B, 2, C, h, w]
        queries, keys = tokens[:, 0].flatten(2).mT, tokens[:, 1]  # [B, h*w, C], [B, C, h, w]
        # Where the centres of the first crop's patches lie in the second crop, in -1..1
        h, w = keys.shape[-2:]
        y, x = ((torch.arange(n, device=keys.device) + 0.5) / n * 2 - 1 for n in (h, w))
        centres = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1).view(h * w, 2)
        places = moved(centres, batch["first_to_second"])  # [B, h*w, 2]
        inside = places.abs().amax(-1) < 1 - 1 / (2 * w)  # by half a patch
        keys = F.grid_sample(keys, places[:, None], align_corners=False)[:, :, 0].mT  # [B, h*w, C]
        queries, keys = queries[inside].float(), keys[inside].float()
        loss, matched = contrastive_loss(queries, keys, self.temperature, self.training)
        metrics = {"matched": matched}
        if self.place_weight:
            in_photo = moved(centres, batch["windows"])  # [B, 2, h*w, 2]
            # A mirrored crop cannot be told from one of a mirrored photo: mirror its target
            mirrored = torch.linalg.det(batch["windows"][..., :2]).sign()[..., None]  # [B, 2, 1]
            in_photo = torch.stack([in_photo[..., 0] * mirrored, in_photo[..., 1]], -1)
            error = (self.place(tokens.flatten(3).mT).float() - in_photo).square()
            error = mean_of(error.sum(), error.numel(), self.training)
            metrics["place"], loss = error.detach(), loss + self.place_weight * error
        return loss, {"loss": loss.detach(), **metrics}, {}


def moved(points, affine):
    """Points [P, 2] under affine maps [..., 2, 3]: [..., P, 2]."""
    # Elementwise, as autocast would round a matmul's positions to bfloat16
    return (points[..., None, :] * affine[..., None, :, :2]).sum(-1) + affine[..., None, :, 2]


# ---------------------------------------------------------------------------- the transformer
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(images):
    """Images [..., 3, H, W] in 0..1 by ImageNet's mean and standard deviation."""
    mean, std = (images.new_tensor(c).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def patch_tokens(vit, images):
    """Images [..., 3, H, W] in 0..1, resized to whole patches -> normed patch tokens
    [..., C, h, w], h = H // patch_size. ValueError: they are smaller than a patch."""
    (H, W), patch = images.shape[-2:], vit.patch_size
    if H < patch or W < patch:
        raise ValueError(f"images of {H} x {W} pixels are smaller than a {patch} x {patch} patch")
    h, w = H // patch, W // patch
    x = images.flatten(0, -4)  # [B*, 3, H, W]
    x = F.interpolate(x, (h * patch, w * patch), mode="bilinear", align_corners=False)
    tokens = vit.forward_features(normalise(x))["x_norm_patchtokens"]  # [B*, h*w, C]
    return tokens.mT.unflatten(2, (h, w)).unflatten(0, images.shape[:-3])


class Rope(nn.Module):
    """A patch's position as angles (DINOv3, arXiv 2508.10104; RoFormer, 2104.09864)."""

    def __init__(self, head_dim):
        super().__init__()
        count = head_dim // 4  # periods from 1 towards 100, in half images
        periods = 100.0 ** (torch.arange(count, device="cpu") / count)
        self.register_buffer("periods", periods)  # Meta's files keep them, perhaps rounded

    def forward(self, h, w):  # -> cosines and sines [h*w, head_dim / 2], rows' before columns'
        periods = self.periods.float()
        y, x = (2 * (torch.arange(n, device=periods.device) + 0.5) / n - 1 for n in (h, w))
        centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).view(-1, 2, 1)  # in -1..1
        angles = (2 * math.pi * centres / periods).flatten(1)  # float32, under autocast too
        return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """RoPE of queries or keys [B, heads, tokens, head_dim], whose last tokens are the patches:
    rotates channels i and i + head_dim / 2 by angle i."""
    others, patches = x.split([x.shape[-2] - len(cos), len(cos)], dim=-2)
    a, b = patches.chunk(2, dim=-1)  # [B, heads, h*w, head_dim / 2]
    rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([others, rotated.to(x.dtype)], -2)


class MaskedLinear(nn.Linear):
    """DINOv3's qkv: a mask removes the keys' bias."""

    def __init__(self, inside, outside):
        super().__init__(inside, outside)
        mask = torch.ones(3, outside // 3, device="cpu")  # queries, keys, values
        mask[1] = 0
        self.register_buffer("bias_mask", mask.flatten())

    def forward(self, x):
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class Attention(nn.Module):
    def __init__(self, dim, heads, linear):
        super().__init__()
        self.heads = heads
        self.qkv = linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, angles):  # [B, tokens, dim]
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, tokens, head_dim] each
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Sequential):
    def __init__(self, dim):
        fc1, fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        super().__init__(OrderedDict(fc1=fc1, gelu=nn.GELU(), fc2=fc2))


class SwiGLU(nn.Module):
    """vitg14's MLP: gate and value from one matrix, 2/3 as wide for the same parameter count."""

    def __init__(self, dim):
        super().__init__()
        hidden = (4 * dim * 2 // 3 + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class GatedMlp(nn.Module):
    """vits16plus's MLP: gate and value from separate matrices, at full width."""

    def __init__(self, dim):
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, 4 * dim), nn.Linear(dim, 4 * dim)
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
        self.norm1, self.attn = nn.LayerNorm(dim, eps=eps), Attention(dim, heads, linear)
        self.ls1 = LayerScale(dim)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=eps), mlp(dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x, angles):  # [B, tokens, dim]
        x = x + self.ls1(self.attn(self.norm1(x), angles))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """DINOv2's ViT with its parameter names (arXiv 2304.07193, registers 2309.16588); with rope
    DINOv3's (2508.10104): rotary positions, no bias of keys, a larger epsilon. Images [B, 3, H, W]
    are ImageNet-normalised, H and W multiples of `patch_size`."""

    def __init__(self, dim, depth, heads, mlp=Mlp, registers=0, patch=14, rope=False):
        super().__init__()
        self.embed_dim, self.registers, self.patch_size = dim, registers, patch
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch, patch)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if not rope:  # cls, then a grid of 37 x 37: 518 pixels
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 37 * 37, dim))
        self.rope_embed = Rope(dim // heads) if rope else None
        self.register_name = "storage_tokens" if rope else "register_tokens"
        if registers:
            setattr(self, self.register_name, nn.Parameter(torch.zeros(1, registers, dim)))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # in the public files, and unused
        eps, linear = (1e-5, MaskedLinear) if rope else (1e-6, nn.Linear)
        self.blocks = nn.ModuleList([Block(dim, heads, mlp, eps, linear) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=eps)

    def _positions(self, h, w):
        """The position embedding [1, 1 + h*w, dim], interpolated to h x w patches."""
        if (h, w) == (37, 37):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2).float()
        if self.registers:  # as these were trained
            size = dict(size=(h, w), antialias=True)
        else:
            size = dict(scale_factor=((h + 0.1) / 37, (w + 0.1) / 37))
        grid = F.interpolate(grid, mode="bicubic", **size)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT.to(self.pos_embed.dtype)], 1)

    def _blocks(self, images, wanted):
        """Tokens [B, 1 + registers + h*w, dim] after each of the wanted blocks, in order."""
        (H, W), patch = images.shape[-2:], self.patch_size
        if H % patch or W % patch or not H * W:
            fits = f"multiples of {patch} pixels high and wide"
            raise ValueError(f"images must be {fits}, not {H} x {W}")
        h, w = H // patch, W // patch
        x = self.patch_embed(images).flatten(2).mT  # [B, h*w, dim]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        angles = None
        if self.rope_embed is None:
            x = x + self._positions(h, w)
        else:
            angles = self.rope_embed(h, w)
        if self.registers:
            registers = getattr(self, self.register_name).expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], 1)
        kept = []
        for i, block in enumerate(self.blocks):
            x = block(x, angles)
            if i in wanted:
                kept.append(x)
        return kept

    def forward_features(self, images):
        """DINOv2's dict: after the final norm x_norm_clstoken [B, dim], x_norm_regtokens
        [B, registers, dim], x_norm_patchtokens [B, h*w, dim]; before it x_prenorm."""
        (x,) = self._blocks(images, [len(self.blocks) - 1])
        normed, first = self.norm(x), 1 + self.registers  # the first patch
        return {"x_norm_clstoken": normed[:, 0], "x_norm_regtokens": normed[:, 1:first],
                "x_norm_patchtokens": normed[:, first:], "x_prenorm": x}  # fmt: skip

    def get_intermediate_layers(
        self, images, n=1, reshape=False, return_class_token=False, norm=True
    ):
        """DINOv2's: patch tokens, a tuple of [B, h*w, dim] (reshape: [B, dim, h, w]), of the last n
        blocks or those that n lists; return_class_token pairs them with cls tokens [B, dim]."""
        depth, h = len(self.blocks), images.shape[-2] // self.patch_size
        wanted = range(depth - n, depth) if isinstance(n, int) else n
        if not all(0 <= i < depth for i in wanted):
            raise ValueError(f"n asks for blocks {list(wanted)}; there are {depth}, from 0")
        layers = []
        for x in self._blocks(images, wanted):
            x = self.norm(x) if norm else x
            patches = x[:, 1 + self.registers :]
            patches = patches.mT.unflatten(2, (h, -1)) if reshape else patches
            layers.append((patches, x[:, 0]) if return_class_token else patches)
        return tuple(layers)

    def forward(self, images):  # as torch hub's DINOv2: the normed cls token [B, dim]
        return self.forward_features(images)["x_norm_clstoken"]


# ---------------------------------------------------------------------------- weights and names
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
DINOV3_HASHES = {  # in the names of Meta's files
    "dinov3_vits16": "08c60483", "dinov3_vits16plus": "4057cbaa",
    "dinov3_vitb16": "73cec8be", "dinov3_vitl16": "8aa4cbdd",
}  # fmt: skip
DINOV3_FORM = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"


class WeightsNotFound(ValueError):
    """DINOv2's weights are neither in torch hub's cache nor downloadable."""


def load_vit(name, weights=None, seed=0):
    """A DINOv2 or DINOv3 ViT in eval mode.

    Args:
        name: one of ARCHITECTURES; dinov2's each also with `_reg`, for 4 registers.
        weights: a .pth or .safetensors file with Meta's names (the public files, the released
            Splat and Distill weights, our students), timm's (`vit_*_patch14_dinov2`,
            `vit_*_patch14_reg4_dinov2`, `vit_*_patch16_dinov3`) or, for DINOv3, transformers'
            (`facebook/dinov3-*`); "random"; or None for vit_tiny14's in weights/ and others'
            public ones, from torch hub's cache or, DINOv2's, by download.
        seed: of random weights.

    Raises ValueError: the name is unknown, or the file is missing, no weights file or does not
    fit; WeightsNotFound (a ValueError): DINOv2's are neither cached nor downloadable.
    """
    with torch.device("meta"):  # initialise nothing that the weights replace
        vit = ViT(**sizes_of(name))
    if weights is None:
        weights = SHIPPED_TEACHER if name == "vit_tiny14" else _public_weights(name)
    if weights == "random":
        state = random_state(vit, seed)
    else:
        state = with_metas_names(read_state(weights), vit)
    load_strictly(vit, state, weights)
    return vit.eval()


def sizes_of(name):
    """`ViT`'s arguments for a name, "patch" always among them. ValueError: it is unknown."""
    sizes, registers = ARCHITECTURES.get(name.removesuffix("_reg")), name.endswith("_reg")
    if sizes is None or registers and "registers" in sizes:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"unknown model {name!r}; known are {known}; dinov2's each also with _reg")
    return dict(patch=14) | sizes | (dict(registers=4) if registers else {})


def architecture_of(state, source):
    """The name in ARCHITECTURES that a state dict fits. ValueError: there is none."""
    token = state.get("cls_token", state.get("embeddings.cls_token"))
    dim = token.shape[-1] if token is not None and token.ndim else None
    names = " ".join(state)
    registers = "register_tokens" in names or "reg_token" in names
    rope = "storage_tokens" in names or registers and "pos_embed" not in names
    gated = any(gate in names for gate in (".mlp.w1.", ".mlp.fc1_g.", ".mlp.gate_proj."))
    for name, sizes in ARCHITECTURES.items():
        found = sizes["dim"], sizes.get("rope", False), sizes.get("mlp") is GatedMlp
        if found == (dim, rope, gated):
            return name + ("_reg" if registers and not rope else "")
    raise ValueError(f"{source}: not a DINOv2 or DINOv3: no cls_token of a known width")


def read_state(path):
    """A state dict from a .safetensors file or one that torch.load(weights_only=True) reads."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    damaged = "not a state dict that can be read: it is damaged or holds more than tensors"
    with naming(path, damaged):
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(unpacked(path), map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)  # Lightning's wrapping
        if not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
            raise TypeError
        if any(v.nbytes > v.untyped_storage().nbytes() for v in state.values()):
            raise ValueError("a tensor repeats what the file holds once")
        return state


def read_metadata(path):
    """The metadata {key: text} of a .safetensors file; {} of files in other formats."""
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def load_strictly(module, state, source):
    """Load a state dict as float32 into a module, which may be on the meta device. ValueError: the
    tensors do not fit or are not finite."""
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{source}: NaN or infinite numbers in {name}")
    try:
        module.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    except RuntimeError as error:
        what = textwrap.shorten(str(error).splitlines()[1], 200)
        raise ValueError(f"{source}: does not fit this architecture: {what}") from None


def _public_weights(name):
    """The file of public weights in torch hub's cache; DINOv2's are downloaded if need be."""
    base, dinov3 = name.removesuffix("_reg"), name in DINOV3_HASHES
    file = f"{base}{'_reg4' if name != base else ''}_pretrain.pth"
    if dinov3:
        file = f"{name}_pretrain_lvd1689m-{DINOV3_HASHES[name]}.pth"
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file
    if cached.is_file():
        return cached
    if dinov3:
        raise ValueError(
            f"{name}'s weights are behind a licence form: fill it in at {DINOV3_FORM}, fetch "
            f"{file} and put it in {cached.parent}, or pass the file itself as the weights"
        )
    url = f"https://dl.fbaipublicfiles.com/dinov2/{base}/{file}"
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # torch hub sets none; a firewall may drop packets
    try:
        torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, http.client.HTTPException, pickle.UnpicklingError) as error:
        cached.unlink(missing_ok=True)  # what a proxy or a broken line left
        why = f"{name}'s weights are not in torch hub's cache ({cached}), nor to be downloaded"
        what = f"fetch {url} on another machine and put it there, or pass the file as the weights"
        error = " ".join(str(error).split()).partition(". ")[0]  # torch goes on with advice
        raise WeightsNotFound(f"{why} ({error}): {what}") from None
    finally:
        socket.setdefaulttimeout(timeout)
    return cached


@torch.no_grad()
def random_state(vit, seed):
    """Random weights whose features tell what a token sees: unit variance through every layer, but
    small positions and residuals."""
    generator = torch.Generator().manual_seed(seed)
    state = dict(vit.named_buffers())
    for name, p in vit.named_parameters():
        state[name] = torch.ones(p.shape)
        if p.ndim >= 2:
            std = 1 / math.sqrt(p[0].numel()) if "weight" in name else 0.02
            state[name].normal_(0, std, generator=generator)
        elif not name.endswith("weight"):
            state[name].fill_(0.1 if name.endswith("gamma") else 0.0)
    return state


# Patterns in timm's and transformers' names and Meta's replacements, applied in order
NAMES = (
    (r"^embeddings\.patch_embeddings", "patch_embed.proj"), (r"^embeddings\.register_", "storage_"),
    (r"^embeddings\.", ""), (r"^(model\.)?layer\.", "blocks."),
    (r"attention\.o_proj", "attn.proj"), (r"attention\.", "attn."),
    (r"layer_scale(.)\.lambda1|gamma_(.)", r"ls\1\2.gamma"),
    (r"attn\.(.)_bias", r"attn.\1_proj.bias"),
)  # fmt: skip
MLP_NAMES = {
    Mlp: (("up_proj", "fc1"), ("down_proj", "fc2")),
    SwiGLU: ((r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3")),
    GatedMlp: (("gate_proj|fc1_g", "w1"), ("up_proj|fc1_x", "w2"), ("down_proj|fc2", "w3")),
}


def with_metas_names(state, vit):
    """A state dict with Meta's names and layout, from one with Meta's, timm's or transformers'."""
    foreign = {"reg_token", "embeddings.cls_token"} & state.keys()  # timm's, transformers'
    names = (*NAMES, *MLP_NAMES[type(vit.blocks[0].mlp)], ("reg_token", vit.register_name))
    metas = {}
    for name, tensor in state.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        metas[name] = tensor
    if foreign and vit.rope_embed is not None:
        metas |= dict(vit.named_buffers())
        for i in range(len(vit.blocks)):
            join_qkv(metas, f"blocks.{i}.attn.", vit.embed_dim)
    position = metas.get("pos_embed")
    if position is not None and position.shape[1:2] == (37 * 37,):
        metas["pos_embed"] = F.pad(position, (0, 0, 1, 0))  # timm adds cls's to its token
    mask = metas.get("mask_token", torch.zeros(vit.embed_dim))  # timm drops it
    return metas | {"mask_token": mask.reshape(1, -1)}  # transformers' is [1, 1, dim]


def join_qkv(state, attention, dim):
    """Join the weights and biases of queries, keys and values, in place. What does not fit stays,
    for `load_strictly` to name."""
    missing = torch.zeros(dim)  # of a bias: keys ("-") have none, others may be left out
    for kind, parts, shape in (("weight", "qkv", (dim, dim)), ("bias", "q-v", (dim,))):
        names = [f"{attention}{part}_proj.{kind}" for part in parts]
        tensors = [state.get(name, missing) for name in names]
        joined = f"{attention}qkv.{kind}"
        if joined not in state and all(t.shape == shape for t in tensors):
            state[joined] = torch.cat(tensors)
            for name in names:
                state.pop(name, None)
