"""train.py from its command line inwards, on a tiny transformer: what it writes and refuses."""

import argparse
import ctypes
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model as M
import train
from test_data import colmap
from test_reconstruct import save_small

SMALL = (
    "--teacher-weights random --loss both --lora-rank 8 --geometry depth --height 42 --width 56 "
    "--steps 6 --workers 0 --prototypes 32 --head-dim 32 --bottleneck-dim 16 --preview-every 4 "
    "--checkpoint-every 4 --ema-every 2"
).split()


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """A folder of its own, a small transformer by a known name, the signal handlers put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(M.ARCHITECTURES, "dinov2_vits14", dict(dim=24, depth=2, heads=2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # exact on a CPU
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def metrics(run):
    lines = Path("runs", run, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def stop_after(step, monkeypatch):
    """As if the user pressed Ctrl-C during that step."""
    real = train.Run.train_step

    def interrupted(run, batch):
        if run.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(run, batch)

    monkeypatch.setattr(train.Run, "train_step", interrupted)
    return lambda: monkeypatch.setattr(train.Run, "train_step", real)


def test_a_run_writes_what_it_says(capsys):
    train.main(SMALL)
    folder = Path("runs/demo-1")
    names = {p.name for p in folder.iterdir()}
    assert names == {"student.safetensors", "checkpoint.pt", "metrics.jsonl", ".lock",
                     "preview_000000.png", "preview_000004.png", "preview_000006.png"}  # fmt: skip
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1  # all can be read by others
    assert [m["step"] for m in metrics("demo-1")] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(m["loss"]) and m["above_entropy"] > -1e-6 for m in metrics("demo-1"))
    student = M.load_vit("dinov2_vits14", folder / "student.safetensors")
    teacher = M.load_vit("dinov2_vits14", "random", seed=0).state_dict()
    changed = [k for k, v in student.state_dict().items() if not torch.equal(v, teacher[k])]
    layers = [f"blocks.{i}.attn.{layer}.weight" for i in (0, 1) for layer in ("qkv", "proj")]
    assert changed == ["patch_embed.proj.weight", *layers]
    out = capsys.readouterr().out
    assert "step 6/6" in out and "left" in out and "Next" in out
    assert "Cosine with the teacher's own features of the target view: splatted" in out


def test_random_weights_are_recorded_in_everything(capsys):
    train.main(SMALL)
    folder = Path("runs/demo-1")
    assert capsys.readouterr().out.count(train.RANDOM) == 2  # before and after
    with safe_open(folder / "student.safetensors", "pt") as file:
        assert file.metadata()["warning"] == train.RANDOM
        assert json.loads(file.metadata()["settings"])["teacher_weights"] == "random"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["random_weights"] is True
    assert all(m["random_weights"] is True for m in metrics("demo-1"))
    picture = Image.open(folder / "preview_000006.png")
    assert picture.text["warning"] == train.RANDOM
    top = np.asarray(picture)[:18].astype(int)
    assert ((top[..., 0] > 150) & (top[..., 1] < 60)).sum() > 50  # red letters


def test_real_weights_are_not_called_random(capsys):
    torch.save(M.load_vit("dinov2_vits14", "random", seed=7).state_dict(), "dino.pth")
    train.main([*SMALL, "--teacher-weights", "dino.pth", "--steps", "2"])
    assert train.RANDOM not in capsys.readouterr().out
    assert all(m["random_weights"] is False for m in metrics("demo-1"))
    assert "warning" not in Image.open("runs/demo-1/preview_000002.png").text


def test_geometry_from_photos_alone(tmp_path):
    path = tmp_path / "small.safetensors"
    save_small(path)
    sizes = ["--height", "48", "--width", "64"]
    train.main([*SMALL, *sizes, "--steps", "2", "--geometry", str(path)])
    assert len(metrics("demo-1")) == 2
    names = load_file("runs/demo-1/student.safetensors").keys()
    names = names | torch.load("runs/demo-1/checkpoint.pt")["model"].keys()
    # The reconstructor is neither trained nor saved
    assert not any("depth_predictor" in name for name in names)
    with pytest.raises(SystemExit, match="nowhere.ckpt: no such file"):
        train.main([*SMALL, *sizes, "--geometry", "nowhere.ckpt"])


RECONSTRUCT = (
    "--stage reconstruct --height 64 --width 64 --steps 6 --workers 0 --coarse 1 "
    "--preview-every 4 --checkpoint-every 4"
).split()


def test_a_reconstructor_is_trained_resumed_and_used(monkeypatch, capsys):
    """Every second step whole; stopped and resumed to the same bits; and its weights distill."""
    train.main([*RECONSTRUCT, "--name", "whole"])
    out = capsys.readouterr().out
    assert "step 6/6   loss" in out
    assert "Next, distill with it: python train.py --geometry runs/whole/recon" in out
    go_on = stop_after(2, monkeypatch)
    train.main([*RECONSTRUCT, "--name", "parts"])
    go_on()
    train.main(["--resume", "runs/parts"])
    assert metrics("parts") == metrics("whole")
    lines = metrics("whole")
    for m in lines:
        assert m["loss"] == pytest.approx(m.get("mse", 0) + 0.2 * m["log_depth"], rel=1e-5)
    assert ["mse" in m for m in lines] == [False, True] * 3
    assert lines[-1]["shown_psnr"] > 10 and 0 < lines[-1]["shown_abs_rel"] < 2
    path = "runs/whole/reconstructor.safetensors"
    whole, parts = load_file(path), load_file("runs/parts/reconstructor.safetensors")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    flags = f"python train.py {' '.join(RECONSTRUCT)} --preset demo --name whole"
    assert sorted(about["command"].split()) == sorted(flags.split())
    assert json.loads(about["measured"])["shown_psnr"] == lines[-1]["shown_psnr"]
    assert float(about["hours"]) >= 0
    sheet = np.asarray(Image.open("runs/whole/preview_000006.png"))
    assert sheet.shape == (64 + 18, 5 * 68 - 4, 3)  # photo, rendering, error, depth, true depth
    photos = [*SMALL, "--height", "48", "--width", "64", "--steps", "1"]
    train.main([*photos, "--geometry", path])
    assert len(metrics("demo-1")) == 1
    train.main([*RECONSTRUCT, "--steps", "1", "--start", path, "--lr", "1e-9"])
    again = load_file("runs/reconstruct-1/reconstructor.safetensors")
    assert all((whole[k] - again[k]).abs().max() < 1e-6 for k in whole)


def test_shown_psnr_leaves_out_what_a_validity_mask_does():
    """Off by 0.1 is 20 dB; what lies behind the mask is off by 0.5."""
    valid = torch.ones(2, 4, 6, dtype=torch.bool)
    valid[0, :2] = False
    truth = torch.full((2, 3, 4, 6), 0.3)
    photo = truth + torch.where(valid, 0.1, 0.5)[:, None]
    drawn = {"photo": photo, "depth": torch.ones(2, 4, 6), "alphas": torch.ones(2, 4, 6)}
    scenes = iter([{k: v[:1] for k, v in drawn.items()}, {k: v[1:] for k, v in drawn.items()}] * 3)
    stage = object.__new__(train.Reconstruct)
    stage.model = lambda batch: (None, None, next(scenes))
    target = {"images": truth, "valid": valid}
    panels, measured = stage.draw({"context": {}, "target": target})
    assert float(measured["shown_psnr"]) == pytest.approx(20, abs=1e-3)
    error = panels["error x 4"]
    torch.testing.assert_close(error, 0.4 * valid[0, :, :, None].float().expand(-1, -1, 3))
    # A scene without any valid pixel does not count
    none_valid = torch.stack([torch.zeros_like(valid[0]), valid[1]])
    _, measured = stage.draw({"context": {}, "target": target | {"valid": none_valid}})
    assert float(measured["shown_psnr"]) == pytest.approx(20, abs=1e-3)
    _, measured = stage.draw({"context": {}, "target": {"images": truth}})
    assert float(measured["shown_psnr"]) < 17


PRETRAIN = (
    "--stage pretrain --teacher dinov2_vits14 --steps 4 --batch-size 2 --photos 4 --height 42 "
    "--width 42 --crop 28 --workers 0 --preview-every 2 --checkpoint-every 2 --place-weight 0.1"
).split()


def test_a_teacher_is_pretrained_resumed_and_used(monkeypatch, capsys):
    train.main([*PRETRAIN, "--name", "whole"])
    names = {p.name for p in Path("runs/whole").iterdir()}
    assert names >= {"teacher.safetensors", "preview_000004.png"}
    restore = stop_after(2, monkeypatch)
    train.main([*PRETRAIN, "--name", "halves"])
    restore()
    train.main(["--resume", "runs/halves"])
    assert [m["loss"] for m in metrics("halves")] == [m["loss"] for m in metrics("whole")]
    whole, halves = (load_file(f"runs/{name}/teacher.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[k], halves[k]) and whole[k].dtype == torch.half for k in whole)
    with safe_open("runs/whole/teacher.safetensors", "pt") as file:
        about = file.metadata()
    assert about["command"].startswith("python train.py --stage pretrain") and about["step"] == "4"
    assert "--teacher-weights runs/whole/teacher.safetensors" in capsys.readouterr().out
    student = [a if a != "random" else "runs/whole/teacher.safetensors" for a in SMALL]
    train.main([*student, "--steps", "1"])
    assert all(m["random_weights"] is False for m in metrics("demo-1"))


def test_a_teacher_is_pretrained_on_a_folder_of_photos(tmp_path):
    for name in ("a.png", "b/c.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    train.main([*PRETRAIN, "--data", "photos"])
    assert len(metrics("pretrain-1")) == 4
    assert all(0 <= m["matched"] <= 1 for m in metrics("pretrain-1"))
    with pytest.raises(SystemExit, match="nowhere: no photos"):
        train.main([*PRETRAIN, "--data", "nowhere"])


def test_all_weights_are_trained_where_there_is_no_lora():
    small = [a for a in SMALL if a not in ("--lora-rank", "8")]
    train.main([*small, "--lora-rank", "0", "--steps", "2"])
    student = M.load_vit("dinov2_vits14", "runs/demo-1/student.safetensors")
    teacher = M.load_vit("dinov2_vits14", "random", seed=0)
    same = [k for k, v in student.state_dict().items() if torch.equal(v, teacher.state_dict()[k])]
    assert same == ["mask_token"]


@pytest.mark.parametrize("flags,message", [
    ("--loss contrastive --prototypes 8", "--prototypes is not read with --loss contrastive"),
    ("--loss prototypes --temperature 0.1", "--temperature is not read with --loss prototypes"),
    ("--lora-rank 0 --lora-alpha 4", "--lora-alpha is not read with --lora-rank 0"),
    ("--geometry depth --near 2", "--near is not read with --geometry depth"),
])  # fmt: skip
def test_a_flag_that_nothing_would_read_is_refused(flags, message):
    with pytest.raises(SystemExit, match=message):
        train.parse_settings(flags.split())


def test_reconstruction_learns_from_photos_alone(tmp_path):
    capture(tmp_path / "scan", depth=False)
    photos = [*RECONSTRUCT, "--data", "scan", "--preset", "demo"]
    train.main([*photos, "--steps", "2", "--coarse", "0"])
    lines = metrics("reconstruct-1")
    with pytest.raises(SystemExit, match="scan: no depth maps; with --coarse 0 photos suffice"):
        train.main(photos)
    assert all(m["loss"] == m["mse"] for m in lines) and "shown_abs_rel" not in lines[-1]


@pytest.mark.parametrize(
    "flag,stage", [("--prototypes", "reconstruct"), ("--depth-weight", "distill")]
)
def test_a_stage_does_not_take_the_others_settings(flag, stage, capsys):
    with pytest.raises(SystemExit):
        train.main(["--stage", stage, flag, "1"])
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_resumed_run_is_the_run_that_never_stopped(monkeypatch, capsys):
    train.main([*SMALL, "--name", "whole"])
    go_on = stop_after(3, monkeypatch)
    train.main([*SMALL, "--name", "parts"])
    assert "To go on: python train.py --resume runs/parts" in capsys.readouterr().out
    assert len(metrics("parts")) == 3
    go_on()
    # As after a crash: lines beyond the checkpoint, one cut short
    with open("runs/parts/metrics.jsonl", "ab") as log:
        log.write(b'{"step": 4, "loss": 99}\n{"step": 5, \xff')
    train.main(["--resume", "runs/parts"])
    assert metrics("parts") == metrics("whole")  # to the last bit: JSON keeps all digits
    whole, parts = (load_file(f"runs/{name}/student.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    with pytest.raises(SystemExit, match="has all its 6 steps already"):
        train.main(["--resume", "runs/parts"])


def test_distance_to_the_teacher_falls():
    train.main([*SMALL, "--steps", "60", "--preview-every", "60"])
    above = [m["above_entropy"] for m in metrics("demo-1")]
    assert sum(above[-6:]) < 0.7 * sum(above[:6])


def test_the_preview_shows_five_pictures():
    train.main([*SMALL, "--steps", "1"])
    sheet = np.asarray(Image.open("runs/demo-1/preview_000001.png"))
    assert sheet.shape == (42 + 36, 5 * 60 - 4, 3)
    panels = [sheet[36:, i * 60 : i * 60 + 56] for i in range(5)]
    assert all(panels[i].std() > 2 for i in (0, 1, 2, 4))
    alpha = panels[3]  # mostly opaque, and grey
    assert alpha.mean() > 128 and (alpha[..., 0] == alpha[..., 1]).all()


def test_runs_do_not_overwrite_each_other():
    train.main([*SMALL, "--steps", "1"])
    train.main([*SMALL, "--steps", "1"])
    assert Path("runs/demo-2/student.safetensors").exists()
    taken = "runs/demo-1: there is a run of that name; --resume goes on with it"
    with pytest.raises(SystemExit, match=taken):
        train.main([*SMALL, "--name", "demo-1"])


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")

    def fails(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(ValueError, match="checkpoint.pt: cannot be written .disk full"):
        train.replace_file(path, fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_flushed_to_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, os.replace
    name_of = lambda file: os.path.basename(os.readlink(f"/proc/self/fd/{file}"))  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(name_of(file)) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *a: calls.append("renamed") or rename(*a))
    train.replace_file(tmp_path / "file", lambda path: path.write_text("whole"))
    assert calls == ["file.tmp", "renamed"] and (tmp_path / "file").read_text() == "whole"


def no_network(monkeypatch):
    def refuse(*_):
        raise M.WeightsNotFound("no weights: fetch them or pass the file")

    monkeypatch.setattr(M, "_public_weights", refuse)


def test_demo_goes_on_without_the_teachers_weights(monkeypatch, capsys):
    no_network(monkeypatch)
    small = [a for a in SMALL if a not in ("--teacher-weights", "random")]
    train.main([*small, "--steps", "1"])
    out = capsys.readouterr().out
    assert out.count(train.SHIPPED) == 2 and train.RANDOM not in out
    with safe_open("runs/demo-1/student.safetensors", "pt") as file:
        about = file.metadata()
    assert about["warning"] == train.SHIPPED and about["random_weights"] == "false"
    assert json.loads(about["settings"])["teacher"] == "vit_tiny14"
    assert "--teacher vit_tiny14" in about["command"]
    assert Image.open("runs/demo-1/preview_000001.png").text["warning"] == train.SHIPPED
    start = M.load_vit("vit_tiny14")
    student = M.load_vit("vit_tiny14", "runs/demo-1/student.safetensors")
    assert not torch.equal(start.blocks[0].attn.qkv.weight, student.blocks[0].attn.qkv.weight)
    assert torch.equal(start.blocks[0].mlp.fc1.weight, student.blocks[0].mlp.fc1.weight)


def test_with_data_missing_weights_stop_the_run(monkeypatch, tmp_path):
    no_network(monkeypatch)
    capture(tmp_path / "scan")
    with pytest.raises(SystemExit, match="fetch them or pass the file .--teacher-weights FILE"):
        train.main(["--data", "scan", "--height", "48", "--width", "64"])


def test_presets():
    assert train.parse_settings([])["preset"] == "demo"
    settings = train.parse_settings(["--data", "x"])
    assert settings["preset"] == "paper"
    # every number of the paper's table
    expected = dict(
        height=576, width=880, context_views=2, min_gap=8, max_gap=12, batch_size=1, lora_rank=8,
        lora_alpha=8.0, lora_dropout=0.1, head_dim=2048, bottleneck_dim=256, prototypes=65536,
        lr=2e-5, warmup=0.01, steps=300_000, momentum=0.999, ema_every=10, blend=0.5,
        teacher_temperature=1.0, student_temperature=1.0,
    )  # fmt: skip
    assert {k: settings[k] for k in expected} == expected
    assert train.parse_settings(["--data", "x", "--preset", "demo", "--lr", "0.5"])["lr"] == 0.5


def test_settings_make_flags_of_their_values_type(capsys):
    rows = {
        "big_number": train.Setting(1, 2, "how many", 1, 5),
        "ratio": train.Setting(0.5, 1.0, "share", train.POSITIVE),
        "kind": train.Setting("a", "b", "which", choices=("a", "b")),
        "norm": train.Setting(False, True, "the norm"),
        "path": train.Setting(None, None, "a file"),
    }
    parser = argparse.ArgumentParser()
    train.add_settings(parser, rows, titles=("quick", "published"))
    parse = lambda line: vars(parser.parse_args(line.split()))  # noqa: E731
    given = parse("--big-number 3 --ratio 1 --kind b --no-norm --path x")
    assert given == {"big_number": 3, "ratio": 1.0, "kind": "b", "norm": False, "path": "x"}
    assert parse("") == {} and isinstance(given["ratio"], float) and given["norm"] is False
    help = " ".join(parser.format_help().split())
    assert "how many (quick 1, published 2)" in help and "a file" in help and "None" not in help
    train.check_settings(rows, given)
    for name, value, message in (
        ("big_number", 0, "--big-number must be at least 1, not 0"),
        ("big_number", 6, "--big-number must be at most 5, not 6"),
        ("ratio", 0.0, "--ratio must be more than 0, not 0.0"),
        ("ratio", math.nan, "--ratio must be more than 0, not nan"),
    ):
        with pytest.raises(SystemExit, match=message):
            train.check_settings(rows, given | {name: value})


class Recorded(dict):
    """A dict that remembers which keys were asked for."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)


