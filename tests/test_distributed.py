"""train.py under torchrun, two processes on a CPU: as one with twice the batch, and killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import evaluate
import train
from test_train import capture, youngest_child

SCRIPT = str(Path(train.__file__))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
STAGES = {
    "distill": "--teacher vit_tiny14 --loss both --centring 0.9 --prototypes 32 --head-dim 32 "
               "--bottleneck-dim 16 --height 56 --width 70 --lr 1e-3",
    "reconstruct": "--stage reconstruct --coarse 1 --height 48 --width 64",
    "pretrain": "--stage pretrain --height 96 --width 96 --crop 56 --photos 4",
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # exact on a CPU
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(launcher, *options, script=SCRIPT):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*launcher, script, *options], **pipes, start_new_session=True)


def finished(process):  # -> what it printed
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


def metrics(name):
    return [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().split("\n")
            if line]  # fmt: skip


def wait_for_steps(process, name, steps):
    path = Path("runs", name, "metrics.jsonl")
    for _ in range(8000):
        if path.exists() and path.read_text().count("\n") >= steps:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError(f"{path} never had {steps} steps")


def own_script(name, lines):
    """A script of lines before train.py's or evaluate.py's."""
    root = str(Path(SCRIPT).parent)
    Path("own.py").write_text(f"""import os, sys
sys.path.insert(0, {root!r})
import data, train
{lines}
__import__({name!r}).main()
""")
    return "own.py"


WRITERS = """
def replace_file(path, write, real=train.replace_file):
    print(os.environ["RANK"], path.name, file=open("writers", "a"))
    real(path, write)
train.replace_file = replace_file
"""


@pytest.mark.parametrize("stage", list(STAGES))
def test_two_processes_train_as_one_with_twice_the_batch(stage):
    options = f"{STAGES[stage]} --steps 3 --preview-every 2".split()
    script = own_script("train", WRITERS)
    out = finished(start(TORCHRUN, *options, *"--batch-size 1 --name two".split(), script=script))
    train.main([*options, "--batch-size", "2", "--name", "one"])
    assert out.count("step 3/3") == 1  # the first process alone prints, and writes
    assert {line[0] for line in Path("writers").read_text().splitlines()} == {"0"}
    one, two = metrics("one"), metrics("two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and "loss" in a
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key
    one, two = (torch.load(f"runs/{name}/checkpoint.pt", weights_only=True)
                for name in ("one", "two"))  # fmt: skip
    # Adam's mean of the gradients. The step itself is a sign where a gradient is rounding alone
    one_means, two_means = (
        torch.cat([state["exp_avg"].flatten() for state in run["optimizer"]["state"].values()])
        for run in (one, two)
    )
    assert (one_means - two_means).norm() < 1e-4 * one_means.norm()
    if stage == "distill":  # in the others some gradients are rounding alone
        for name, weight in one["model"].items():
            if "qkv.bias" in name:  # softmax cancels a key's: its gradient is rounding alone
                continue
            torch.testing.assert_close(weight, two["model"][name], rtol=0, atol=1e-5, msg=name)


def test_one_process_goes_on_with_the_samples_that_two_had_not_seen(monkeypatch):
    process = start(TORCHRUN, *STAGES["distill"].split(), "--steps", "40", "--name", "run")
    wait_for_steps(process, "run", 3)
    os.kill(youngest_child(process), signal.SIGTERM)  # both stop after the same step
    process.communicate(timeout=40)
    saved = torch.load("runs/run/checkpoint.pt", weights_only=True)
    step = saved["step"]
    assert 3 <= step < 40 and saved["samples"] == 2 * step and len(metrics("run")) == step
    saved["settings"]["steps"] = step + 3  # enough to see
    torch.save(saved, "runs/run/checkpoint.pt")
    seen, views = [], data.Views.__getitem__
    monkeypatch.setattr(data.Views, "__getitem__", lambda v, i: seen.append(i) or views(v, i))
    monkeypatch.setattr(train, "load_views", in_this_process(train.load_views))
    train.main(["--resume", "runs/run"])
    assert seen[1:] == [2 * step, 2 * step + 1, 2 * step + 2]  # the first is the preview's
    assert [m["step"] for m in metrics("run")] == list(range(1, step + 4))


def in_this_process(load_views):  # the loader's process would keep what it saw to itself
    def patched(settings, *rest):
        settings["workers"] = 0
        return load_views(settings, *rest)

    return patched


def test_torchrun_restarts_a_killed_process_from_the_checkpoint():
    options = f"{STAGES['distill']} --steps 7 --checkpoint-every 2 --name".split()
    finished(start(TORCHRUN, *options, "whole"))
    process = start([*TORCHRUN, "--max-restarts", "1"], *options, "killed")
    wait_for_steps(process, "killed", 3)
    os.kill(youngest_child(process), signal.SIGKILL)
    finished(process)
    assert metrics("killed") == metrics("whole")
    whole, killed = (load_file(f"runs/{name}/student.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.parametrize("ranks", ["01", "1"])
def test_what_all_or_one_of_the_processes_find_wrong_is_said_once(ranks):
    script = own_script("train", f"""
