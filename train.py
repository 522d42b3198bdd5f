"""Train a student: python train.py --teacher dinov2_vits14 [--data FOLDER] [--SETTING VALUE ...]

Without --data on procedural rooms made on the fly, as a demo of minutes on a CPU; with --data on posed photos, with the
paper's numbers. Everything is written to runs/NAME/:

    student.safetensors   the student under DINOv2's parameter names, LoRA merged; the settings in its metadata
    checkpoint.pt         to go on from: python train.py --resume runs/NAME
    metrics.jsonl         one line a step
    preview_000100.png    target photo, splatted and student features (one PCA for both), alpha, depth

Ctrl-C finishes the step, saves, and stops.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Subset

import data
from kernels import rasterize
from model import FeedForward, SensorDepth, SplatAndDistill, WeightsNotFound, load_reconstructor, load_vit, merge_lora

# Every setting: (demo, paper, why). The paper's are of its ScanNet++ run; the demo's are for minutes on two cores.
SETTINGS = {
    "height": (224, 576, "of the images, pixels; the ViT sees the multiple of 14 below"),
    "width": (224, 880, "likewise"),
    "context_views": (2, 2, "whose features are splatted"),
    "min_gap": (8, 8, "frames between the first and the last context view, at least: parallax"),
    "max_gap": (12, 12, "at most: overlap"),
    "geometry": ("depth", "depth", "of the Gaussians: sensor depth, or a file of MVSplat's weights: photos alone"),
    "near": (0.1, 1.0, "geometry nearer than this counts as unknown; metres, or the capture's unit"),
    "far": (100.0, 100.0, "likewise farther"),
    "batch_size": (1, 1, "scenes a step"),
    "steps": (100, 300_000, "of the optimiser"),
    "lr": (5e-4, 2e-5, "peak learning rate; the demo has 3,000 times fewer steps to get anywhere"),
    "warmup": (0.1, 0.01, "share of the steps in which the one-cycle schedule climbs; then it falls as a cosine"),
    "weight_decay": (0.0, 0.0, "0 makes AdamW the Adam of the paper"),
    "clip": (1.0, 1.0, "norm that gradients are cut to: a scene seen badly should not throw the head off"),
    "lora_rank": (8, 8, "of the student's LoRA on qkv and proj"),
    "lora_alpha": (8.0, 8.0, "its scale is alpha / rank"),
    "lora_dropout": (0.1, 0.1, "on LoRA's input"),
    "prototypes": (1024, 65_536, "of the heads; 65,536 take seconds a step on a CPU"),
    "head_dim": (512, 2048, "hidden width of the heads"),
    "bottleneck_dim": (128, 256, "width before the prototypes"),
    "blend": (0.5, 0.5, "own share of a splatted feature against its segment's mean; 1 is no blending"),
    "teacher_temperature": (1.0, 1.0, "that the teacher's logits are divided by"),
    "student_temperature": (1.0, 1.0, "likewise the student's"),
    "momentum": (0.999, 0.999, "of the teacher's exponential moving average"),
    "ema_every": (10, 10, "steps between updates of the teacher"),
    "seed": (0, 0, "of everything random"),
    "workers": (1, 4, "processes that load data"),
    "preview_every": (50, 1000, "steps between previews"),
    "checkpoint_every": (50, 1000, "steps between checkpoints"),
}
RANDOM = "RANDOM TEACHER WEIGHTS: this run shows that the pipeline works, not what the method achieves"


def parse_settings(arguments=None):
    """The command line as {setting: value}, or with {"resume": folder} the settings of that folder's run."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--teacher", default="dinov2_vits14", help="dinov2_{vits,vitb,vitl,vitg}14, each also with _reg")
    add("--teacher-weights", help='a file; "random"; or nothing for the public weights')
    add("--data", help="folder of posed photos (README, Data); nothing for procedural rooms")
    add("--preset", choices=["demo", "paper"], help="nothing is paper with --data and demo without")
    add("--name", help="of the run; nothing is the preset's name and the next free number")
    add("--resume", metavar="RUN", help="folder of a run to go on with, by its own settings")
    for name, (demo, paper, why) in SETTINGS.items():
        flag = "--" + name.replace("_", "-")
        add(flag, type=type(paper), default=argparse.SUPPRESS, help=f"{why} (demo {demo}, paper {paper})")
    given = vars(parser.parse_args(arguments))
    if given["resume"]:
        others = [a for a in (sys.argv[1:] if arguments is None else arguments) if a.startswith("--")]
        if any(not a.startswith("--resume") for a in others):
            raise SystemExit("--resume goes on with the run's own settings: no other flag goes with it")
        return {"resume": given["resume"]}
    preset = given["preset"] or ("paper" if given["data"] else "demo")
    defaults = {name: values[preset == "paper"] for name, values in SETTINGS.items()}
    settings = {**defaults, **given, "preset": preset}
    del settings["resume"]
    for name in ("context_views", "batch_size", "steps", "lora_rank", "prototypes", "head_dim",
                 "bottleneck_dim", "teacher_temperature", "student_temperature", "ema_every", "preview_every",
                 "checkpoint_every", "lr", "clip"):  # fmt: skip
        if not settings[name] > 0:
            raise SystemExit(f"--{name.replace('_', '-')} must be more than 0, not {settings[name]}")
    for name, least in (("height", 14), ("width", 14), ("workers", 0), ("seed", 0)):
        if settings[name] < least:
            raise SystemExit(f"--{name} must be at least {least}, not {settings[name]}")
    for name in ("data", "teacher_weights", "geometry"):  # absolute, so that the run can be resumed from anywhere
        if settings[name] not in (None, "random", "depth") and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    for name in ("warmup", "lora_dropout", "blend", "momentum"):
        if not 0 <= settings[name] <= 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be between 0 and 1, not {settings[name]}")
    return settings


