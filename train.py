"""Train a student: python train.py --teacher dinov2_vits14 [--data FOLDER] [--SETTING VALUE ...]
or the network that turns its photos into Gaussians: python train.py --stage reconstruct [...]
or a small teacher, from single photos: python train.py --stage pretrain [...]

Without --data on procedural rooms made on the fly, sized for a CPU; with --data on posed photos, with the paper's
numbers. Everything is written to runs/NAME/:

    student.safetensors         the student under its teacher's parameter names, LoRA merged; the
                                settings in its metadata
    or reconstructor.safetensors, which load_reconstructor reads and --geometry takes
    or teacher.safetensors, which load_vit reads and --teacher-weights takes
    checkpoint.pt               to go on from: python train.py --resume runs/NAME
    metrics.jsonl               one line a step
    preview_000100.png          target photo, splatted and student features (one PCA for both), alpha, depth
                                or target photo, rendering, its error, depth
                                or photos that training does not see, and the teacher's features of them

Ctrl-C finishes the step, saves, and stops.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Subset

import data
from model import (
    SMALL, FeedForward, Pretraining, Reconstruction, ReconstructorConfig, SensorDepth, SplatAndDistill,
    WeightsNotFound, load_reconstructor, load_vit, merge_lora, new_reconstructor, patch_tokens, render, sizes_of,
)  # fmt: skip

POSITIVE = 1e-12  # the low of a number that must be more than 0


class Setting(NamedTuple):
    """A flag: its two defaults, its help and the values that it takes, low and high included."""

    demo: bool | int | float | str  # for procedural rooms on two CPU cores
    paper: bool | int | float | str  # for posed photos, as published
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple | None = None


# Published: Splat and Distill on ScanNet++, MVSplat on RealEstate10K. The demo distills in minutes
# and reconstructs in an hour or two.
TRAINING = {
    "clip": Setting(1.0, 1.0, "largest norm of the gradients", POSITIVE),
    "seed": Setting(0, 0, "of everything random", 0),
    "workers": Setting(1, 4, "processes that load data", 0),
}
ONE_CYCLE = "share of the steps in which the learning rate climbs; then it falls as a cosine"
TARGET = "frame to render: between the context views (the paper), or any (its code)"
VIEWS = TRAINING | {
    "context_views": Setting(2, 2, "views that are lifted to 3D", 1),
    "min_gap": Setting(8, 8, "least frames between the first and last context view: parallax"),
    "max_gap": Setting(12, 12, "most frames between them: overlap"),
    "target": Setting("between", "between", TARGET, choices=("between", "any")),
    "near": Setting(3.0, 3.0, "near plane, in units of the context baseline", POSITIVE),
    "far": Setting(50.0, 50.0, "far plane, likewise; the papers: 1 and 100 units"),
    "batch_size": Setting(1, 1, "scenes a step", 1),
    "weight_decay": Setting(0.0, 0.0, "of AdamW; 0 makes it the papers' Adam", 0),
}
SETTINGS = {
    "distill": VIEWS | {
        "height": Setting(224, 576, "of the images, pixels; the ViT sees whole patches"),
        "width": Setting(224, 880, "likewise"),
        "min_gap": Setting(16, 8, "least frames between the first and last context view"),
        "max_gap": Setting(32, 12, "most frames between them; exact depth allows more"),
        "geometry": Setting("depth", "shipped", "source of the Gaussians: depth maps, the "
                            "reconstructor in weights/, or another's file"),
        "steps": Setting(250, 300_000, "of the optimiser", 1),
        "lr": Setting(6e-4, 2e-5, "peak learning rate; the demo takes few steps", POSITIVE),
        "warmup": Setting(0.1, 0.01, ONE_CYCLE, 0, 1),
        "lora_rank": Setting(0, 8, "of the student's LoRA; 0 trains all weights: fast learning", 0),
        "lora_alpha": Setting(8.0, 8.0, "LoRA's scale is alpha / rank"),
        "lora_dropout": Setting(0.1, 0.1, "on LoRA's input", 0, 1),
        "loss": Setting("contrastive", "prototypes", "prototypes is the paper's",
                        choices=("prototypes", "contrastive", "both")),
        "temperature": Setting(0.07, 0.07, "of the contrastive loss", POSITIVE),
        "targets": Setting("splatted", "splatted", "own is the control: the teacher's own features "
                           "of the target view", choices=("splatted", "own")),
        "prototypes": Setting(1024, 65_536, "of the heads; 65,536 take seconds a step on a CPU", 1),
        "head_dim": Setting(512, 2048, "hidden width of the heads", 1),
        "bottleneck_dim": Setting(128, 256, "width before the prototypes", 1),
        "upsampling": Setting("centred", "mask-aware", "of the teacher's features to pixels: by the "
                              "paper's code, with tokens at patch centres, or across segments",
                              choices=("mask-aware", "centred", "bilinear")),
        "blend": Setting(1.0, 0.5, "a splatted feature's share against its segment's mean", 0, 1),
        "centring": Setting(1.0, 1.0, "momentum of the mean that centres the teacher's logits; "
                            "1: no centring", 0, 1),
        "teacher_temperature": Setting(0.1, 1.0, "of the teacher's logits", POSITIVE),
        "student_temperature": Setting(0.1, 1.0, "of the student's logits", POSITIVE),
        "momentum": Setting(0.97, 0.999, "of the teacher's EMA; a fast one learns early", 0, 1),
        "ema_every": Setting(1, 10, "steps between updates of the teacher", 1),
        "preview_every": Setting(250, 1000, "steps between previews", 1),
        "checkpoint_every": Setting(250, 1000, "steps between checkpoints", 1),
    },
    "reconstruct": VIEWS | {
        "height": Setting(224, 256, "of the images, pixels; a multiple of 16"),
        "width": Setting(224, 256, "likewise"),
        "start": Setting("small", "published", "network to begin with: small or published, both "
                         "with random weights, or a file"),
        "batch_size": Setting(1, 14, "scenes a step", 1),
        "steps": Setting(2000, 300_000, "of the optimiser", 1),
        "coarse": Setting(3, 0, "steps that only match views, for every one that renders; they "
                          "cost a quarter", 0),
        "lr": Setting(1e-3, 2e-4, "peak; the small network tolerates a higher one", POSITIVE),
        "warmup": Setting(0.05, 0.01, ONE_CYCLE, 0, 1),
        "depth_weight": Setting(0.2, 0.2, "of the depth error beside the photo's; unused where "
                                "there is no depth", 0),
        "preview_every": Setting(250, 1000, "steps between previews", 1),
        "checkpoint_every": Setting(250, 1000, "steps between checkpoints", 1),
    },
    "pretrain": TRAINING | {
        "height": Setting(224, 224, "of the photos, pixels"),
        "width": Setting(224, 224, "likewise"),
        "crop": Setting(112, 112, "side of the crops, pixels; a multiple of the patch"),
        "least_scale": Setting(0.35, 0.35, "of a photo's side that a crop shows", POSITIVE, 1),
        "most_scale": Setting(0.9, 0.9, "likewise", POSITIVE, 1),
        "photos": Setting(2400, 2400, "views of rooms to train on; of a folder all are", 1),
        "batch_size": Setting(16, 64, "photos a step", 1),
        "steps": Setting(6000, 100_000, "of the optimiser", 1),
        "lr": Setting(1e-3, 1e-3, "peak learning rate", POSITIVE),
        "warmup": Setting(0.05, 0.01, ONE_CYCLE, 0, 1),
        "weight_decay": Setting(0.05, 0.05, "of AdamW", 0),
        "temperature": Setting(0.07, 0.07, "of the contrast between spots", POSITIVE),
        "place_weight": Setting(0.0, 0.0, "of a second loss: where in the photo a patch lies", 0),
        "start": Setting("random", "random", "weights to begin with, or a file"),
        "preview_every": Setting(500, 1000, "steps between previews", 1),
        "checkpoint_every": Setting(250, 1000, "steps between checkpoints", 1),
    },
}  # fmt: skip

# (a setting, its value, the settings that nothing reads then, why)
UNREAD = (
    ("geometry", "depth", {"near", "far"}, "it bounds the depth of photos"),
    ("loss", "contrastive", {"prototypes", "head_dim", "bottleneck_dim", "centring",
                             "teacher_temperature", "student_temperature"}, "there are no heads"),
    ("loss", "prototypes", {"temperature"}, "it belongs to the contrastive loss"),
    ("lora_rank", 0, {"lora_alpha", "lora_dropout"}, "without LoRA all weights are trained"),
)  # fmt: skip
OF_FOLDERS = ("geometry", "min_gap", "max_gap")  # with --data both presets take the paper's
PATHS = ("data", "split", "teacher_weights", "geometry", "start")
WORDS = (None, "random", "shipped", "depth", "small", "published")  # values that are no path
TEACHERS = (
    "dinov2_{vits,vitb,vitl,vitg}14, each also with _reg; "
    "dinov3_{vits16,vits16plus,vitb16,vitl16}; vit_tiny14"
)
RANDOM = (
    "RANDOM TEACHER WEIGHTS: this run shows that the pipeline works, not what the method achieves"
)
SHIPPED = (
    "Teacher: vit_tiny14, this repository's own, trained on procedural rooms "
    "(weights/teacher.safetensors)"
)


def flag(name):
    return "--" + name.replace("_", "-")


def add_settings(parser, rows, titles=("demo", "paper")):
    """Add a flag for each row. One that is not given sets nothing: the preset decides later."""
    for name, row in rows.items():
        help = f"{row.help} ({titles[0]} {row.demo}, {titles[1]} {row.paper})"
        kind = {"type": type(row.paper), "choices": row.choices}
        if isinstance(row.paper, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag(name), default=argparse.SUPPRESS, help=help, **kind)


def check_settings(rows, values):
    """SystemExit with one sentence for the first value {name: value} out of its row's range."""
    for name, row in rows.items():
        value = values[name]
        if row.low is not None and not value >= row.low:  # NaN is out of any range
            least = "more than 0" if row.low == POSITIVE else f"at least {row.low}"
            raise SystemExit(f"{flag(name)} must be {least}, not {value}")
        if row.high is not None and not value <= row.high:
            raise SystemExit(f"{flag(name)} must be at most {row.high}, not {value}")