def sample(crops, i, real=data.Crops.sample):
    if crops.seed == 0 and i > 1 and os.environ["RANK"] in {ranks!r}:  # in the second step
        raise data.BadFile("photo.png: cannot be read")
    return real(crops, i)
data.Crops.sample = sample
""")
    options = f"{STAGES['pretrain']} --batch-size 1 --workers 0 --height 56 --width 56".split()
    process = start(TORCHRUN, *options, script=script)
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    said = [line for line in out.splitlines() if "photo.png" in line or "RuntimeError" in line]
    assert said == ["photo.png: cannot be read"], out


@pytest.mark.parametrize("task", [
    "correspondence --pairs 5", "depth --train-frames 5 --test-frames 3 --epochs 1",
])  # fmt: skip
def test_two_processes_evaluate_as_one(task):
    """The same table to the last bit: features are shared out, and every probe sees them all."""
    options = f"--task {task} --teacher vit_tiny14 --seeds 2 --image-size 56 56".split()
    out = finished(start(TORCHRUN, *options, script=own_script("evaluate", WRITERS)))
    written = [line.split()[1] for line in Path("writers").read_text().splitlines()]
    assert len(set(written)) == len(written)  # no file by two processes
    evaluate.main(options)
    two, one = (json.loads(Path(f"runs/evaluation/{options[1]}-{i}/results.json").read_text())
                for i in (1, 2))  # fmt: skip
    assert one["per_seed"] == two["per_seed"] and one["summary"] == two["summary"]
    assert "vit_tiny14" in one["summary"] and out.count("Written to") == 1
    sheets = [sorted(p.name for p in Path(f"runs/evaluation/{options[1]}-{i}").glob("*.png"))
              for i in (1, 2)]  # fmt: skip
    assert sheets[0] == sheets[1] != []


def test_memory_does_not_grow_with_the_steps(tmp_path):
    """In a process of its own, of a tiny transformer: its memory after 100 steps and after 500."""
    options = f"{STAGES['distill']} --height 28 --width 28 --workers 0 --steps 500 --name run"
    options += f" --data {capture(tmp_path / 'capture')} --preset demo --geometry depth"
    tiny = "import model; model.ARCHITECTURES['vit_tiny14'] = dict(dim=24, depth=2, heads=2)"
    options += " --teacher-weights random"
    process = start([sys.executable], *options.split(), script=own_script("train", tiny))
    held = []
    for steps in (100, 495):
        wait_for_steps(process, "run", steps)
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        held.append(pages * os.sysconf("SC_PAGE_SIZE"))
    finished(process)
    assert held[1] < held[0] + 10 * 2**20, held