# ----------------------------------------------------------------------------- what a run is made of


def load_teacher(settings):
    """The teacher's ViT; where its weights cannot be had and the run is a demo on rooms, a random one.

    Returns the ViT and whether its weights are random.
    """
    name, weights, seed = settings["teacher"], settings["teacher_weights"], settings["seed"]
    if weights == "random":
        return load_vit(name, "random", seed), True
    try:
        return load_vit(name, weights), False
    except WeightsNotFound as error:
        if settings["data"]:
            raise SystemExit(f"{error} (--teacher-weights FILE)") from None
        print(f"{error}\nThis is the demo: going on with random weights.")
        return load_vit(name, "random", seed), True


def load_views(settings):
    """Training views, one for every scene of every step, and a batch to draw previews from that training never sees.

    A single capture has nothing to hold out; its preview is of its own frames.
    """
    options = {k: settings[k] for k in ("height", "width", "min_gap", "max_gap")} | {
        "num_context": settings["context_views"]
    }
    scenes = data.open_scenes(settings["data"]) if settings["data"] else data.Rooms("train")
    length = settings["steps"] * settings["batch_size"]
    views = data.Views(scenes, **options, seed=settings["seed"], length=length)
    if settings["data"]:
        if settings["geometry"] == "depth" and "depths" not in views.keys:
            raise ValueError(
                f"{settings['data']}: no depth maps; without them, pass MVSplat's weights: --geometry FILE"
            )
        without = sum(not scene.has_masks for scene in scenes)
        if without:
            print(f"No segment masks in {without} of {len(scenes)} scenes: one segment per image there, blending off.")
    held_out = scenes if settings["data"] else data.Rooms("val")
    shown = data.Views(held_out, **options, seed=settings["seed"] + 1, length=1)[0]
    return views, torch.utils.data.default_collate([shown])


