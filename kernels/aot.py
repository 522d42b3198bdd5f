"""What the compiler makes of every kernel, on any machine: python -m kernels.bench --compile 90"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import TILE, mixture, projection, tiles
from .launch import KERNELS, launch_options

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
# Arguments that are neither float32 pointers nor int32 numbers
TYPES = dict.fromkeys(("gaussians_ptr", "last_ptr", "indices_ptr", "bad_ptr"), "*i32")
TYPES |= dict.fromkeys(("offsets_ptr", "range_ptr", "number_ptr", "keys_ptr"), "*i64")
TYPES |= dict.fromkeys(("sorted_ptr", "merged_ptr"), "*i32") | dict(next_ptr="*i64")
TYPES |= dict.fromkeys(("near_plane", "far_plane", "eps2d"), "fp32")
FEATURES = "features_ptr", "tokens_ptr", "out_ptr", "v_out_ptr"
# Triton compiles anew for numbers that are 1, as V in the paper, and for multiples of 16, as these
# are there. What runs there has other registers than what takes any size.
MULTIPLES = "N", "size", "C", "width", "height", "count"


def kernels():
    """(name, kernel, its constants, type of the features, numbers that are multiples of 16)"""
    pairs = dict(TILE=TILE, BLOCK=tiles.BLOCK, FEW=tiles.FEW)
    for kernel, name, constants in (
        (projection.project_forward_kernel, "", dict(BLOCK=projection.BLOCK)),
        (projection.project_backward_kernel, "", dict(BLOCK=projection.BLOCK)),
        (tiles.pair_kernel, " count", dict(pairs, PLACE=False, keys_ptr=None)),
        (tiles.pair_kernel, " place", dict(pairs, PLACE=True)),
        (tiles.sort_kernel, "", dict(RUN=tiles.RUN, range_ptr=None, number_ptr=None)),
        (tiles.merge_kernel, "", dict(RUN=tiles.RUN)),
        (mixture.check_kernel, "", dict(BLOCK=mixture.BLOCK)),
    ):
        yield kernel.__name__ + name, kernel, constants, "*fp32", MULTIPLES
    types = {p: (torch.float32, "*fp32", p) for p in ("tf32", "tf32x3", "ieee")}
    types |= {"fp16": (torch.float16, "*fp16", "tf32"), "bf16": (torch.bfloat16, "*bf16", "tf32")}
    for word, (dtype, pointer, precision) in types.items():
        for kernel, name, constants, multiples in blend_kernels(dtype, precision):
            yield f"{kernel.__name__} {word}{name}", kernel, constants, pointer, multiples


def blend_kernels(dtype, precision):
    """(kernel, name, constants, numbers that are multiples of 16)"""
    odd_C = [m for m in MULTIPLES if m != "C"]
    for C, J, name, known, multiples in (
        (384, 0, "", dict(V=1), MULTIPLES),
        (384, 4, "", dict(V=1), MULTIPLES),
        (3, 0, ", C = 3", dict(V=1), odd_C),
        (3, 0, ", any size", {}, ()),
    ):
        forward, backward = (
            launch_options(C, dtype, J, TILE, precision, backward) | known
            for backward in (False, True)
        )
        kernel = KERNELS[False, J > 0]
        if known:
            yield kernel, name, forward | dict(SAVE=False), multiples
        yield kernel, name + ", saving" * (len(known)), forward | dict(SAVE=True), multiples
        yield KERNELS[True, J > 0], name, backward, multiples


def tool(name, cubin, *flags):
    """What one of CUDA's tools, which come with Triton, prints of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BINARIES / name, *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin):
    """Registers, stack bytes (where spilled registers go) and shared memory, by the assembler."""
    usage = tool("cuobjdump", cubin, "--dump-resource-usage")
    return {key.lower(): int(n) for key, n in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}


def loops(cubin):
    """(first, last) instruction of every loop, from the disassembly: a branch back to a label."""
    number, labels, found = 0, {}, set()
    for line in tool("nvdisasm", cubin, "-c").splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = number
        elif re.match(r"\s*/\*[0-9a-f]+\*/\s+\S", line):
            target = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
            if target and labels.get(target[1], number) < number:
                found.add((labels[target[1]], number))
            number += 1
    return found


def issue_slots(cubin, constants):
    """Instructions that a warp issues per pixel and Gaussian, times its 32 lanes, while a tile's
    Gaussians are walked, K a turn. Dense: of the longest loop, with a loop over channels inside as
    often as it turns. Mixtures: of the longest loop that holds no other, and of the loop before it
    that lists tokens, with the loop inside that a new token takes."""
    found = {loop: loop[1] - loop[0] + 1 for loop in loops(cubin)}
    if "SLOTS" in constants:
        holding = {a for a in found for b in found if a != b and a[0] <= b[0] and b[1] <= a[1]}
        walk = max(found.keys() - holding, key=found.get)
        listing = sum(found[a] for a in holding if a[1] < walk[0])
        instructions = found[walk] + listing * constants["KI"] * 4 / mixture.LISTED.value
    else:
        walk = max(found, key=found.get)
        inner = [n for a, n in found.items() if a != walk and walk[0] <= a[0] and a[1] <= walk[1]]
        instructions = found[walk] + (constants["BLOCKS"] - 1) * sum(inner)
    pairs = constants["TILE"] ** 2 * constants["KI"] * 4
    return instructions * 32 * constants["num_warps"] / pairs


def compile_report(targets):
    """A row for every kernel and target: its resources, how many tensor-core instructions and, of
    blending, `issue_slots`."""
    for target in targets:
        for name, kernel, constants, features, multiples in kernels():
            options = dict(enable_fp_fusion=True, num_warps=constants.get("num_warps", 4))
            options |= dict(num_stages=constants.get("num_stages", 3))
            values = {n: value for n, value in constants.items() if n in kernel.arg_names}
            size = "i32" if "TILE" in values and "BLOCK" not in values else "fp32"
            special = TYPES | dict.fromkeys(FEATURES, features) | dict(width=size, height=size)
            special |= dict.fromkeys(values, "constexpr")
            types = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
            types = {n: special.get(n, usual) for n, usual in types.items()}
            # torch aligns tensors to 16 bytes
            known = [n for n, t in types.items() if t[0] == "*" or t == "i32" and n in multiples]
            aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in known}
            source = ASTSource(kernel, types, values, aligned)
            compiled = triton.compile(source, GPUTarget("cuda", target, 32), options)
            products = re.findall(r"wgmma\.mma_async|(?<!\.)\bmma\.sync", compiled.asm["ptx"])
            row = dict(kernel=name, target=target, tensor_core=len(products))
            row |= resources(compiled.asm["cubin"]) | dict(shared=compiled.metadata.shared)
            if "KI" in values:
                row["slots"] = round(issue_slots(compiled.asm["cubin"], constants), 1)
            yield row