def parser_of(stage, **about):
    """The flags of a stage: its settings, and those that have no preset."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], **about)
    add = parser.add_argument
    if stage != "reconstruct":
        teacher = "dinov2_vits14" if stage == "distill" else "vit_tiny14"
        add("--teacher", default=teacher, help=TEACHERS)
    if stage == "distill":
        add("--teacher-weights", help='a file, or "random"; default: the public weights')
    add("--data", help="folder of photos (README); default: procedural rooms")
    if stage != "pretrain":
        add("--split", help="text file of the scenes in --data to take, one name a line")
    add("--preset", choices=["demo", "paper"], help="default: paper with --data, demo without")
    add("--name", help="of the run; default: the stage or preset, and the next free number")
    add("--resume", metavar="RUN", help="folder of a run to go on with, by its own settings")
    add_settings(parser, SETTINGS[stage])
    return parser


def parse_settings(arguments=None):
    """The command line as {setting: value}, or {"resume": folder} for that run's settings."""
    arguments = sys.argv[1:] if arguments is None else arguments
    about = dict(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    first = argparse.ArgumentParser(**about, add_help=False)
    stages = dict(choices=list(SETTINGS), default="distill")
    first.add_argument("--stage", **stages, help="what to train; each has settings of its own")
    stage = first.parse_known_args(arguments)[0].stage
    given = vars(parser_of(stage, parents=[first], **about).parse_args(arguments))
    if folder := given.pop("resume"):
        if any(not a.startswith("--resume") for a in arguments if a.startswith("--")):
            raise SystemExit("--resume takes the run's own settings: no other flag goes with it")
        return {"resume": folder}
    preset = given["preset"] or ("paper" if given["data"] else "demo")
    paper = SETTINGS[stage] if preset == "paper" else OF_FOLDERS if given["data"] else ()
    rows = SETTINGS[stage].items()
    settings = {name: row.paper if name in paper else row.demo for name, row in rows}
    settings |= given | {"preset": preset}
    if stage != "pretrain" and given["data"] and not {"near", "far"} & given.keys():
        settings["points"] = True  # the captures' own points may say near and far: see bounds
    check(settings)
    for name, value, unread, why in UNREAD:
        if settings.get(name) == value and (wrong := sorted(unread & given.keys())):
            raise SystemExit(f"{flag(wrong[0])} is not read with {flag(name)} {value}: {why}")
    for name in settings.keys() & set(PATHS):  # absolute, to resume from any folder
        if settings[name] not in WORDS and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    return settings


def check(settings):
    """SystemExit for the first setting that is out of its range or does not fit the others."""
    check_settings(SETTINGS[settings["stage"]], settings)
    patch = sizes_of(settings["teacher"])["patch"] if "teacher" in settings else 16
    for name, least in (("height", patch), ("width", patch), ("crop", 2 * patch)):
        if settings.get(name, least) < least:
            raise SystemExit(f"{flag(name)} must be at least {least}, not {settings[name]}")
    if settings["stage"] == "pretrain":
        if settings["crop"] % patch:
            raise SystemExit(f"--crop {settings['crop']} does not fit: multiples of {patch} do")
        least, most = settings["least_scale"], settings["most_scale"]
        if least > most:
            raise SystemExit(f"--most-scale must be at least --least-scale, not {most} with {least}")
        return
    if settings["split"] and not settings["data"]:
        raise SystemExit("--split lists scenes of --data, which is not given")
    near, far = settings["near"], settings["far"]
    if not far > near:
        raise SystemExit(f"--far must be more than --near, not {far} with {near}")
    for name in ("height", "width") if settings.get("geometry") != "depth" else ():
        if settings[name] % 16:
            low = settings[name] // 16 * 16
            fits = f"{low} and {low + 16} do" if low else "16 is the least"
            raise SystemExit(
                f"{flag(name)} {settings[name]} does not fit: multiples of 16 do; {fits}"
            )


def command(settings):
    """What to type for these settings."""
    data = ["--data", settings["data"]] if settings["data"] else []
    about = ["--stage", settings["stage"], "--preset", settings["preset"], *data]
    usual = parse_settings(about) | {"stage": "distill", "data": None}
    usual["preset"] = "paper" if settings["data"] else "demo"
    if settings["stage"] == "distill":
        usual["teacher"] = None  # always named
    flags = [f"{flag(name)} {value}" for name, value in settings.items() if value != usual[name]]
    return " ".join(["python train.py", *sorted(flags, key=lambda f: not f.startswith("--stage"))])


# ----------------------------------------------------------------------------- what a run is made of


def load_teacher(settings):
    """The teacher's ViT; where its weights cannot be had and all is on procedural rooms, the shipped one.

    Returns the ViT and what is to be said of it in all that is written, or None. Where the shipped teacher stands in,
    it is the settings' teacher from then on.
    """
    name, weights, seed = settings["teacher"], settings["teacher_weights"], settings["seed"]
    if weights == "random":
        return load_vit(name, "random", seed), RANDOM
    try:
        return load_vit(name, weights), SHIPPED if (name, weights) == ("vit_tiny14", None) else None
    except WeightsNotFound as error:
        if settings["data"]:
            raise SystemExit(f"{error} (--teacher-weights FILE)") from None
        print(f"{error}\nOn procedural rooms the shipped teacher, vit_tiny14, stands in for it.")
        settings["teacher"] = "vit_tiny14"
        return load_vit("vit_tiny14"), SHIPPED


def load_views(settings):
    """Training views, one for every scene of every step, and a batch to draw previews from that training never sees.

    A single capture has nothing to hold out; its preview is of its own frames.
    """
    if settings["stage"] == "pretrain":
        return load_crops(settings)
    options = {k: settings[k] for k in ("min_gap", "max_gap", "target")}
    options["num_context"] = settings["context_views"]
    size = settings["height"], settings["width"]
    path, split = settings["data"], settings["split"]
    scenes = data.open_scenes(path, split) if path else data.Rooms("train")
    steps, batch, seed = (settings[k] for k in ("steps", "batch_size", "seed"))
    views = data.Views(scenes, *size, **options, seed=seed, length=steps * batch)
    if settings["data"]:
        looked = data.some(scenes)
        without = sum(not scene.has_depth for scene in looked)
        deep = without if settings.get("geometry") == "depth" else without == len(looked)
        if deep and (settings.get("geometry") == "depth" or settings.get("coarse")):
            need = "--coarse 0" if settings.get("coarse") else "another --geometry"
            lack = f"no depth maps in {without} of {len(looked)} scenes"
            raise ValueError(f"{path}: {lack}; with {need} photos suffice")
        without = sum(not scene.has_masks for scene in looked)
        if without and settings["stage"] == "distill":
            lack = f"No segment masks in {without} of {len(looked)} scenes"
            print(f"{lack}: one segment per image there, blending off.")
        settings.update(bounds(settings, views))
    held_out = scenes if settings["data"] else data.Rooms("val")
    count = 1 if settings["stage"] == "distill" else 8  # one is looked at; errors of depth want a mean
    shown = data.Views(held_out, *size, **options, seed=seed + 1, length=count)
    return views, torch.utils.data.default_collate([shown[i] for i in range(count)])


def bounds(settings, views):
    """Near and far as the captures' own points say, where neither flag was given."""
    if not settings.pop("points", False) or settings.get("geometry") == "depth":
        return {}
    found = views.point_range()
    if not found:
        return {}
    near, far = (float(f"{d:.3g}") for d in found)
    print(f"{settings['data']}: by its points, --near {near:g} --far {far:g}")
    return {"near": near, "far": far}


def load_crops(settings):
    """The same of single photos: two crops for every photo of every step, and photos that training does not see."""
    height, width, count, crop, seed = (settings[k] for k in ("height", "width", "photos", "crop", "seed"))
    scales = (settings["least_scale"], settings["most_scale"])
    photos = data.Photos(settings["data"], height, width, count)
    crops = data.Crops(photos, crop, scales, seed, length=settings["steps"] * settings["batch_size"])
    held_out = photos if settings["data"] else data.Photos(None, height, width, 8, "val")
    shown = data.Crops(held_out, crop, scales, seed + 1, length=8)
    shown = torch.utils.data.default_collate([shown[i] for i in range(8)])
    return crops, shown | {"photos": torch.stack([held_out[i % len(held_out)] for i in range(8)])}


def geometry(settings):
    near, far = settings["near"], settings["far"]
    if settings["geometry"] == "depth":
        return SensorDepth()
    return FeedForward(
        load_reconstructor(None if settings["geometry"] == "shipped" else settings["geometry"]), near, far
    )


def build(settings, vit, device):
    """The stage's module, its optimiser and its schedule. No ViT is needed to reconstruct."""
    torch.manual_seed(settings["seed"])
    if settings["stage"] == "distill":
        names = ("prototypes", "head_dim", "bottleneck_dim", "lora_rank", "lora_alpha", "lora_dropout", "upsampling",
                 "blend", "centring", "teacher_temperature", "student_temperature", "loss", "temperature",
                 "targets")  # fmt: skip
        model = SplatAndDistill(vit, geometry(settings), **{k: settings[k] for k in names})
    elif settings["stage"] == "pretrain":
        start = settings["start"]
        vit = load_vit(settings["teacher"], start, settings["seed"])
        model = Pretraining(vit, settings["temperature"], settings["place_weight"], fresh=start == "random")
    else:
        sizes = {"small": SMALL, "published": ReconstructorConfig()}
        start = settings["start"]
        network = new_reconstructor(sizes[start]) if start in sizes else load_reconstructor(start).requires_grad_(True)
        model = Reconstruction(network, *(settings[k] for k in ("near", "far", "depth_weight")))
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
    """Names of what training changes: in the student and, by EMA, in the teacher. The rest is the teacher's file."""
    buffers = [name for name, _ in model.named_buffers() if name == "centre"]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return names + [name.replace("student", "teacher", 1) for name in names if "student" in name] + buffers


# ----------------------------------------------------------------------------- what a run writes


def replace_file(path, write):
    """Write a file beside its place and rename it there, so that there is always a whole one."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


WEIGHTS = {
    "distill": "student.safetensors", "reconstruct": "reconstructor.safetensors", "pretrain": "teacher.safetensors"
}  # fmt: skip


def save(folder, step, seconds, settings, warning, model, optimizer, schedule, measured):
    state = model.state_dict()
    checkpoint = dict(
        step=step, seconds=seconds, measured=measured, settings=settings, random_weights=warning == RANDOM,
        model={name: state[name] for name in trained(model)},
        optimizer=optimizer.state_dict(), schedule=schedule.state_dict(),
        rng=torch.get_rng_state(), cuda_rng=torch.cuda.get_rng_state_all(),
    )  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    metadata = {
        "command": command(settings), "settings": json.dumps(settings), "step": str(step), "device": device,
        "hours": f"{seconds / 3600:.2f}", "measured": json.dumps(measured),
    }  # fmt: skip
    name = WEIGHTS[settings["stage"]]
    if settings["stage"] == "distill":
        weights = merge_lora(model.student)
        metadata["random_weights"] = str(warning == RANDOM).lower()
    elif settings["stage"] == "pretrain":  # half precision: 6 MB to ship
        weights = {k: v.cpu().half().contiguous() for k, v in model.vit.state_dict().items()}
    else:
        network = model.reconstruct.reconstructor
        weights = {k: v.cpu().contiguous() for k, v in network.state_dict().items()}
        metadata["config"] = json.dumps(dataclasses.asdict(network.config))
    if warning:
        metadata["warning"] = warning
    if str(settings.get("start")).endswith(".safetensors"):  # how the weights that this run began with were made
        with safe_open(settings["start"], "pt") as file:
            metadata["start"] = json.dumps(file.metadata() or {})
    replace_file(folder / "checkpoint.pt", lambda path: torch.save(checkpoint, path))
    replace_file(folder / name, lambda path: save_file(weights, path, metadata))


def load_checkpoint(folder):
    path = folder / "checkpoint.pt"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; --resume takes the folder of a run, such as runs/demo-1")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        wanted = set("step seconds measured settings random_weights model optimizer schedule rng cuda_rng".split())
        if not isinstance(checkpoint, dict) or checkpoint.keys() != wanted:
            raise ValueError("it has other contents")
        found, beside = checkpoint["settings"], {"stage", "data", "preset", "name"}
        beside |= {"distill": {"teacher", "teacher_weights"}, "pretrain": {"teacher"}}.get(found.get("stage"), set())
        beside |= {"split"} if found.get("stage") != "pretrain" else set()
        if found.keys() != SETTINGS.get(found.get("stage"), {}).keys() | beside:
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
def draw_distillation(model, batch):
    """Panels {title: (H, W, 3)} of a batch's first scene, and how well splatting aligns {name: number}."""
    drawn = model.splat(batch["context"], batch["target"], batch["has_masks"])
    drawn["student"] = patch_tokens(model.student, batch["target"]["images"])
    target, gaussians, alpha = batch["target"], drawn["gaussians"], drawn["alphas"][0].cpu()
    H, W = alpha.shape
    grey = torch.zeros(*gaussians.opacities.shape, 3, 1, device=gaussians.means.device)
    depth = render(gaussians._replace(harmonics=grey), target["extrinsics"], target["Ks"], W, H)[1]
    seen, rendered, student = ~drawn["holes"][0], drawn["rendered"][0], drawn["student"][0]
    basis = shared_pca(torch.cat([drawn["splatted"][0][:, seen].T, student.flatten(1).T]))
    student = F.interpolate(to_rgb(student, basis).permute(2, 0, 1)[None], (H, W), mode="nearest")[0].permute(1, 2, 0)
    panels = {
        "target photo": target["images"][0].permute(1, 2, 0),
        "splatted teacher": to_rgb(rendered, basis) * (drawn["alphas"][0] > 0.5)[..., None],
        "student": student,
        "alpha": alpha[..., None].expand(-1, -1, 3),
        "depth": depth_colours(depth[0].cpu(), alpha > 0.5),
    }
    return panels, {name: number(value) for name, value in model.alignment(batch, drawn).items()}


@torch.no_grad()
def draw_reconstruction(model, batch):
    """Panels of a batch's first scene, and errors over all its scenes, which are taken one at a time."""
    target, scenes = batch["target"], []
    for i in range(len(target["images"])):
        one = {part: {k: v[i : i + 1] for k, v in batch[part].items()} for part in ("context", "target")}
        scenes.append(model(one)[2])
    photo, depth, alphas = (torch.cat([s[k] for s in scenes]) for k in ("photo", "depth", "alphas"))
    error = (photo - target["images"]).abs()
    panels = {
        "target photo": target["images"][0].permute(1, 2, 0),
        "rendering": photo[0].permute(1, 2, 0),
        "error x 4": 4 * error[0].permute(1, 2, 0),
        "depth": depth_colours(depth[0].cpu(), (alphas[0] > 0.5).cpu()),
    }
    measured = {"shown_psnr": number(-10 * (error**2).mean((1, 2, 3)).log10().mean())}
    if "depths" in target:
        known = (target["depths"] > 0) & (alphas > 0.5)
        panels["true depth"] = depth_colours(target["depths"][0].cpu(), (target["depths"][0] > 0).cpu())
        measured["shown_abs_rel"] = number(((depth / target["depths"] - 1).abs())[known].mean())
    return panels, measured


@torch.no_grad()
def draw_pretraining(model, batch):
    """Panels of a batch's first photos, and the share of spots that find themselves in the other crop."""
    photos = batch["photos"][:4]
    features = patch_tokens(model.vit, photos)  # (n, C, h, w)
    basis = shared_pca(features.transpose(0, 1).flatten(1).T)
    panels = {}
    for i, (photo, f) in enumerate(zip(photos, features)):
        panels[f"photo {i + 1}"] = photo.permute(1, 2, 0)
        colours = to_rgb(f, basis).permute(2, 0, 1)[None]
        panels[f"features {i + 1}"] = F.interpolate(colours, photo.shape[1:], mode="nearest")[0].permute(1, 2, 0)
    return panels, {"shown_matched": number(model(batch)[1]["matched"])}


DRAW = {"distill": draw_distillation, "reconstruct": draw_reconstruction, "pretrain": draw_pretraining}


def preview(path, model, batch, step, settings, warning):
    """Draw a batch's first scene to a PNG, and measure. Returns {name: number}."""
    model.eval()
    panels, measured = DRAW[settings["stage"]](model, batch)
    model.train()
    panels = {f"step {step}: {title}" if i == 0 else title: p for i, (title, p) in enumerate(panels.items())}
    write_sheet(path, panels, warning)
    return measured


def write_sheet(path, panels, warning=None):
    """Panels {title: (H, W, 3) in 0..1} side by side as a PNG, a warning above them in red and in the file's text."""
    H, W = next(iter(panels.values())).shape[:2]
    header, gap = 18 * (2 if warning else 1), 4
    sheet = Image.new("RGB", (len(panels) * (W + gap) - gap, H + header), "white")
    write, text = ImageDraw.Draw(sheet), PngInfo()
    for i, (title, panel) in enumerate(panels.items()):
        pixels = (panel.float().cpu().numpy() * 255 + 0.5).clip(0, 255).astype(np.uint8)
        sheet.paste(Image.fromarray(pixels), (i * (W + gap), header))
        write.text((i * (W + gap) + 2, header - 15), title, fill="black")
    if warning:
        write.text((2, 2), warning, fill=(200, 0, 0))
        text.add_text("warning", warning)
    replace_file(path, lambda temporary: sheet.save(temporary, format="PNG", pnginfo=text))


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
    reconstruct = settings["stage"] == "reconstruct"
    options = {"coarse": step % (settings["coarse"] + 1) != 0} if reconstruct else {}
    # To reconstruct is a matter of positions, which need float32
    with torch.autocast("cuda", torch.bfloat16, enabled=not reconstruct and torch.cuda.is_available()):
        loss, metrics, _ = model(batch, **options)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], settings["clip"])
    optimizer.step()
    schedule.step()
    if settings["stage"] == "distill" and step % settings["ema_every"] == 0:
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