def build(settings, vit, device):
    """The method's module, its optimiser and its schedule."""
    torch.manual_seed(settings["seed"])
    names = ("prototypes", "head_dim", "bottleneck_dim", "lora_rank", "lora_alpha", "lora_dropout", "blend",
             "teacher_temperature", "student_temperature")  # fmt: skip
    near, far = settings["near"], settings["far"]
    if settings["geometry"] == "depth":
        reconstruct = SensorDepth(near, far)
    else:
        reconstruct = FeedForward(load_reconstructor(settings["geometry"]), near, far)
    model = SplatAndDistill(vit, reconstruct, **{k: settings[k] for k in names})
    model.to(device).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    total = settings["steps"] + 1
    warmup = settings["warmup"] if settings["warmup"] * total > 1 else 0.0  # torch's cycle cannot climb within a step
    optimizer = torch.optim.AdamW(trainable, lr=settings["lr"], weight_decay=settings["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings["lr"], total_steps=total, pct_start=warmup, cycle_momentum=False
    )
    return model, optimizer, schedule


def trained(model):
    """Names of what training changes, in the student and, by EMA, in the teacher. The rest is the teacher's file."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return names + [name.replace("student", "teacher", 1) for name in names]


# ----------------------------------------------------------------------------- what a run writes


def replace_file(path, write):
    """Write a file beside its place and rename it there, so that there is always a whole one."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def save(folder, step, settings, random_weights, model, optimizer, schedule):
    state = model.state_dict()
    checkpoint = dict(
        step=step, settings=settings, random_weights=random_weights,
        model={name: state[name] for name in trained(model)},
        optimizer=optimizer.state_dict(), schedule=schedule.state_dict(),
        rng=torch.get_rng_state(), cuda_rng=torch.cuda.get_rng_state_all(),
    )  # fmt: skip
    metadata = {"settings": json.dumps(settings), "step": str(step), "random_weights": str(random_weights).lower()}
    if random_weights:
        metadata["warning"] = RANDOM
    student = merge_lora(model.student)
    replace_file(folder / "checkpoint.pt", lambda path: torch.save(checkpoint, path))
    replace_file(folder / "student.safetensors", lambda path: save_file(student, path, metadata))


def load_checkpoint(folder):
    path = folder / "checkpoint.pt"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; --resume takes the folder of a run, such as runs/demo-1")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        wanted = {"step", "settings", "random_weights", "model", "optimizer", "schedule", "rng", "cuda_rng"}
        if not isinstance(checkpoint, dict) or checkpoint.keys() != wanted:
            raise ValueError("it has other contents")
        if checkpoint["settings"].keys() != SETTINGS.keys() | {"teacher", "teacher_weights", "data", "preset", "name"}:
            raise ValueError("its settings are those of another version")
    except Exception as error:  # torch.load raises a dozen kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SystemExit(f"{path}: not a checkpoint of train.py ({reason})") from None
    return checkpoint


def truncate_metrics(path, step):
    """Drop the lines after a step: the run died between a checkpoint and them, and is about to write them again."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    try:
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"{path}: a line of it is not one that train.py wrote; move the file away to go on") from None
    replace_file(path, lambda temporary: temporary.write_text("".join(kept)))


def number(value):
    """A scalar tensor for JSON, which knows no NaN."""
    return float(value) if math.isfinite(value) else None


def to_rgb(features, basis):
    """Features [C, h, w] in a PCA basis (mean, axes, low, high) as an image [h, w, 3] in 0..1."""
    mean, axes, low, high = basis
    flat = features.flatten(1).T.float() - mean
    return ((flat @ axes - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).unflatten(0, features.shape[1:])


def shared_pca(samples):
    """Mean, three principal axes and robust ranges of feature vectors [M, C]."""
    samples = samples.float()
    mean = samples.mean(0)
    axes = torch.linalg.svd(samples - mean, full_matrices=False).Vh[:3].T
    axes = axes * torch.sign(axes.sum(0) + 1e-12)  # an SVD's signs are arbitrary; colours should not flip
    low, high = torch.quantile((samples - mean) @ axes, torch.tensor([0.02, 0.98], device=samples.device), dim=0)
    return mean, axes, low, high


def depth_colours(depth, valid):
    """Depth [H, W] as an image [H, W, 3]: near yellow, far blue, black where not valid."""
    stops = torch.tensor([[0.98, 0.91, 0.30], [0.90, 0.42, 0.30], [0.55, 0.20, 0.52], [0.11, 0.12, 0.39]])
    if not valid.any():
        return torch.zeros(*depth.shape, 3)
    low, high = torch.quantile(depth[valid][:: max(1, int(valid.sum()) // 100_000)], torch.tensor([0.02, 0.98]))
    at = ((depth - low) / (high - low).clamp(min=1e-6)).clamp(0, 1) * 2.999
    i = at.long()
    return torch.lerp(stops[i], stops[i + 1], (at - i)[..., None]) * valid[..., None]


@torch.no_grad()
def preview(path, model, batch, step, random_weights):
    """Draw the first scene of a batch to a PNG, and measure how well splatting aligns. Returns {name: number}."""
    model.eval()
    _, _, drawn = model(batch)
    aligned = {name: number(value) for name, value in model.alignment(batch, drawn).items()}
    target, gaussians, alpha = batch["target"], drawn["gaussians"], drawn["alphas"][0].cpu()
    H, W = alpha.shape
    viewmats = torch.linalg.inv(target["extrinsics"])
    z = (gaussians.means * viewmats[:, None, 2, :3]).sum(-1, keepdim=True) + viewmats[:, 2, 3, None, None]  # (B, N, 1)
    depth, _ = rasterize(*gaussians[:3], z, viewmats[:, None], target["Ks"][:, None], W, H)
    model.train()

    seen, rendered, student = ~drawn["holes"][0], drawn["rendered"][0], drawn["student"][0]
    basis = shared_pca(torch.cat([drawn["splatted"][0][:, seen].T, student.flatten(1).T]))
    student = F.interpolate(to_rgb(student, basis).permute(2, 0, 1)[None], (H, W), mode="nearest")[0].permute(1, 2, 0)
    panels = {
        "target photo": target["images"][0].permute(1, 2, 0),
        "splatted teacher": to_rgb(rendered, basis) * (drawn["alphas"][0] > 0.5)[..., None],
        "student": student,
        "alpha": alpha[..., None].expand(-1, -1, 3),
        "depth": depth_colours(depth[0, 0, ..., 0].cpu() / alpha.clamp(min=1e-6), alpha > 0.5),
    }
    header, gap = 18 * (2 if random_weights else 1), 4
    sheet = Image.new("RGB", (len(panels) * (W + gap) - gap, H + header), "white")
    write = ImageDraw.Draw(sheet)
    for i, (title, panel) in enumerate(panels.items()):
        pixels = (panel.float().cpu().numpy() * 255 + 0.5).clip(0, 255).astype(np.uint8)
        sheet.paste(Image.fromarray(pixels), (i * (W + gap), header))
        write.text((i * (W + gap) + 2, header - 15), title + (f", step {step}" if i == 0 else ""), fill="black")
    text = PngInfo()
    if random_weights:
        write.text((2, 2), RANDOM, fill=(200, 0, 0))
        text.add_text("warning", RANDOM)
    replace_file(path, lambda temporary: sheet.save(temporary, format="PNG", pnginfo=text))
    return aligned


def banner(text):
    print("\n".join(["", "!" * (len(text) + 6), f"!! {text} !!", "!" * (len(text) + 6), ""]), flush=True)


# ----------------------------------------------------------------------------- the run


def move(batch, device):
    """A batch's tensors, however nested, to a device."""
    if isinstance(batch, dict):
        return {k: move(v, device) for k, v in batch.items()}
    return batch.to(device, non_blocking=True) if torch.is_tensor(batch) else batch


def train_step(model, batch, optimizer, schedule, step, settings):
    """Step number `step`, counted from 1. Returns {metric: scalar tensor}."""
    with torch.autocast("cuda", torch.bfloat16, enabled=batch["has_masks"].is_cuda):
        loss, metrics = model(batch)[:2]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], settings["clip"])
    optimizer.step()
    schedule.step()
    if step % settings["ema_every"] == 0:
        model.update_teacher(settings["momentum"])
    return metrics