def test_every_setting_is_read(tmp_path):
    save_small(tmp_path / "small.safetensors")
    photos = ["--height", "48", "--width", "64", "--geometry", str(tmp_path / "small.safetensors")]
    stages = {"distill": [*SMALL, *photos], "reconstruct": RECONSTRUCT, "pretrain": PRETRAIN}
    for stage, arguments in stages.items():
        settings = Recorded(train.parse_settings([*arguments, "--steps", "2"]))
        train.train(settings)
        assert set(train.SETTINGS[stage]) - settings.read == set()


def test_the_learning_rate_climbs_and_falls():
    train.main([*SMALL, "--steps", "12", "--warmup", "0.25", "--lr", "0.01"])
    rates = [m["lr"] for m in metrics("demo-1")]
    assert rates.index(max(rates)) in (1, 2) and rates[-1] < 1e-5
    assert max(rates) == pytest.approx(0.01, rel=0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True)


@pytest.mark.parametrize("steps", range(1, 21))
@pytest.mark.parametrize("warmup", ["0.01", "0.1", "0.05", "0.125"])
def test_any_number_of_steps_has_a_schedule(steps, warmup, monkeypatch):
    """Torch's one-cycle schedule divides by zero where warm-up is exactly one step."""
    monkeypatch.setattr(train, "load_views", lambda settings, num_shown: (None, None))
    settings = train.parse_settings([*SMALL, "--steps", str(steps), "--warmup", warmup])
    run = train.Run(settings)
    for _ in range(steps):
        run.optimizer.step()
        run.schedule.step()
    assert run.schedule.get_last_lr()[0] < settings["lr"]