def free_folder(parent, kind):
    """parent/kind-1, or with the first number that is not taken."""
    return next(folder for i in itertools.count(1) if not (folder := parent / f"{kind}-{i}").exists())


def progress(step, steps, first, started, recent):
    rate = (step - first) / (time.time() - started)
    left = (steps - step) / rate
    clock = f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
    values = {title: [m[k] for m in recent if k in m] for k, title in TITLES.items()}
    said = "   ".join(f"{title} {sum(v) / len(v):.6f}" for title, v in values.items() if v)
    print(f"step {step}/{steps}   {said}   {rate:.2f} steps/s   {clock} left", flush=True)


SUMMARIES = {
    "distill": "Cosine with the teacher's own features of the target view: splatted {cosine_splatted}, "
               "context left unwarped {cosine_unwarped}",
    "reconstruct": "Views that were shown: {shown_psnr} dB, depth abs rel {shown_abs_rel}",
    "pretrain": "Of spots in photos that it has not seen, {shown_matched} find themselves in the other crop",
}  # fmt: skip
TITLES = {
    "loss": "loss", "above_entropy": "above the teacher's entropy", "matched": "spots that find themselves", "place": "place",
    "mse": "photo", "log_depth": "log depth",
}  # fmt: skip


@contextlib.contextmanager
def plain_messages():
    """Bad input (ValueError) ends the program with its one sentence; warnings are printed as notes."""
    warnings.showwarning = lambda message, *_: print(f"Note: {message}")
    try:
        yield
    except ValueError as error:  # a data worker puts its traceback before the sentence
        raise SystemExit(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


def main(arguments=None):
    with plain_messages():
        run(parse_settings(arguments))


def run(settings):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = None
    if "resume" in settings:
        folder = Path(settings["resume"])
        checkpoint = load_checkpoint(folder)
        settings = checkpoint["settings"]
    views, shown = load_views(settings)
    vit, warning = load_teacher(settings) if settings["stage"] == "distill" else (None, None)
    model, optimizer, schedule = build(settings, vit, device)

    step, seconds, measured = 0, 0.0, {}
    if checkpoint:
        if checkpoint["random_weights"] != (warning == RANDOM):
            began = "random" if checkpoint["random_weights"] else "real"
            raise SystemExit(f"{folder}: began with {began} teacher weights, which are not what is found now")
        step, seconds, measured = (checkpoint[k] for k in ("step", "seconds", "measured"))
        if checkpoint["model"].keys() != set(trained(model)):
            raise SystemExit(f"{folder}/checkpoint.pt: its parameters are not those that its settings train")
        model.load_state_dict(checkpoint["model"], strict=False)
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["schedule"])
        truncate_metrics(folder / "metrics.jsonl", step)
        if step >= settings["steps"]:
            raise SystemExit(f"{folder}: has all its {step} steps already")
    else:
        kind = settings["preset"] if settings["stage"] == "distill" else settings["stage"]
        folder = Path("runs", settings["name"]) if settings["name"] else free_folder(Path("runs"), kind)
        if (folder / "checkpoint.pt").exists():
            raise SystemExit(
                f"{folder}: there is a run of that name; go on with --resume {folder}, or choose another --name"
            )
        folder.mkdir(parents=True, exist_ok=True)
        truncate_metrics(folder / "metrics.jsonl", 0)
    if warning:
        banner(warning)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = settings.get("teacher") or f"reconstructor, {settings['start']} to begin with,"
    print(f"{folder}: {what} on {device}, {trainable / 1e6:.1f} M trainable, {settings['steps']} steps")

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

    first, started, recent = step, time.time(), []

    def checkpoint_now():
        spent = seconds + time.time() - started
        save(folder, step, spent, settings, warning, model, optimizer, schedule, measured)

    with open(folder / "metrics.jsonl", "a") as log:
        if step == 0:
            measured = preview(folder / "preview_000000.png", model, shown, 0, settings, warning)
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
                measured = preview(folder / f"preview_{step:06d}.png", model, shown, step, settings, warning)
                line.update(measured)
            log.write(json.dumps(line | ({"random_weights": warning == RANDOM} if vit else {})) + "\n")
            log.flush()
            if step % 10 == 0 or step == settings["steps"]:
                progress(step, settings["steps"], first, started, recent)
                recent.clear()
            if step % settings["checkpoint_every"] == 0 or step == settings["steps"] or asked_to_stop:
                checkpoint_now()
            if asked_to_stop and step < settings["steps"]:
                print(f"Stopped after step {step}. To go on: python train.py --resume {folder}")
                return
    report(folder, measured, settings, warning)


