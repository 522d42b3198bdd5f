"""What the compiler makes of every kernel, on any machine: registers, spills, shared memory, tensor cores.

Printed by python -m kernels.bench where there is no GPU, and looked at by tests/test_bench.py.
"""

import os
import re
import subprocess
import tempfile

import torch

from . import TILE, blend, projection, tiles

INTEGERS = {"gaussians_ptr": "*i32", "last_ptr": "*i32", "counts_ptr": "*i32", "indices_ptr": "*i32"}
INTEGERS |= {k: "*i64" for k in "ranges_ptr range_ptr number_ptr keys_ptr sorted_ptr merged_ptr next_ptr".split()}
FEATURES = ("features_ptr", "out_ptr", "v_out_ptr")
FLOATS = ("near_plane", "far_plane", "eps2d")
# Sizes at the paper's workload. Triton compiles anew for an argument that is 1, a constant then, and for those that are
# multiples of 16; what runs there has other registers than what takes any size.
PAPER = {"V": 1, "N": 1_013_760, "size": 1_013_760, "C": 384, "width": 880, "height": 576, "tiles": 7920, "count": 7920}
MULTIPLES = [name for name, size in PAPER.items() if size % 16 == 0]
DENSE = {"indices_ptr": None, "mix_ptr": None}  # features that are no mixtures come without factors


def kernels():
    """(name, kernel, constants, options, type of the features, sizes that are multiples of 16)"""
    for kernel in (projection.project_forward_kernel, projection.project_backward_kernel):
        yield kernel.__name__, kernel, dict(BLOCK=projection.BLOCK), {}, "*fp32", MULTIPLES
    for kernel in (tiles.count_kernel, tiles.place_kernel):
        yield kernel.__name__, kernel, dict(TILE=TILE, BLOCK=tiles.BLOCK), {}, "*fp32", MULTIPLES
    for kernel in (tiles.sort_kernel, tiles.merge_kernel):
        yield kernel.__name__, kernel, dict(RUN=tiles.RUN), {}, "*fp32", MULTIPLES
    types = {p: (torch.float32, "*fp32", p) for p in ("tf32", "tf32x3", "ieee")}
    types |= {"fp16": (torch.float16, "*fp16", "tf32"), "bf16": (torch.bfloat16, "*bf16", "tf32")}
    blocks = {blend.blend_forward_kernel: (blend.FORWARD, blend.FORWARD),
              blend.blend_backward_kernel: (blend.BACKWARD, blend.BACKWARD_MIXED)}  # fmt: skip
    for kernel, of_kind in blocks.items():
        for J, block in zip((0, 4), of_kind):
            for word, (dtype, pointer, precision) in types.items():
                name = f"{kernel.__name__} {word}" + " factored" * (J > 0)
                constants = blend.launch_options(block, 384, dtype, TILE, precision, J, interpret=False)
                options = dict(num_warps=constants.pop("num_warps"))
                constants |= {} if J else DENSE
                # Features have as many rows as there are Gaussians; tokens are 2 x 41 x 62
                multiples = MULTIPLES + ["M"] * (J == 0)
                yield name, kernel, constants | {"V": 1}, options, pointer, multiples
                if word == "tf32":
                    yield name + ", any size", kernel, constants, options, pointer, ()
                    few, multiples = {"V": 1, "BLOCK_C": 16}, [n for n in multiples if n != "C"]
                    yield name + ", C = 3", kernel, constants | few, options, pointer, multiples


def signature(kernel, constants, features):
    def type_of(name):
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return features if name in FEATURES else INTEGERS.get(name, "*fp32")
        if name in FLOATS or name in ("width", "height") and "blend" not in kernel.__name__:
            return "fp32"
        return "i32"

    return {name: type_of(name) for name in kernel.arg_names}


def resources(cubin):
    """Registers, stack bytes (where spilled registers go) and shared memory, as the assembler says."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage.stdout)}


def compile_report(targets):
    """A row for every kernel and target: registers, stack, shared memory, and how many tensor-core instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for target in targets:
        for name, kernel, constants, options, features, multiples in kernels():
            types = signature(kernel, constants, features)
            known = [n for n, t in types.items() if t[0] == "*" or t == "i32" and n in multiples]  # torch aligns to 16
            aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in known}
            source = ASTSource(kernel, types, constants, aligned)
            compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
            matrix = len(re.findall(r"wgmma\.mma_async|(?<!\.)\bmma\.sync", compiled.asm["ptx"]))
            found = resources(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}
            yield dict(kernel=name, target=target, tensor_core=matrix, **found)