def test_teacher_is_updated_every_so_many_steps(monkeypatch):
    momenta = []
    update = lambda self, momentum: momenta.append(momentum)  # noqa: E731
    monkeypatch.setattr(train.SplatAndDistill, "update_teacher", update)
    train.main([*SMALL, "--momentum", "0.9"])
    assert momenta == [0.9, 0.9, 0.9]  # 6 steps, every second


def capture(folder, frames=4, depth=True):
    """A tiny capture of a wall 2 m ahead."""
    (folder / "images").mkdir(parents=True)
    about = {"fl_x": 50.0, "w": 56, "h": 42, "frames": []}
    picture = np.random.default_rng(0).integers(0, 255, (42, 56 + frames, 3)).astype(np.uint8)
    for i in range(frames):
        pose = np.eye(4)
        pose[0, 3] = 0.04 * i
        Image.fromarray(picture[:, i : i + 56]).save(folder / f"images/{i}.png")
        entry = {"file_path": f"images/{i}.png", "transform_matrix": pose.tolist()}
        if depth:
            np.save(folder / f"{i}.npy", np.full((42, 56), 2.0, np.float32))
            entry["depth_file_path"] = f"{i}.npy"
        about["frames"].append(entry)
    (folder / "transforms.json").write_text(json.dumps(about))
    return str(folder)


