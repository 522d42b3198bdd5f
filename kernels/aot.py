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
from .blend import KO
from .launch import KERNELS, launch_options

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
# Arguments that are neither float32 pointers nor int32 numbers
TYPES = {
    "*i32": "gaussians_ptr last_ptr indices_ptr bad_ptr sorted_ptr merged_ptr rows_ptr labels_ptr",
    "*i64": "offsets_ptr range_ptr number_ptr keys_ptr next_ptr",
    "fp32": "near_plane far_plane eps2d",
}
TYPES = {name: kind for kind, names in TYPES.items() for name in names.split()}
FEATURES = "features_ptr", "tokens_ptr", "out_ptr", "v_out_ptr"
WHOLE = dict.fromkeys(("rows_ptr", "labels_ptr", "sums_ptr", "v_sums_ptr"))  # of whole images
# Triton compiles other code for numbers that are 1, such as the paper's V, and for multiples of 16
MULTIPLES = "N", "size", "C", "width", "height", "count"
OPTIONS = dict(num_warps=4, num_stages=3, enable_fp_fusion=True)  # where a kernel sets no others


def kernels(target):
    """(name, kernel, constants, type of the features, numbers that are multiples of 16)"""
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
        for C, J, size, multiples in (
            (384, 0, "", MULTIPLES),
            (384, 4, "", MULTIPLES),
            (3, 0, ", C = 3", [m for m in MULTIPLES if m != "C"]),
            (100, 0, ", parts of any size", ()),
            (100, 4, ", parts of any size", ()),
        ):
            usual = WHOLE | dict(V=1) if multiples else {}
            options = launch_options(C, dtype, J, TILE, precision) | usual
            kernel = KERNELS[False, J > 0]
            name, saving = f"{kernel.__name__} {word}{size}", ", saving" if multiples else ""
            if multiples:
                yield name, kernel, options | dict(SAVE=False), pointer, multiples
            yield name + saving, kernel, options | dict(SAVE=True), pointer, multiples
            options = launch_options(C, dtype, J, TILE, precision, True, target >= 90) | usual
            kernel = KERNELS[True, J > 0]
            yield f"{kernel.__name__} {word}{size}", kernel, options, pointer, multiples


def tool(name, cubin, *flags):
    """What one of the CUDA tools in Triton prints about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BINARIES / name, *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin):
    """Registers, stack (spilled registers) and shared memory in bytes, by the assembler."""
    usage = tool("cuobjdump", cubin, "--dump-resource-usage")
    return {key.lower(): int(n) for key, n in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}


def loops(cubin):
    """(first, last) instruction of every loop: a branch back to a label, in the disassembly."""
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
    """Instructions that a warp issues per pixel and Gaussian, times its 32 lanes, in the walk over
    a tile's Gaussians, K per turn.

    Dense: the longest loop, its inner loop over channels counted BLOCKS times. Mixtures: the
    longest innermost loop, and the nest before it that lists tokens, LISTED Gaussians per turn.
    """
    lengths = {loop: loop[1] - loop[0] + 1 for loop in loops(cubin)}

    def holds(a, b):
        return a != b and a[0] <= b[0] and b[1] <= a[1]

    K = constants["KI"] * KO.value
    if "SLOTS" in constants:
        outer = {a for a in lengths if any(holds(a, b) for b in lengths)}
        walk = max(lengths.keys() - outer, key=lengths.get)
        listing = sum(lengths[a] for a in outer if a[1] < walk[0])
        instructions = lengths[walk] + listing * K / mixture.LISTED.value
    else:
        walk = max(lengths, key=lengths.get)
        inner = sum(length for a, length in lengths.items() if holds(walk, a))
        instructions = lengths[walk] + (constants["BLOCKS"] - 1) * inner
    pairs = constants["TILE"] ** 2 * K
    return instructions * 32 * constants["num_warps"] / pairs


def compile_report(targets):
    """A row for every kernel and target: its resources, tensor-core instructions and, of blending,
    `issue_slots`."""
    for target in targets:
        for name, kernel, constants, features, multiples in kernels(target):
            values = {n: value for n, value in constants.items() if n in kernel.arg_names}
            types = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
            known = TYPES | dict.fromkeys(FEATURES, features) | dict.fromkeys(values, "constexpr")
            if "KI" not in values:  # only blending takes integers
                known |= dict(width="fp32", height="fp32")
            types |= {n: kind for n, kind in known.items() if n in types}
            # torch aligns tensors to 16 bytes
            aligned = [n for n, t in types.items() if t[0] == "*" or t == "i32" and n in multiples]
            aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
            source = ASTSource(kernel, types, values, aligned)
            options = {n: constants.get(n, usual) for n, usual in OPTIONS.items()}
            compiled = triton.compile(source, GPUTarget("cuda", target, 32), options)
            products = re.findall(r"wgmma\.mma_async|(?<!\.)\bmma\.sync", compiled.asm["ptx"])
            row = dict(kernel=name, target=target, tensor_core=len(products))
            row |= resources(compiled.asm["cubin"]) | dict(shared=compiled.metadata.shared)
            if "KI" in values:
                row["slots"] = round(issue_slots(compiled.asm["cubin"], constants), 1)
            yield row
