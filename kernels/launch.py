"""The blending kernels as one differentiable operator, of dense features or of a mixture."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreted
from .blend import blend_backward_kernel, blend_forward_kernel
from .mixture import mixture_backward_kernel, mixture_forward_kernel

KERNELS = {  # (backward, mixture)
    (False, False): blend_forward_kernel,
    (False, True): mixture_forward_kernel,
    (True, False): blend_backward_kernel,
    (True, True): mixture_backward_kernel,
}


def launch_options(C, dtype, J, tile, precision, backward=False, hopper=True):
    """Keyword arguments of a kernel for C channels; J tokens per Gaussian, or 0 if dense. hopper:
    whether the GPU is of sm_90 or later.

    Chosen by counting instructions for sm_90 (`python -m kernels.bench`); no GPU has timed them.
    Weights are rounded to the features' dtype, sums are float32. Triton's interpreter multiplies
    bfloat16 wrongly and float32 exactly, so there everything is float32.
    """
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    options = dict(TILE=tile, DTYPE=types[dtype], PRECISION=precision, FAST=True)
    if interpreted():
        options |= dict(DTYPE=tl.float32, PRECISION="ieee", FAST=False)
    half = dtype != torch.float32
    exact = not half and precision != "tf32"  # takes more registers
    padded = max(16, triton.next_power_of_2(C))  # tl.dot needs 16
    options |= dict(num_warps=4, num_stages=1)
    if J:
        long = hopper and not exact if backward else half  # chunks of 64 Gaussians, not 32
        options |= dict(J=J, J_UP=triton.next_power_of_2(J), SLOTS=16 if exact else 32)
        options |= dict(BLOCK_C=min(padded, 16 if exact else 32))
        options |= dict(num_stages=1 if backward else 2)
    elif backward:
        long = not exact and (hopper or not half)
        # Older tensor cores hold operands in registers: 32 channels in TF32 would spill 600 bytes
        block_c = min(padded, 64 if half else 32 if exact or hopper else 16)
        blocks = triton.cdiv(C, block_c)
        # In half precision 6 blocks of v_out leave shared memory for a second program
        held = min(blocks, 6) if hopper and half else int(blocks == 1)
        options |= dict(BLOCK_C=block_c, BLOCKS=blocks, HELD=held)
    else:
        wide = C > 64 and not exact
        long = half or not (exact or wide)
        block_c = min(padded, 128 if wide else 32 if exact else 64)
        options |= dict(BLOCK_C=block_c)
        options |= dict(BLOCKS=min(triton.cdiv(C, block_c), 3) if wide else 1)
        options |= dict(num_warps=8 if wide else 4)
    options |= dict(KI=16 if long else 8)
    return options | dict(enable_fp_fusion=True)


def launch(backward, inputs, others, V, width, height, tile, precision, **options):
    """Run a kernel: one program per tile and, if dense, per BLOCK_C * BLOCKS channels."""
    splats, tokens, indices, *_ = inputs
    (I, N, _), (_, M, C) = splats.shape, tokens.shape
    J = 0 if indices is None else indices.shape[-1]
    hopper = not splats.is_cuda or torch.cuda.get_device_capability(splats.device) >= (9, 0)
    options |= launch_options(C, tokens.dtype, J, tile, precision, backward, hopper)
    parts = 1 if J else triton.cdiv(C, options["BLOCK_C"] * options["BLOCKS"])
    grid = I * triton.cdiv(width, tile) * triton.cdiv(height, tile), parts
    inputs = inputs if J else (splats, tokens, *inputs[4:])
    sizes = (N, M, C) if J else (N, C)
    if I:
        with torch.cuda.device_of(splats):  # triton launches on the current device
            kernel = KERNELS[backward, J > 0]
            kernel[grid](*inputs, *others, *sizes, V, width, height, **options)


def new_images(splats, tokens, width, height, rows, labels):
    """Empty features, alphas, transmittance and last, and sums of 0."""
    image, C = splats.new_empty(len(splats), height, width), tokens.shape[-1]
    features, sums = tokens.new_empty(rows, C), splats.new_zeros(labels, C)
    last = torch.empty_like(image, dtype=torch.int32)
    return features, sums, image, torch.empty_like(image), last


@torch.library.custom_op("splat::blend", mutates_args=())
def blend(
    splats: Tensor, tokens: Tensor, indices: Tensor | None, mix: Tensor | None,
    gaussians: Tensor, offsets: Tensor, rows: Tensor | None, labels: Tensor | None,
    V: int, width: int, height: int, tile: int, precision: str, save: bool, R: int, L: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous tensors, shaped as the kernels'. Differentiable: splats and tokens.

    tokens: features [B, N, C]; or, with indices and mix, the tokens [B, M, C] of a mixture.
    rows: of each pixel [I, H, W] int32 its row 0..R-1 of the output, -1: none; or None: all pixels
    in their order. labels: of each pixel [I, H, W] int32 its label 0..L-1, or None.
    Returns features [R, C] in their dtype, sums of features over each label's pixels [L, C]
    float32, alphas [I, H, W] and, for a backward pass (if save), transmittance and last [I, H, W].
    """
    inputs = splats, tokens, indices, mix, gaussians, offsets, rows, labels
    images = new_images(splats, tokens, width, height, R, L)
    features, sums, *others = images
    others = features, None if labels is None else sums, *others
    launch(False, inputs, others, V, width, height, tile, precision, SAVE=save)
    return images


def new_gradients(splats, tokens, of_splats, of_tokens):
    """Zeros to add to, float32: half-precision atomics are slow and lose digits. Empty where not
    wanted."""
    options = dict(dtype=torch.float32, device=splats.device)
    both = (splats, of_splats), (tokens, of_tokens)
    return tuple(torch.zeros(t.shape if wanted else 0, **options) for t, wanted in both)


@torch.library.custom_op("splat::blend_backward", mutates_args=())
def blend_backward(
    splats: Tensor, tokens: Tensor, indices: Tensor | None, mix: Tensor | None,
    gaussians: Tensor, offsets: Tensor, rows: Tensor | None, labels: Tensor | None,
    transmittance: Tensor, last: Tensor, v_features: Tensor, v_sums: Tensor, v_alphas: Tensor,
    V: int, width: int, height: int, tile: int, precision: str, of_splats: bool, of_tokens: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients with respect to splats and tokens, float32; empty where not wanted."""
    v_splats, v_tokens = v = new_gradients(splats, tokens, of_splats, of_tokens)
    inputs = splats, tokens, indices, mix, gaussians, offsets, rows, labels
    v_sums = None if labels is None else v_sums.contiguous()
    others = transmittance, last, v_features.contiguous(), v_sums, v_alphas.contiguous()
    others += v_splats if of_splats else None, v_tokens if of_tokens else None
    launch(True, inputs, others, V, width, height, tile, precision)
    return v


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8], *output[3:])
    ctx.rest = inputs[8:-3]


def _backward(ctx, *v_outputs):
    wanted = ctx.needs_input_grad[:2]
    v = blend_backward(*ctx.saved_tensors, *v_outputs[:3], *ctx.rest, *wanted)
    v = [v.to(t.dtype) if w else None for v, t, w in zip(v, ctx.saved_tensors, wanted)]
    return *v, *[None] * 14


blend.register_fake(lambda *inputs: new_images(*inputs[:2], *inputs[9:11], *inputs[-2:]))
blend.register_autograd(_backward, setup_context=_save)
blend_backward.register_fake(lambda *inputs: new_gradients(*inputs[:2], *inputs[-2:]))