def test_trains_on_a_capture_and_resumes_from_elsewhere(tmp_path, monkeypatch, capsys):
    capture(tmp_path / "scan")
    go_on = stop_after(2, monkeypatch)
    train.main([*SMALL, "--data", "scan", "--preset", "demo"])
    assert "No segment masks in 1 of 1 scenes" in capsys.readouterr().out
    go_on()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train.main(["--resume", str(tmp_path / "runs/demo-1")])
    monkeypatch.chdir(tmp_path)
    assert len(metrics("demo-1")) == 6


def test_the_points_of_a_reconstruction_say_near_and_far(tmp_path, capsys):
    """Where neither flag was given; what they say is kept, and typed to run it again."""
    colmap(tmp_path / "scan")
    flags = "--data scan --preset demo --geometry shipped --height 48 --width 32 --steps 1".split()
    flags = [*SMALL, *flags, "--min-gap", "2", "--max-gap", "40", "--target", "any"]
    settings = train.parse_settings(flags)
    views, _ = train.load_views(settings, 1)
    near, far = views.point_range()
    assert settings["near"] == pytest.approx(near, rel=0.005) != 3
    assert settings["far"] == pytest.approx(far, rel=0.005) != 50
    assert f"--near {settings['near']} --far {settings['far']}" in train.command(settings)
    assert f"by its points, --near {settings['near']:g}" in capsys.readouterr().out
    settings = train.parse_settings([*flags, "--far", "20"])
    train.load_views(settings, 1)
    assert (settings["near"], settings["far"]) == (3, 20)


def test_a_split_chooses_what_is_trained_on(tmp_path):
    for name in ("one", "two"):
        capture(tmp_path / "scans" / name)
    (tmp_path / "split.txt").write_text("two\n")
    flags = [*SMALL, "--data", "scans", "--preset", "demo", "--split", "split.txt", "--steps", "1"]
    settings = train.parse_settings(flags)
    assert [scene.name for scene in train.load_views(settings, 1)[0].scenes] == ["two"]
    assert settings["split"] == str(tmp_path / "split.txt")  # to resume from anywhere


def test_capture_without_depth_is_refused_before_anything_is_written(tmp_path):
    capture(tmp_path / "scan", depth=False)
    lack = "scan: no depth maps in 1 of 1 scenes; with another --geometry photos suffice"
    with pytest.raises(SystemExit, match=lack):
        train.main([*SMALL, "--data", "scan"])
    assert not Path("runs").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_photo_that_breaks_stops_the_run_but_loses_nothing(tmp_path, monkeypatch, workers):
    folder = Path(capture(tmp_path / "scan"))
    real = train.Run.train_step

    def breaks(run, batch):
        if run.step == 0:
            for photo in (folder / "images").iterdir():
                photo.write_bytes(b"broken")
        return real(run, batch)

    monkeypatch.setattr(train.Run, "train_step", breaks)
    flags = [*SMALL, "--data", "scan", "--preset", "demo", "--checkpoint-every", "99"]
    with pytest.raises(SystemExit, match="images/.*png: an image that cannot be read") as error:
        train.main([*flags, "--workers", workers])
    assert "\n" not in str(error.value)
    step = torch.load("runs/demo-1/checkpoint.pt")["step"]
    assert 1 <= step == len(metrics("demo-1"))


def test_a_run_that_sees_only_holes_ends_and_says_so(tmp_path, capsys):
    folder = Path(capture(tmp_path / "scan"))
    for depth in folder.glob("*.npy"):
        np.save(depth, np.zeros((42, 56), np.float32))
    train.main([*SMALL, "--data", "scan", "--preset", "demo"])
    out = capsys.readouterr().out
    assert "nothing was ever splatted into a target view" in out and "splatted none" in out
    assert metrics("demo-1")[-1]["cosine_splatted"] is None