def leave_ctrl_c_to_the_parent(_worker):
    """Ctrl-C reaches every process of a group; the workers have to live until the step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def saved_if_it_fails(loader, save):
    """The loader's batches; a photo that cannot be read ends the run, but not before what was learnt is saved."""
    try:
        yield from loader
    except ValueError:
        save()
        raise


def free_name(preset):
    taken = {p.name for p in Path("runs").glob(f"{preset}-*")}
    return next(f"{preset}-{i}" for i in range(1, len(taken) + 2) if f"{preset}-{i}" not in taken)


def progress(step, steps, first, started, recent):
    rate = (step - first) / (time.time() - started)
    left = (steps - step) / rate
    clock = f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
    means = {name: sum(m[name] for m in recent) / len(recent) for name in ("loss", "above_entropy")}
    print(
        f"step {step}/{steps}   loss {means['loss']:.4f}   above the teacher's entropy {means['above_entropy']:.6f}   "
        f"{rate:.2f} steps/s   {clock} left", flush=True,
    )  # fmt: skip


def main(arguments=None):
    try:
        run(parse_settings(arguments))
    except ValueError as error:  # bad input, named in one sentence; a data worker puts its traceback before that
        raise SystemExit(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


def run(settings):
    warnings.showwarning = lambda message, *_: print(f"Note: {message}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = None
    if "resume" in settings:
        folder = Path(settings["resume"])
        checkpoint = load_checkpoint(folder)
        settings = checkpoint["settings"]
    views, shown = load_views(settings)
    vit, random_weights = load_teacher(settings)
    model, optimizer, schedule = build(settings, vit, device)

    step = 0
    if checkpoint:
        if checkpoint["random_weights"] != random_weights:
            began = "random" if checkpoint["random_weights"] else "real"
            raise SystemExit(f"{folder}: began with {began} teacher weights, which are not what is found now")
        step = checkpoint["step"]
        if checkpoint["model"].keys() != set(trained(model)):
            raise SystemExit(f"{folder}/checkpoint.pt: its parameters are not those that its settings train")
        model.load_state_dict(checkpoint["model"], strict=False)
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["schedule"])
        truncate_metrics(folder / "metrics.jsonl", step)
        if step >= settings["steps"]:
            raise SystemExit(f"{folder}: has all its {step} steps already")
    else:
        folder = Path("runs") / (settings["name"] or free_name(settings["preset"]))
        if (folder / "checkpoint.pt").exists():
            raise SystemExit(
                f"{folder}: there is a run of that name; go on with --resume {folder}, or choose another --name"
            )
        folder.mkdir(parents=True, exist_ok=True)
        truncate_metrics(folder / "metrics.jsonl", 0)
    if random_weights:
        banner(RANDOM)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{folder}: {settings['teacher']} on {device}, {trainable / 1e6:.1f} M trainable, {settings['steps']} steps")

    shown = move(shown, device)
    samples = Subset(views, range(step * settings["batch_size"], len(views)))
    # A generator of its own: the loader draws a seed at the start, and must not shift the dropout of a resumed run
    loader = DataLoader(
        samples, settings["batch_size"], num_workers=settings["workers"], worker_init_fn=leave_ctrl_c_to_the_parent,
        generator=torch.Generator(),
    )  # fmt: skip
    asked_to_stop = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            signum, lambda number, frame: (asked_to_stop.append(number), signal.signal(number, signal.SIG_DFL))
        )
    if checkpoint:
        torch.set_rng_state(checkpoint["rng"])
        torch.cuda.set_rng_state_all(checkpoint["cuda_rng"][: torch.cuda.device_count()])

    def checkpoint_now():
        save(folder, step, settings, random_weights, model, optimizer, schedule)

    first, started, recent = step, time.time(), []
    with open(folder / "metrics.jsonl", "a") as log:
        if step == 0:
            aligned = preview(folder / "preview_000000.png", model, shown, 0, random_weights)
        for batch in saved_if_it_fails(loader, checkpoint_now):
            metrics = train_step(model, move(batch, device), optimizer, schedule, step + 1, settings)
            step += 1
            line = {"step": step, **{k: float(v) for k, v in metrics.items()}, "lr": schedule.get_last_lr()[0]}
            if not math.isfinite(line["loss"]):
                raise SystemExit(
                    f"{folder}: the loss of step {step} is {line['loss']}; the last checkpoint is from before"
                )
            recent.append(dict(line))
            if step % settings["preview_every"] == 0 or step == settings["steps"]:
                aligned = preview(folder / f"preview_{step:06d}.png", model, shown, step, random_weights)
                line.update(aligned)
            log.write(json.dumps({**line, "random_weights": random_weights}) + "\n")
            log.flush()
            if step % 10 == 0 or step == settings["steps"]:
                progress(step, settings["steps"], first, started, recent)
                recent.clear()
            if step % settings["checkpoint_every"] == 0 or step == settings["steps"] or asked_to_stop:
                checkpoint_now()
            if asked_to_stop and step < settings["steps"]:
                print(f"Stopped after step {step}. To go on: python train.py --resume {folder}")
                return
    report(folder, aligned, settings, random_weights)


