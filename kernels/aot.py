"""What the compiler makes of every kernel, on any machine: `python -m kernels.bench --compile 90`

Registers, spills, shared memory and tensor cores. tests/test_bench.py looks at them too.
"""

import os
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import TILE, blend, projection, tiles

# The types of the arguments, unless float32 pointers and int32 numbers
FEATURES = {"features_ptr", "out_ptr", "v_out_ptr"}
INT32 = {"gaussians_ptr", "last_ptr", "indices_ptr"}
INT64 = {"ranges_ptr", "range_ptr", "number_ptr"}
INT64 |= {"keys_ptr", "sorted_ptr", "merged_ptr", "next_ptr"}
FLOATS = {"near_plane", "far_plane", "eps2d"}
# Triton compiles anew for numbers that are 1, as the paper's V, and for multiples of 16, as these
# of the paper's sizes. What runs there has other registers than what takes any size.
MULTIPLES = ["N", "size", "C", "width", "height", "tiles", "count"]


def kernels():
    """(name, kernel, constants, warps, type of the features, numbers that are multiples of 16)"""
    box = dict(TILE=TILE, BLOCK=tiles.BLOCK)
    for name, kernel, constants in (
        ("", projection.project_forward_kernel, dict(BLOCK=projection.BLOCK)),
        ("", projection.project_backward_kernel, dict(BLOCK=projection.BLOCK)),
        (" count", tiles.pair_kernel, dict(box, PLACE=False, keys_ptr=None)),
        (" place", tiles.pair_kernel, dict(box, PLACE=True)),
        ("", tiles.sort_kernel, dict(RUN=tiles.RUN)),
        ("", tiles.merge_kernel, dict(RUN=tiles.RUN)),
    ):
        yield kernel.__name__ + name, kernel, constants, 4, "*fp32", MULTIPLES
    for J in (0, 4):
        yield from blend_kernels(blend.blend_forward_kernel, blend.FORWARD, J)
        block = blend.BACKWARD_MIXED if J else blend.BACKWARD
        yield from blend_kernels(blend.blend_backward_kernel, block, J)


def blend_kernels(kernel, block, J):
    """As `kernels`: one blending kernel for every type of features, dense or mixtures of J."""
    types = {p: (torch.float32, "*fp32", p) for p in ("tf32", "tf32x3", "ieee")}
    types |= {"fp16": (torch.float16, "*fp16", "tf32"), "bf16": (torch.bfloat16, "*bf16", "tf32")}
    # Dense features have as many rows as there are Gaussians; tokens are 2 x 41 x 62
    multiples = MULTIPLES if J else [*MULTIPLES, "M"]
    for word, (dtype, pointer, precision) in types.items():
        name = f"{kernel.__name__} {word}" + " factored" * (J > 0)
        options = blend.launch_options(block, 384, dtype, TILE, precision, J, interpret=False)
        warps = options.pop("num_warps")
        options |= {} if J else {"indices_ptr": None, "mix_ptr": None}
        yield name, kernel, options | {"V": 1}, warps, pointer, multiples
        if word == "tf32":
            yield name + ", any size", kernel, options, warps, pointer, ()
            few, odd = {"V": 1, "BLOCK_C": 16}, [m for m in multiples if m != "C"]
            yield name + ", C = 3", kernel, options | few, warps, pointer, odd


def type_of(name, kernel, features):
    if name.endswith("_ptr"):
        return features if name in FEATURES else (
            "*i32" if name in INT32 else "*i64" if name in INT64 else "*fp32"
        )
    size = name in ("width", "height") and "blend" not in kernel.__name__
    return "fp32" if size or name in FLOATS else "i32"


def resources(cubin):
    """Registers, stack bytes (where spilled registers go) and shared memory, by the assembler."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(n) for key, n in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}


def compile_report(targets):
    """A row for every kernel and target: its resources and how many tensor-core instructions."""
    for target in targets:
        for name, kernel, constants, warps, features, multiples in kernels():
            types = {n: type_of(n, kernel, features) for n in kernel.arg_names}
            types |= {n: "constexpr" for n in constants}
            # torch aligns tensors to 16 bytes
            known = [n for n, t in types.items() if t[0] == "*" or t == "i32" and n in multiples]
            aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in known}
            compiled = triton.compile(
                ASTSource(kernel, types, constants, aligned),
                target=GPUTarget("cuda", target, 32), options=dict(num_warps=warps),
            )  # fmt: skip
            found = resources(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}
            products = re.findall(r"wgmma\.mma_async|(?<!\.)\bmma\.sync", compiled.asm["ptx"])
            yield dict(kernel=name, target=target, tensor_core=len(products), **found)
