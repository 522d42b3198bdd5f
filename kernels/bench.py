"""How fast, against whom, and how far from what the hardware allows: python -m kernels.bench

On a GPU, for every workload: forward and forward + backward (median and spread), peak memory beyond inputs and outputs,
and the ratio to every peer at hand: gsplat (if it can be imported), the same scene three channels at a time (as the
paper's code does), the torch backend. Without a GPU: the torch backend on small sizes, and what the compiler makes of
every kernel for sm_80 and sm_90 (registers, spills, shared memory, tensor cores). Everything goes to bench.json, or to
--out FILE, with device, versions and date.

    paper   2 x 576 x 880 pixel-aligned Gaussians, C = 384 and 768, one target of 576 x 880
    demo    2 x 224 x 224, C = 384, one target of 224 x 224
    scene   a garden of 138,766 points, 3 views of 648 x 420, C = 3, 32, 384 (--garden FILE; else one made up alike)
    batch   8 scenes of the demo in one call
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from . import TILE, Mixture, _interpreted, rasterize

REPEATS = 20
# What the floor is reckoned with: bytes/s of memory, and float operations/s of TF32 products
RATES = {"H100": (3.35e12, 495e12), "H200": (4.8e12, 495e12), "A100": (1.55e12, 156e12)}


# ----------------------------------------------------------------------------- workloads


def pixel_aligned(B, height, width, device, views=2, seed=0):
    """Scenes as distillation splats them: one Gaussian per pixel of `views` photos of a bumpy wall 3 m ahead, half a
    pixel wide, seen by a third camera between. Returns rasterize's arguments but for the features."""
    g = torch.Generator().manual_seed(seed)
    f = 0.8 * height
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    means = []
    for v in range(views):
        bumps = torch.nn.functional.interpolate(
            torch.rand(B, 1, 8, 8, generator=g), (height, width), mode="bicubic"
        )[:, 0]  # fmt: skip
        z = 3 + bumps
        centre = 0.3 * (v - (views - 1) / 2)
        means.append(torch.stack([(x - width / 2) / f * z + centre, (y - height / 2) / f * z, z], -1).flatten(1, 2))
    means = torch.cat(means, 1)
    covars = torch.eye(3) * (0.5 * means[..., 2] / f)[..., None, None] ** 2
    K = torch.tensor([[f, 0, width / 2], [0, f, height / 2], [0, 0, 1]]).expand(B, 1, 3, 3)
    scene = means, covars, torch.ones(means.shape[:2]), torch.eye(4).expand(B, 1, 4, 4), K
    return tuple(t.contiguous().to(device) for t in scene), width, height


def garden(path, device, seed=0):
    """The public capture's points as round opaque Gaussians, or as many made up: dense in the middle."""
    if path:
        import numpy as np

        try:
            file = np.load(path, allow_pickle=False)
            means, viewmats, Ks = (torch.from_numpy(file[k]).float() for k in ("means3d", "viewmats", "Ks"))
        except (OSError, KeyError, ValueError) as error:
            raise SystemExit(f"{path}: not the garden with means3d, viewmats and Ks ({error})") from None
    else:
        g = torch.Generator().manual_seed(seed)
        radius = torch.exp(1.2 * torch.randn(138_766, 1, generator=g))
        means = torch.nn.functional.normalize(torch.randn(138_766, 3, generator=g), dim=-1) * radius
        viewmats = torch.eye(4).repeat(3, 1, 1)
        viewmats[:, 2, 3], viewmats[:, 0, 3] = 4.0, torch.tensor([-0.5, 0.0, 0.5])
        Ks = torch.tensor([[480.0, 0, 324], [0, 480, 210], [0, 0, 1]]).expand(3, 3, 3)
    N = len(means)
    sigma = 0.005 * means.norm(dim=-1).clamp(min=0.2)
    scene = (
        means[None],
        (torch.eye(3) * sigma[:, None, None] ** 2)[None],
        torch.full((1, N), 0.8),
        viewmats[None],
        Ks[None],
    )
    return tuple(t.contiguous().to(device) for t in scene), 648, 420


