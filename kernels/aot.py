"""What the compiler makes of every kernel, on any machine: python -m kernels.bench --compile 90"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import TILE, blend, projection, tiles

# Arguments that are neither float32 pointers nor int32 numbers
TYPES = dict.fromkeys(("gaussians_ptr", "last_ptr", "indices_ptr"), "*i32")
TYPES |= dict.fromkeys(("ranges_ptr", "range_ptr", "number_ptr", "keys_ptr"), "*i64")
TYPES |= dict.fromkeys(("sorted_ptr", "merged_ptr", "next_ptr"), "*i64")
TYPES |= dict.fromkeys(("near_plane", "far_plane", "eps2d"), "fp32")
FEATURES = "features_ptr", "out_ptr", "v_out_ptr"
# Triton compiles anew for numbers that are 1, as V in the paper, and for multiples of 16, as these
# are there. What runs there has other registers than what takes any size.
MULTIPLES = "N", "size", "C", "width", "height", "tiles", "count"


def kernels():
    """(name, kernel, constants, type of the features, numbers that are multiples of 16)"""
    box = dict(TILE=TILE, BLOCK=tiles.BLOCK)
    for kernel, name, constants in (
        (projection.project_forward_kernel, "", dict(BLOCK=projection.BLOCK)),
        (projection.project_backward_kernel, "", dict(BLOCK=projection.BLOCK)),
        (tiles.pair_kernel, " count", dict(box, PLACE=False, keys_ptr=None)),
        (tiles.pair_kernel, " place", dict(box, PLACE=True)),
        (tiles.sort_kernel, "", dict(RUN=tiles.RUN)),
        (tiles.merge_kernel, "", dict(RUN=tiles.RUN)),
    ):
        yield kernel.__name__ + name, kernel, constants, "*fp32", MULTIPLES
    for J in (0, 4):
        yield from blend_kernels(blend.blend_forward_kernel, blend.FORWARD, J)
        block = blend.BACKWARD_MIXED if J else blend.BACKWARD
        yield from blend_kernels(blend.blend_backward_kernel, block, J)


def blend_kernels(kernel, block, J):
    """As `kernels`, for every type of features, dense (J = 0) or mixtures of J tokens."""
    types = {p: (torch.float32, "*fp32", p) for p in ("tf32", "tf32x3", "ieee")}
    types |= {"fp16": (torch.float16, "*fp16", "tf32"), "bf16": (torch.bfloat16, "*bf16", "tf32")}
    # Dense features have as many rows as there are Gaussians; tokens are 2 x 41 x 62
    multiples = MULTIPLES if J else (*MULTIPLES, "M")
    for word, (dtype, pointer, precision) in types.items():
        name = f"{kernel.__name__} {word}" + " factored" * (J > 0)
        options = blend.launch_options(block, 384, dtype, TILE, precision, J, interpret=False)
        options |= {} if J else dict(indices_ptr=None, mix_ptr=None)
        yield name, kernel, options | dict(V=1), pointer, multiples
        if word == "tf32":
            yield name + ", any size", kernel, options, pointer, ()
            odd = [m for m in multiples if m != "C"]
            yield name + ", C = 3", kernel, options | dict(V=1, BLOCK_C=16), pointer, odd


def resources(cubin):
    """Registers, stack bytes (where spilled registers go) and shared memory, by the assembler."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(n) for key, n in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}


def compile_report(targets):
    """A row for every kernel and target: its resources and how many tensor-core instructions."""
    for target in targets:
        for name, kernel, constants, features, multiples in kernels():
            options = dict(num_warps=constants.get("num_warps", 4))
            constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
            size = "i32" if "blend" in name else "fp32"
            special = TYPES | dict.fromkeys(FEATURES, features) | dict(width=size, height=size)
            special |= dict.fromkeys(constants, "constexpr")
            types = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
            types = {n: special.get(n, usual) for n, usual in types.items()}
            # torch aligns tensors to 16 bytes
            known = [n for n, t in types.items() if t[0] == "*" or t == "i32" and n in multiples]
            aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in known}
            source = ASTSource(kernel, types, constants, aligned)
            compiled = triton.compile(source, GPUTarget("cuda", target, 32), options)
            products = re.findall(r"wgmma\.mma_async|(?<!\.)\bmma\.sync", compiled.asm["ptx"])
            found = resources(compiled.asm["cubin"]) | dict(shared=compiled.metadata.shared)
            yield dict(kernel=name, target=target, tensor_core=len(products), **found)