def report(folder, aligned, settings, random_weights):
    """What came of it, and what to do next."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tenth = max(1, len(lines) // 10)
    early, late = (sum(m["above_entropy"] for m in part) / tenth for part in (lines[:tenth], lines[-tenth:]))
    change = f"{100 * (late / early - 1):+.0f} %" if early > 0 else "nothing was ever splatted into a target view"
    splatted, unwarped = (
        "none" if aligned[k] is None else f"{aligned[k]:.4f}" for k in ("cosine_splatted", "cosine_unwarped")
    )
    print(
        f"\nLoss above the teacher's entropy: {early:.6f} in the first {tenth} steps, {late:.6f} in the last "
        f"({change})\n"
        f"Cosine with the teacher's own features of the target view: splatted {splatted}, "
        f"context left unwarped {unwarped}\n"
        f"Written to {folder}/: student.safetensors, checkpoint.pt, metrics.jsonl, preview_*.png"
    )
    if random_weights:
        banner(RANDOM)
    if settings["data"]:
        print(f"Next, load it: model.load_vit('{settings['teacher']}', '{folder / 'student.safetensors'}')")
    else:
        print(f"Next, on your own posed photos: python train.py --teacher {settings['teacher']} --data FOLDER")


if __name__ == "__main__":
    main()