def mixture(scene, C, M, seed=0):
    """Four of M tokens for every Gaussian."""
    B, N = scene[2].shape
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(B, N, 4, generator=g)
    tokens, indices = torch.randn(B, M, C, generator=g), torch.randint(0, M, (B, N, 4), generator=g)
    device = scene[0].device
    return Mixture(tokens.to(device), indices.to(device), (weights / weights.sum(-1, keepdim=True)).to(device))


# ----------------------------------------------------------------------------- ways to splat


def ours(scene, features, width, height, **options):
    means, covars, opacities, viewmats, Ks = scene
    return rasterize(means, covars, opacities, features, viewmats, Ks, width, height, **options)[0]


def three_at_a_time(scene, features, width, height):
    return torch.cat([ours(scene, f.contiguous(), width, height) for f in features.split(3, -1)], -1)


def gsplat(scene, features, width, height):
    from gsplat import rasterization

    means, covars, opacities, viewmats, Ks = (t[0] for t in scene)  # one scene a call
    return rasterization(
        means, None, None, opacities, features[0], viewmats, Ks, width, height, covars=covars, packed=False
    )[0][None]


def ways(device, C):
    """{name: function}, ours first."""
    if device == "cpu":
        return {"torch": lambda *a: ours(*a, backend="torch")}
    found = {"ours": ours, "ours, ieee": lambda *a: ours(*a, precision="ieee")}
    if C > 3:
        found["three channels at a time"] = three_at_a_time
    try:
        import gsplat as _  # noqa: F401

        found["gsplat"] = gsplat
    except ImportError:
        pass
    return found


# ----------------------------------------------------------------------------- measuring


def clock(run, device):
    """Median and interquartile range in seconds of calls of `run`, after a warm-up, at most about 20 s of them."""
    seconds = []
    for i in range(2 + REPEATS):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if i >= 2 and sum(seconds) > 20:
            break
    kept = torch.tensor(seconds[2:] or seconds[-1:], dtype=torch.float64)
    return float(kept.median()), float(kept.quantile(0.75) - kept.quantile(0.25))


def measure(way, scene, features, width, height):
    """Times and memory of one way to splat one workload: {"forward", "both"} in (median, spread) seconds, and "memory":
    bytes at the peak of the forward pass beyond inputs and outputs (on a GPU)."""
    device = scene[0].device.type
    with torch.no_grad():
        forward = clock(lambda: way(scene, features, width, height), device)
        memory = None
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = way(scene, features, width, height)
            memory = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
            del out
    tokens = features.tokens if isinstance(features, Mixture) else features
    inputs = [t.detach().clone().requires_grad_() for t in (*scene[:3], tokens)]

    def both():
        changed = features._replace(tokens=inputs[3]) if isinstance(features, Mixture) else inputs[3]
        out = way((*inputs[:3], *scene[3:]), changed, width, height)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    return {"forward": forward, "both": clock(both, device), "memory": memory}


def floor(scene, features, width, height, device_name):
    """Seconds that the forward pass cannot go below: reading what it reads and writing what it writes once, and the
    products of every pair of a tile and a Gaussian. None for a device whose rates are not known."""
    from .projection import project
    from .tiles import list_tiles

    rates = next((rates for name, rates in RATES.items() if name in device_name), None)
    if rates is None:
        return None
    means, covars, opacities, viewmats, Ks = scene
    means2d, _, depths, radii = project(means, covars, opacities, viewmats, Ks, width, height, 0.01, 1e10, 0.3)
    means2d, depths, radii = (t.flatten(0, 1) for t in (means2d, depths, radii))
    pairs = len(list_tiles(means2d, depths, radii, width, height, TILE)[0])
    C = features.shape[-1]
    written = len(means2d) * width * height * (C + 1)
    moved = 4 * (sum(t.numel() for t in (*scene, features)) + written)
    return max(moved / rates[0], 2 * pairs * TILE * TILE * C / rates[1])