TINY = "--teacher vit_tiny14 --height 56 --width 56 --steps 30 --checkpoint-every 2"


def begun(*arguments, steps=2, lines="", **limits):
    """A real process that trains runs/run with a process that loads data, after some steps."""
    head = f"import os, signal, sys, time\nsys.path.insert(0, {str(Path(train.__file__).parent)!r})"
    script = f"{head}\nimport torch, data, train\n{lines}\ntrain.main()"
    command = [sys.executable, "-c", script, *arguments]
    about = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, start_new_session=True, **about, **limits)
    log, deadline = Path("runs/run/metrics.jsonl"), time.time() + 120
    while steps and not (log.exists() and log.read_text().count("\n") >= steps):
        assert time.time() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


def youngest_child(process):
    """Its process id, by the kernel's list: "id (name) state parent ..."."""
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    ids = [int(s.split()[0]) for s in stats if int(s.rpartition(")")[2].split()[1]) == process.pid]
    return max(ids)


SLOW = """
def sample(views, i, real=data.Views.sample):
    time.sleep(0.3)  # the process that trains waits for this one
    if os.path.exists("signal"):
        signum = int(open("signal").read())
        os.unlink("signal")
        os.killpg(0, signum)
    return real(views, i)
data.Views.sample = sample
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_ends_the_run_after_its_step(signum):
    """As Ctrl-C in a terminal or the end of a job: it reaches the loader's process too."""
    flags = f"{TINY} --steps 999 --checkpoint-every 999 --name run".split()
    process = begun(*flags, lines=SLOW)
    with pytest.raises(SystemExit, match="runs/run: another process is training there"):
        train.main([*flags, "--steps", "3"])  # by a name that has no checkpoint yet
    Path("number").write_text(str(int(signum)))
    Path("number").rename("signal")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "To go on: python train.py --resume runs/run" in out
    assert torch.load("runs/run/checkpoint.pt")["step"] == len(metrics("run")) >= 2


def no_shared_memory():
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No space (28)")


@pytest.mark.parametrize("fail", [lambda: os._exit(1), no_shared_memory])
def test_a_loader_that_fails_is_one_sentence(fail, monkeypatch):
    views = train.data.Views.__getitem__
    fails_at_2 = lambda v, i: fail() if i == 2 else views(v, i)  # noqa: E731
    monkeypatch.setattr(train.data.Views, "__getitem__", fails_at_2)
    said = "^a process that loads data was killed.*/dev/shm"
    with pytest.raises(SystemExit, match=said) as error:
        train.main([*SMALL, "--workers", "1"])
    assert "\n" not in str(error.value)


HANGS = """
def sample(views, i, real=data.Views.sample):
    time.sleep(600 * (i >= 4))
    return real(views, i)
def step(run, batches, real=train.Run.train_step):
    if run.step == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(run, batches)
data.Views.sample, train.Run.train_step = sample, step
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1  # not 5 s until it is ended
"""


def test_a_loader_that_hangs_ends_with_the_run():
    process = begun(*TINY.split(), "--name", "run", "--batch-size", "2", lines=HANGS, steps=0)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "To go on: python train.py --resume runs/run" in out
    with pytest.raises(ProcessLookupError):  # nothing of its group is left
        os.killpg(process.pid, 0)


def test_a_loss_that_is_not_finite_ends_the_run(monkeypatch):
    train.main([*SMALL, "--name", "whole"])
    real = train.Distill.step

    def step(stage, model, batch, number, descend):
        if number == 3:
            batch["target"]["images"] *= torch.nan
        return real(stage, model, batch, number, descend)

    monkeypatch.setattr(train.Distill, "step", step)
    with pytest.raises(SystemExit, match="^runs/x: the loss of step 3 is nan$"):
        train.main([*SMALL, "--name", "x", "--checkpoint-every", "2"])
    assert torch.load("runs/x/checkpoint.pt")["step"] == 2
    monkeypatch.setattr(train.Distill, "step", real)
    train.main(["--resume", "runs/x"])
    assert metrics("x") == metrics("whole")