def report(folder, measured, settings, warning):
    """What came of it, and what to do next."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tenth = max(1, len(lines) // 10)
    name = "above_entropy" if settings.get("loss") == "prototypes" else "loss"
    early, late = (sum(m[name] for m in part) / tenth for part in (lines[:tenth], lines[-tenth:]))
    change = f"{100 * (late / early - 1):+.0f} %" if early > 0 else "nothing was ever splatted into a target view"
    title = {"above_entropy": f"Loss {TITLES['above_entropy']}", "loss": "Loss"}[name]
    print(f"\n{title}: {early:.6f} in the first {tenth} steps, {late:.6f} in the last ({change})")
    weights = folder / WEIGHTS[settings["stage"]]
    said = {k: "none" if v is None else f"{v:.4f}" for k, v in measured.items()}
    print(SUMMARIES[settings["stage"]].format_map({"shown_abs_rel": "unknown"} | said))
    print(f"Written to {folder}/: {weights.name}, checkpoint.pt, metrics.jsonl, preview_*.png")
    if warning:
        banner(warning)
    if settings["stage"] == "reconstruct":
        print(f"Next, distill with it: python train.py --geometry {weights}")
    elif settings["stage"] == "pretrain":
        print(f"Next, a student of it: python train.py --teacher {settings['teacher']} --teacher-weights {weights}")
    elif settings["data"]:
        print(f"Next, load it: model.load_vit('{settings['teacher']}', '{weights}')")
    else:
        print("Next, does it understand 3D better than its teacher? python evaluate.py --task correspondence")


if __name__ == "__main__":
    main()