def error(out, exact):
    """Largest difference relative to the largest value."""
    return float((out.double() - exact).abs().max() / exact.abs().max())


def workloads(device, path):
    """(name, C, scene, width, height); on a CPU only what takes seconds."""
    if device == "cpu":
        for C in (3, 32, 384):
            yield "demo", C, *pixel_aligned(1, 224, 224, device)
        return
    for C in (384, 768, 3):
        yield "paper", C, *pixel_aligned(1, 576, 880, device)
    for C in (384, 3):
        yield "demo", C, *pixel_aligned(1, 224, 224, device)
    for C in (3, 32, 384):
        yield "scene", C, *garden(path, device)
    yield "batch", 384, *pixel_aligned(8, 224, 224, device)


def run(device, path, device_name):
    rows = []
    for name, C, scene, width, height in workloads(device, path):
        B, N = scene[2].shape
        features = torch.randn(B, N, C, generator=torch.Generator().manual_seed(1)).to(device)
        first = None
        for way, function in ways(device, C).items():
            if way == "gsplat" and B > 1:
                continue
            row = dict(workload=name, C=C, N=N, way=way, **measure(function, scene, features, width, height))
            first = first or row
            row["ratio"] = [row[k][0] / first[k][0] for k in ("forward", "both")]
            if device == "cuda" and way == "ours":
                row["floor"] = floor(scene, features, width, height, device_name)
            if way in ("ours", "ours, ieee") and N < 200_000:
                exact = ours([t.double() for t in scene], features.double(), width, height, backend="torch")
                row["error"] = error(function(scene, features, width, height), exact)
            rows.append(row)
            print_row(row)
        if device == "cuda" and C > 3:
            factored = mixture(scene, C, 2 * (width // 14) * (height // 14))
            row = dict(workload=name, C=C, N=N, way="ours, factored", **measure(ours, scene, factored, width, height))
            row["ratio"] = [row[k][0] / first[k][0] for k in ("forward", "both")]
            rows.append(row)
            print_row(row)
    if device == "cuda":
        rows += sorting(device)
    return rows


def sorting(device):
    """Our sort of tile lists against torch.sort of the same keys with the tile above them."""
    from .tiles import sort_ranges

    rows = []
    for tiles, length in ((8000, 64), (8000, 500), (800, 5000), (8, 500_000)):
        ends = length * torch.arange(1, tiles + 1, device=device)
        ranges, tile = (
            torch.stack([ends - length, ends], 1),
            torch.arange(tiles, device=device).repeat_interleave(length),
        )
        keys = torch.randperm(tiles * length, device=device)
        times = [clock(run, device) for run in (lambda: sort_ranges(keys.clone(), ranges, length),
                                                lambda: torch.sort((tile << 32) | keys))]  # fmt: skip
        rows.append(dict(workload=f"sort {tiles} lists of {length}", ours=times[0], torch_sort=times[1]))
        print(f"sort {tiles} lists of {length}: ours {1e3 * times[0][0]:.2f} ms, torch.sort {1e3 * times[1][0]:.2f} ms")
    return rows


def print_row(row):
    times = [
        f"{1e3 * row[k][0]:9.2f} ms +- {1e3 * row[k][1]:.2f} (x {r:.1f})"
        for k, r in zip(("forward", "both"), row["ratio"])
    ]
    rest = f"   memory {row['memory'] / 2**20:.0f} MiB" if row["memory"] is not None else ""
    rest += f"   floor {1e3 * row['floor']:.2f} ms" if row.get("floor") else ""
    rest += f"   error {row['error']:.1e}" if "error" in row else ""
    print(
        f"{row['workload']:6} C = {row['C']:<4} {row['way']:26} forward {times[0]}   with backward {times[1]}{rest}",
        flush=True,
    )


# ----------------------------------------------------------------------------- what the compiler makes of it

INTEGERS = {"gaussians_ptr": "*i32", "last_ptr": "*i32", "counts_ptr": "*i32", "indices_ptr": "*i32"}
INTEGERS |= {k: "*i64" for k in ("ranges_ptr", "keys_ptr", "sorted_ptr", "merged_ptr", "next_ptr")}
FEATURES = ("features_ptr", "out_ptr", "v_out_ptr")
FLOATS = ("near_plane", "far_plane", "eps2d")


def kernels():
    """(name, kernel, constants, options, type of the features)"""
    from . import blend, projection, tiles

    for kernel in (projection.project_forward_kernel, projection.project_backward_kernel):
        yield kernel.__name__, kernel, dict(BLOCK=projection.BLOCK), {}, "*fp32"
    for kernel in (tiles.count_kernel, tiles.place_kernel):
        yield kernel.__name__, kernel, dict(TILE=TILE, BLOCK=tiles.BLOCK), {}, "*fp32"
    for kernel in (tiles.sort_kernel, tiles.merge_kernel):
        yield kernel.__name__, kernel, dict(RUN=tiles.RUN), {}, "*fp32"
    types = ((torch.float32, "*fp32", "tf32"), (torch.float32, "*fp32", "ieee"), (torch.float16, "*fp16", "tf32"),
             (torch.bfloat16, "*bf16", "tf32"))  # fmt: skip
    for dtype, pointer, precision in types:
        for kernel, block in (
            (blend.blend_forward_kernel, blend.FORWARD),
            (blend.blend_backward_kernel, blend.BACKWARD),
        ):
            name = f"{kernel.__name__} {precision if dtype == torch.float32 else pointer[1:]}"
            for J in (0, 4):
                constants = blend.launch_options(block, 384, dtype, TILE, precision, J, interpret=False)
                options = dict(num_warps=constants.pop("num_warps"))
                if J == 0:  # dense features come without factors
                    constants |= {"indices_ptr": None, "mix_ptr": None}
                yield name + " factored" * (J > 0), kernel, constants, options, pointer
                # Training has one target view a scene, and Triton makes a constant of an argument that is 1
                yield f"{name}{' factored' * (J > 0)} V=1", kernel, constants | {"V": 1}, options, pointer


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
        for name, kernel, constants, options, features in kernels():
            # As at run time, where torch's allocations are 16-byte aligned
            aligned = {
                (i,): [["tt.divisibility", 16]]
                for i, n in enumerate(kernel.arg_names)
                if n.endswith("_ptr") and n not in constants
            }
            source = ASTSource(kernel, signature(kernel, constants, features), constants, aligned)
            compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
            matrix = len(re.findall(r"\b(?:mma|wgmma)\S*\.sync", compiled.asm["ptx"]))
            found = resources(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}
            yield dict(kernel=name, target=target, tensor_core=matrix, **found)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--garden", metavar="FILE", help="the garden's points and cameras (.npz); nothing for made-up ones"
    )
    parser.add_argument("--out", default="bench.json", metavar="FILE", help="to write everything to")
    parser.add_argument(
        "--compile", nargs="+", type=int, metavar="SM", help="only the compile report, one JSON per line"
    )
    given = parser.parse_args()
    if _interpreted():
        raise SystemExit("TRITON_INTERPRET is set: what the interpreter takes says nothing, and nothing is compiled")
    if given.compile:
        for row in compile_report(given.compile):
            print(json.dumps(row), flush=True)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    about = dict(device=name, torch=torch.__version__, python=sys.version.split()[0], date=str(date.today()))
    print(", ".join(about.values()))
    report = about | {"rows": run(device, given.garden, name)}
    if device == "cpu":
        print("\nNo GPU: what the compiler makes of the kernels. Stack is spilled registers, in bytes.")
        report["compiled"] = []
        for row in compile_report((80, 90)):
            report["compiled"].append(row)
            print(f"sm_{row['target']}  {row['kernel']:42} {row['reg']:4} registers  {row['stack']:5} stack  "
                  f"{row['shared']:6} shared  {row['tensor_core']:4} tensor-core instructions", flush=True)  # fmt: skip
    Path(given.out).write_text(json.dumps(report, indent=1))
    print(f"Written to {given.out}")


if __name__ == "__main__":
    main()