def test_after_a_kill_of_the_loader_or_of_all_a_resumed_run_is_the_same():
    train.main([*TINY.split(), "--name", "whole", "--steps", "10"])
    process = begun(*TINY.split(), "--name", "run", "--steps", "10", steps=4)
    os.kill(youngest_child(process), signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in out
    assert "a process that loads data was killed" in out.splitlines()[-1]
    process = begun("--resume", "runs/run", steps=6)
    with pytest.raises(SystemExit, match="runs/run: another process is training there"):
        train.main(["--resume", "runs/run"])
    process.kill()  # a dead one holds no lock
    process.communicate()
    train.main(["--resume", "runs/run"])
    assert metrics("run") == metrics("whole")
    whole, run = (load_file(f"runs/{name}/student.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], run[name]) for name in whole)


FAULTS = {  # lines of a process's own, and how it ends
    "killed while it writes a checkpoint": ("""
def save(checkpoint, file, real=torch.save):
    if checkpoint["step"] == 4:
        file.write(b"half of it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real(checkpoint, file)
torch.save = save
""", signal.SIGKILL),
    "interrupted twice in one step": ("""
def step(run, batches, real=train.Run.train_step):
    if run.step == 4:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    return real(run, batches)
train.Run.train_step = step
""", signal.SIGINT),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_process_that_dies_at_the_worst_moment_loses_no_checkpoint(fault):
    flags = f"{TINY} --workers 0 --steps 6 --name".split()
    train.main([*flags, "whole"])
    lines, signum = FAULTS[fault]
    process = begun(*flags, "run", lines=lines, steps=0)
    process.communicate(timeout=60)
    assert process.returncode == -signum
    step = torch.load("runs/run/checkpoint.pt")["step"]
    assert step == {signal.SIGKILL: 2, signal.SIGINT: 4}[signum]
    train.main(["--resume", "runs/run"])
    assert metrics("run") == metrics("whole") and not list(Path("runs/run").glob("*.tmp"))


def few_bytes(size=10**6):  # as if the disk were full: files end at 1 MB
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_is_one_sentence_and_leaves_whole_files():
    process = begun(*TINY.split(), "--name", "run")
    process.terminate()
    process.communicate()
    step = len(metrics("run"))
    before = {path.name: path.read_bytes() for path in Path("runs/run").iterdir()}
    process = begun("--resume", "runs/run", preexec_fn=few_bytes, steps=0)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in out
    assert out.splitlines()[-1] == "runs/run/checkpoint.pt: cannot be written (File too large)"
    after = {path.name: path.read_bytes() for path in Path("runs/run").iterdir()}
    assert after.keys() == before.keys() and len(metrics("run")) in (step + 1, step + 2)
    same = [name for name in before if name != "metrics.jsonl"]
    assert all(after[name] == before[name] for name in same)


def ended_in(process):
    """The last line that a process prints which fails."""
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in out, out
    return out.splitlines()[-1]


def goes_on_as(whole):
    """The run that failed, resumed, is the one that nothing disturbed."""
    assert not list(Path("runs/run").glob("*.tmp"))
    train.main(["--resume", "runs/run"])
    assert metrics("run") == metrics(whole)


def test_a_disk_too_full_for_metrics_or_a_preview_loses_nothing_written():
    flags = f"{TINY} --workers 0 --steps 16 --checkpoint-every 99 --preview-every 14 --name"
    train.main([*flags.split(), "whole"])
    process = begun(*flags.split(), "run")
    process.terminate()
    process.communicate()
    size = Path("runs/run/metrics.jsonl").stat().st_size
    for name, room in (("metrics.jsonl", 20), ("preview_000014.png", 9000)):  # 20: half a line
        limit = lambda: few_bytes(size + room)  # noqa: E731, B023
        process = begun("--resume", "runs/run", preexec_fn=limit, steps=0)
        assert ended_in(process) == f"runs/run/{name}: cannot be written (File too large)"
    goes_on_as("whole")


def bound_by_modes():
    """Root without its right to ignore modes: a process that it then starts lacks it too."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def test_a_folder_that_turns_read_only_is_one_sentence_and_loses_nothing_written():
    flags = f"{TINY} --steps 16 --checkpoint-every 6 --name"
    train.main([*flags.split(), "whole"])
    process = begun(*flags.split(), "run", steps=7, preexec_fn=bound_by_modes)
    os.chmod("runs/run", 0o555)
    assert ended_in(process) == "runs/run/checkpoint.pt: cannot be written (Permission denied)"
    process = begun("--resume", "runs/run", steps=0, preexec_fn=bound_by_modes)
    assert ended_in(process).endswith("(Permission denied)")
    os.chmod("runs/run", 0o755)
    goes_on_as("whole")


def test_a_reader_of_the_output_that_goes_away_does_not_end_the_run():
    """As in `train.py | head -1`."""
    process = begun(*TINY.split(), "--name", "run")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert torch.load("runs/run/checkpoint.pt")["step"] == len(metrics("run")) == 30


def test_ctrl_c_while_the_model_is_built_is_one_word(monkeypatch):
    pressed = lambda *_: signal.raise_signal(signal.SIGINT)  # noqa: E731
    monkeypatch.setattr(train, "load_vit", pressed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    try:
        with pytest.raises(SystemExit, match="^Interrupted$"):
            train.main(SMALL)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_loader_killed_while_a_file_is_written_is_heard_of_after_it(tmp_path):
    """Torch's handler of SIGCHLD raises; the file is whole, and is not named."""
    def killed(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    def write(path):
        signal.raise_signal(signal.SIGCHLD)
        path.write_text("whole")

    before = signal.signal(signal.SIGCHLD, killed)
    try:
        with pytest.raises(RuntimeError, match="^DataLoader worker"):
            train.replace_file(tmp_path / "file", write)
        assert signal.getsignal(signal.SIGCHLD) is killed
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert (tmp_path / "file").read_text() == "whole"
    assert not Path("runs").exists()


def test_a_run_killed_before_its_weights_were_written_writes_them_when_resumed():
    train.main([*SMALL, "--name", "x"])
    before = load_file("runs/x/student.safetensors")
    Path("runs/x/student.safetensors").unlink()
    with pytest.raises(SystemExit, match="runs/x: has all its 6 steps already"):
        train.main(["--resume", "runs/x"])
    after = load_file("runs/x/student.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_without_their_checkpoint_are_not_written_over():
    train.main([*SMALL, "--name", "x", "--steps", "1"])
    Path("runs/x/checkpoint.pt").unlink()
    with pytest.raises(SystemExit, match="runs/x: there are weights of a run without its checkpo"):
        train.main([*SMALL, "--name", "x"])


def test_a_file_where_the_folder_belongs_is_named():
    Path("runs").write_text("not a folder")
    with pytest.raises(SystemExit, match="^runs.*: (File exists|Not a directory)"):
        train.main([*SMALL, "--name", "x"])


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--depth-weight", "-1", "--stage", "reconstruct"], "--depth-weight must be at least 0"),
        (["--height", "40", "--stage", "reconstruct"], "--height must be a multiple of 16, .* 40"),
        (["--blend", "2"], "--blend must be at most 1, not 2.0"),
        (["--blend", "-1"], "--blend must be at least 0, not -1.0"),
        (["--momentum", "nan"], "--momentum must be at least 0, not nan"),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--lr", "0"], "--lr must be more than 0, not 0.0"),
        (["--height", "10"], "--height must be at least 14, not 10"),
        (["--workers", "-1"], "--workers must be at least 0"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--height", "1000000"], "--height must be at most 4096, not 1000000"),
        (["--prototypes", "1000000000"], "--prototypes must be at most 1048576"),
        (["--workers", "100000"], "--workers must be at most 256"),
        (["--batch-size", "10000000"], "--batch-size must be at most 4096"),
        (["--lora-rank", "1000000"], "--lora-rank must be at most 65536"),
        (["--lr", "1e31"], "--lr must be at most 10, not 1e[+]31"),
        (["--clip", "inf"], "--clip must be at most 1000000000.0, not inf"),
        (["--lora-alpha=-inf"], "--lora-alpha must be at least -1000000000.0, not -inf"),
        (["--teacher", "vit"], "unknown model 'vit'; known are"),
        (["--teacher-weights", "nothing.pth"], "nothing.pth: no such file"),
        (["--near", "5", "--far", "2"], "--far must be more than --near"),
        (["--stage", "pretrain", "--most-scale", "0.2"], "--most-scale must be at least --least"),
        (["--stage", "pretrain", "--least-scale", "0"], "--least-scale must be more than 0, not 0"),
        (["--stage", "pretrain", "--most-scale", "2"], "--most-scale must be at most 1, not 2.0"),
        (["--stage", "pretrain", "--crop", "30"], "--crop must be a multiple of 14, .*28, not 30"),
        (["--near", "1"], "--near is not read with --geometry depth"),
        (["--geometry", "shipped"], "--height must be a multiple of 16, .*not 42"),
        (["--geometry", "shipped", "--height", "32", "--width", "15"], "--width must be .*not 15"),
        (["--data", "nowhere"], "nowhere"),
        (["--split", "scenes.txt"], "--split is not read without --data: it lists the scenes of"),
        (["--name", "../x"], "--name is a folder's in runs/, .* not '../x'"),
        (["--name", ".."], "--name is a folder's in runs/"),
        (["--name", "x" * 300], "^runs/x*: File name too long"),
        (["--resume", ""], "checkpoint.pt: not a checkpoint"),
        (["--resume", "nowhere"], "nowhere/checkpoint.pt: not a checkpoint .*No such file"),
        (["--resume", "runs/x", "--steps", "3"], "no other flag goes with it"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, message):
    rest = [] if {"--resume", "--stage"} & set(arguments) else SMALL
    with pytest.raises(SystemExit, match=message) as error:
        train.main([*rest, *arguments])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["--target", "--targets", "--loss", "--upsampling"])
def test_unknown_words_are_errors(flag, capsys):
    with pytest.raises(SystemExit):
        train.main([flag, "all"])
    assert f"argument {flag}: invalid choice: 'all' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--learning-rate", "--step", "--blending"])
def test_unknown_flags_are_errors(flag, capsys):
    with pytest.raises(SystemExit):
        train.main([flag, "1"])
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


@pytest.mark.parametrize("part,key", [("settings", "clip"), ("model", "student_head.mlp.0.bias")])
def test_checkpoint_that_lacks_something_is_refused(part, key):
    train.main([*SMALL, "--name", "x"])
    checkpoint = torch.load("runs/x/checkpoint.pt")
    del checkpoint[part][key]
    torch.save(checkpoint, "runs/x/checkpoint.pt")
    lack = "x/checkpoint.pt: (not a checkpoint|not of this version, or damaged .its parameters)"
    with pytest.raises(SystemExit, match=lack):
        train.main(["--resume", "runs/x"])


def test_damage_inside_a_checkpoint_is_one_sentence():
    train.main([*SMALL, "--name", "x", "--steps", "1"])
    whole = torch.load("runs/x/checkpoint.pt")
    name = next(iter(whole["model"]))
    for part, key, value in (
        ("model", name, torch.zeros(3, 1)), ("model", name, whole["model"][name] * torch.nan),
        ("optimizer", "state", {0: "x"}), ("optimizer", "param_groups", []),
    ):  # fmt: skip
        torch.save(whole | {part: whole[part] | {key: value}}, "runs/x/checkpoint.pt")
        with pytest.raises(SystemExit, match="^runs/x/checkpoint.pt: not of this version, or dam"):
            train.main(["--resume", "runs/x"])


@pytest.mark.parametrize("precision, near, lr", [
    ("float32", 1e-5, "1e-3"), ("bf16", 0.05, "1e-5"), ("fp16", 0.02, "1e-5"),
])  # fmt: skip
def test_accumulated_batches_are_one_large_batch(precision, near, lr):
    """Where no location is a hole, the mean of means is the mean; at the precision in question."""
    flags = f"--loss prototypes --targets own --lora-dropout 0 --lr {lr} --steps 4 --batch-size"
    small = [a for a in SMALL if a not in ("--loss", "both")]
    train.main([*small, *flags.split(), "2", "--name", "large"])
    more = "1", "--accumulate", "2", "--precision", precision, "--name", "parts"
    train.main([*small, *flags.split(), *more])
    large, parts = (torch.load(f"runs/{name}/checkpoint.pt") for name in ("large", "parts"))
    assert large["samples"] == parts["samples"] == 8
    for a, b in zip(metrics("large"), metrics("parts")):
        assert a["loss"] == pytest.approx(b["loss"], rel=near)
    if precision == "float32":
        for name, weight in large["model"].items():
            torch.testing.assert_close(weight, parts["model"][name], rtol=0, atol=1e-5, msg=name)
    assert (large["scaler"] == {}) and (parts["scaler"] != {}) == (precision == "fp16")


def test_compiled_networks_train_alike():
    flags = "--lora-dropout 0 --steps 2 --name".split()
    train.main([*SMALL, *flags, "eager"])
    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    try:
        train.main([*SMALL, *flags, "compiled", "--compile"])
    except SystemExit as error:
        pytest.skip(str(error))
    assert frames["ok"] > 2  # a first one is the trial
    for eager, compiled in zip(metrics("eager"), metrics("compiled"), strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-4)
    eager, compiled = (f"runs/{run}/student.safetensors" for run in ("eager", "compiled"))
    assert load_file(eager).keys() == load_file(compiled).keys()
    with safe_open(compiled, "pt") as file:
        assert "--compile" in file.metadata()["command"].split()


def test_without_a_compiler_compile_is_one_sentence(tmp_path):
    env = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = begun(*TINY.split(), "--compile", steps=0, env=os.environ | env)
    assert ended_in(process).startswith("--compile: torch.compile does not work here (")
    assert not Path("runs").exists()


def test_float32_takes_no_tf32(monkeypatch):
    """And cameras are never multiplied in it: only convolutions and splatted features are."""
    asked, rasterize = [], M.rasterize
    note = lambda *a, **k: asked.append(k["precision"]) or rasterize(*a, **k)  # noqa: E731
    monkeypatch.setattr(M, "rasterize", note)
    for precision, allowed in (("auto", True), ("float32", False)):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not allowed)
        torch.backends.cuda.matmul.allow_tf32 = True  # as a user's environment may have it
        train.main([*SMALL, "--steps", "1", "--precision", precision])
        assert torch.backends.cudnn.allow_tf32 == allowed
        assert not torch.backends.cuda.matmul.allow_tf32
        assert set(asked) == {"tf32" if allowed else "ieee"}
        asked.clear()


def test_a_clock_that_jumps_back_disturbs_nothing(monkeypatch, capsys):
    clock = iter(range(10**9, 0, -10_000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    train.main([*SMALL, "--steps", "20"])
    assert "-" not in capsys.readouterr().out.split("steps/s")[1].split("left")[0]
    assert torch.load("runs/demo-1/checkpoint.pt")["seconds"] > 0


def test_older_checkpoints_are_kept_and_gone_on_from():
    train.main([*SMALL, "--name", "x", "--checkpoint-every", "1", "--keep", "3"])
    folder = Path("runs/x")
    kept = {path.name: torch.load(path)["step"] for path in folder.glob("checkpoint*.pt")}
    assert kept == {"checkpoint.pt": 6, "checkpoint_000005.pt": 5, "checkpoint_000004.pt": 4}
    whole, weights = metrics("x"), load_file(folder / "student.safetensors")
    train.main(["--resume", str(folder / "checkpoint_000004.pt")])
    assert metrics("x") == whole and torch.load(folder / "checkpoint.pt")["step"] == 6
    again = load_file(folder / "student.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


MODEL, MOMENT = "student_head.mlp.0.bias", "exp_avg"
OTHERS = [  # a place in a checkpoint, and what it cannot hold
    *(((key,), value) for key in ("step", "samples") for value in ("x", None, -1, 1.5)),
    (("seconds",), "x"), (("measured",), 1), (("rng",), torch.zeros(3)), (("schedule",), {}),
    (("frozen",), 1),
    (("cuda_rng",), None), (("optimizer", "state", 0, MOMENT), torch.zeros(2)),
    (("optimizer", "param_groups", 0, "lr"), "x"), (("written",), 5),
    (("written",), 0), (("settings", "more"), 1),
    (("model", MODEL), torch.zeros(32, dtype=torch.int8)), (("model", MODEL), "x"),
    *((("settings", key), value) for key in ("stage", "preset", "lr", "teacher")
      for value in ("x", None, -1, [])), (("settings", "lr"), math.nan),
]  # fmt: skip


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """The folder of a run that has a step left."""
    folder = tmp_path_factory.mktemp("unfinished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(M.ARCHITECTURES, "dinov2_vits14", dict(dim=24, depth=2, heads=2))
        train.main([*SMALL, "--name", "x", "--steps", "1"])
    saved = torch.load(folder / "runs/x/checkpoint.pt")
    saved["settings"]["steps"] = 2
    torch.save(saved, folder / "runs/x/checkpoint.pt")
    return folder / "runs/x"


@pytest.mark.parametrize("place, value", OTHERS)
def test_a_checkpoint_of_other_things_is_one_sentence(place, value, unfinished):
    shutil.copytree(unfinished, "x")
    saved = part = torch.load("x/checkpoint.pt")
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    torch.save(saved, "x/checkpoint.pt")
    with pytest.raises(SystemExit, match="^x/checkpoint.pt: not ") as error:
        train.main(["--resume", "x"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_dropout_differs_by_process_in_new_and_in_resumed_runs(unfinished, monkeypatch):
    shutil.copytree(unfinished, "x")
    new, resumed = [], []
    for rank in (0, 1, 2):
        monkeypatch.setattr(train, "rank_and_count", lambda: (rank, 3))  # noqa: B023
        train.Run.new(train.parse_settings(SMALL))
        new.append(float(torch.rand(1)))
        train.Run.load(Path("x"))
        resumed.append(float(torch.rand(1)))
    assert len(set(new)) == len(set(resumed)) == 3


def test_torchrun_goes_on_with_the_run_that_it_restarts_alone(unfinished, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    before = lambda *flags: train.folder_before_restart(train.parse_settings(flags))  # noqa: E731
    assert before() is None
    shutil.copytree(unfinished, "runs/demo-1")
    assert before() == before("--name", "demo-1") == Path("runs/demo-1")
    Path("runs/demo-2").mkdir()  # died before its first checkpoint
    Path("runs/demo-2/metrics.jsonl").write_text("")
    assert before() is before("--name", "demo-2") is None


def test_weights_to_start_from_may_go_once_they_are_read(monkeypatch):
    state = M.load_vit("dinov2_vits14", "random").state_dict()
    save_file(state, "start.safetensors", {"step": "7"})
    step = train.Run.train_step
    remove = lambda *a: Path("start.safetensors").unlink() or step(*a)  # noqa: E731
    monkeypatch.setattr(train.Run, "train_step", remove)
    train.main([*PRETRAIN, "--start", "start.safetensors", "--steps", "1"])
    with safe_open("runs/pretrain-1/teacher.safetensors", "pt") as file:
        assert json.loads(file.metadata()["start"]) == {"step": "7"}


@pytest.mark.parametrize("of", [
    lambda saved: saved["model"][MODEL], lambda saved: saved["rng"],
    lambda saved: saved["optimizer"]["state"][0][MOMENT],
])  # fmt: skip
def test_a_bit_that_flipped_is_noticed(of, unfinished):
    shutil.copytree(unfinished, "x")
    old = bytearray(Path("x/checkpoint.pt").read_bytes())
    old[old.index(of(torch.load("x/checkpoint.pt")).numpy().tobytes())] ^= 1
    Path("x/checkpoint.pt").write_bytes(old)
    with pytest.raises(SystemExit, match="^x/checkpoint.pt: not a checkpoint of train.py"):
        train.main(["--resume", "x"])


def test_weights_that_changed_since_are_noticed():
    for seed in (7, 8):
        torch.save(M.load_vit("dinov2_vits14", "random", seed).state_dict(), f"{seed}.pth")
    train.main([*SMALL, "--teacher-weights", "7.pth", "--steps", "1", "--name", "x"])
    Path("8.pth").rename("7.pth")
    with pytest.raises(SystemExit, match="x/checkpoint.pt: .*not those it began with"):
        train.main(["--resume", "runs/x"])


def test_weights_that_are_not_finite_are_named():
    state = M.load_vit("dinov2_vits14", "random").state_dict()
    state["norm.bias"][0] = torch.nan
    torch.save(state, "bad.pth")
    with pytest.raises(SystemExit, match="bad.pth: NaN or infinite numbers in norm.bias"):
        train.main([*SMALL, "--teacher-weights", "bad.pth"])


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_damaged_checkpoint_is_named(content):
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/checkpoint.pt").write_bytes(content)
    with pytest.raises(SystemExit, match="runs/x/checkpoint.pt: not a checkpoint of train.py"):
        train.main(["--resume", "runs/x"])
