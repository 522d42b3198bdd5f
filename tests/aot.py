"""Compile every kernel for real GPUs on a machine that may have none; prints one JSON object per kernel and target.

Run by test_compile.py in a process without TRITON_INTERPRET, which has to be decided before triton is imported.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import TILE, blend, projection, tiles  # noqa: E402

INTEGERS = {"gaussians_ptr": "*i32", "last_ptr": "*i32", "counts_ptr": "*i32"}
INTEGERS |= {"ranges_ptr": "*i64", "keys_ptr": "*i64", "ends_ptr": "*i64"}
FEATURES = ("features_ptr", "out_ptr", "v_out_ptr")
FLOATS = ("near_plane", "far_plane", "eps2d")


def kernels():
    """(name, kernel, constants, options, type of the features)"""
    for kernel in (projection.project_forward_kernel, projection.project_backward_kernel):
        yield kernel.__name__, kernel, dict(BLOCK=projection.BLOCK), {}, "*fp32"
    yield "count_kernel", tiles.count_kernel, dict(TILE=TILE, BLOCK=tiles.BLOCK), {}, "*fp32"
    yield "emit_kernel", tiles.emit_kernel, dict(TILE=TILE, BLOCK=tiles.BLOCK), {}, "*fp32"
    yield "range_kernel", tiles.range_kernel, dict(BLOCK=tiles.BLOCK), {}, "*fp32"
    for dtype, pointer in ((torch.float32, "*fp32"), (torch.float16, "*fp16"), (torch.bfloat16, "*bf16")):
        for kernel, block in (
            (blend.blend_forward_kernel, blend.FORWARD),
            (blend.blend_backward_kernel, blend.BACKWARD),
        ):
            constants = blend.launch_options(block, 384, dtype, TILE, interpret=False)
            options = dict(num_warps=constants.pop("num_warps"))
            yield f"{kernel.__name__} {pointer[1:]}", kernel, constants, options, pointer
            # Training has one target view a scene, and Triton makes a constant of an argument that is 1
            yield f"{kernel.__name__} {pointer[1:]} V=1", kernel, constants | {"V": 1}, options, pointer


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
    """Registers and stack bytes (where spilled registers go), as the assembler says."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage.stdout)}


for target in map(int, sys.argv[1:]):
    for name, kernel, constants, options, features in kernels():
        # As at run time, where torch's allocations are 16-byte aligned
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n.endswith("_ptr")}
        source = ASTSource(kernel, signature(kernel, constants, features), constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        matrix = len(re.findall(r"\b(?:mma|wgmma)\S*\.sync", compiled.asm["ptx"]))
        print(
            json.dumps(dict(kernel=name, target=target, tensor_core=matrix, **resources(compiled.asm["cubin"]))),
            flush=True,
        )
