"""Files that lie or would run code: each ends in one sentence, and nothing of it runs."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import train
from model import load_vit
from reconstruct import load_reconstructor


class Payload:
    """What a pickle of it does when it is loaded: it makes a file."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def bare_pickle(path):
    path.write_bytes(pickle.dumps(Payload()))


def in_zip(path):
    torch.save({"state_dict": {"cls_token": torch.zeros(1)}, "hook": Payload()}, path)


def old_format(path):
    torch.save([Payload()], path, _use_new_zipfile_serialization=False)


def array(path):  # .npy, and by that name in .npz
    with open(path, "wb") as file:
        np.save(file, np.array([Payload()]))


def archive(path):
    with open(path, "wb") as file:
        np.savez(file, name=np.array([Payload()]))


def train_with(*flags):
    return lambda: train.main([*flags, *"--height 64 --width 64 --steps 1 --workers 0".split()])


def resume():
    Path("metrics.jsonl").write_text("")
    train.main(["--resume", "."])


def chunk():
    Path("index.json").write_text('{"scene": "000000.torch"}')
    data.open_scenes(".")[0].frame(0, 16, 16)


def pairs():
    if not Path("test.npz").exists():
        np.savez("test.npz", name=np.array([[0, 0, 1, 2]]))
    data.scannet_pairs(Path("."))


def download():  # of what someone put in the weights' place
    copy = lambda url, file, *_, **__: shutil.copy("dinov2_vits14_pretrain.pth", file)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "get_dir", lambda: ".")
        patch.setattr(torch.hub, "download_url_to_file", copy)
        try:
            load_vit("dinov2_vits14")
        finally:
            assert not Path("checkpoints/dinov2_vits14_pretrain.pth").exists()


def depth_map():
    data.open_picture(Path("depth.npy"), "a depth map", "transforms.json")


WEIGHTS = "--teacher", "vit_tiny14", "--teacher-weights"
PLACES = {  # a file, and what reads it
    "teacher": ("a.pth", train_with(*WEIGHTS, "a.pth")),
    "teacher by another name": ("a.safetensors", train_with(*WEIGHTS, "a.safetensors")),
    "geometry": ("a.ckpt", train_with(*WEIGHTS, "random", "--geometry", "a.ckpt")),
    "reconstructor": ("a.ckpt", train_with("--stage", "reconstruct", "--start", "a.ckpt")),
    "pretrained": ("a.pth", train_with("--stage", "pretrain", "--start", "a.pth")),
    "checkpoint": ("checkpoint.pt", resume),
    "evaluate": ("a.pth", lambda: evaluate.main("--task correspondence --weights a.pth".split())),
    "chunk": ("000000.torch", chunk),
    "pairs": ("test.npz", pairs),
    "intrinsics": ("intrinsics.npz", pairs),
    "download": ("dinov2_vits14_pretrain.pth", download),
    "depth": ("depth.npy", depth_map),
}  # fmt: skip


@pytest.mark.parametrize("write", [bare_pickle, in_zip, old_format, array, archive])
@pytest.mark.parametrize("place", PLACES)
def test_no_file_runs_code(place, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, read = PLACES[place]
    write(Path(path))
    with pytest.raises((SystemExit, ValueError)) as error:
        read()
    said = str(error.value)
    assert path in said and "\n" not in said and "\33" not in said and "weights_only" not in said
    assert not Path("it-ran").exists()
    pickle.loads(pickle.dumps(Payload()))  # it would have
    assert Path("it-ran").exists()


def bomb(path, write):
    """The archive that `write` makes, packed anew: zeros take a thousandth of their size."""
    write("loose")
    with zipfile.ZipFile("loose") as loose, zipfile.ZipFile(path, "w") as file:
        for name in loose.namelist():
            file.writestr(name, loose.read(name), zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize("place", [
    "teacher", "geometry", "checkpoint", "chunk", "pairs", "intrinsics",
])  # fmt: skip
def test_no_archive_grows_when_it_is_read(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, read = PLACES[place]
    zeros = torch.zeros(2**24)
    write = lambda p: torch.save({"cls_token": zeros}, p)  # noqa: E731
    if path.endswith(".npz"):
        write = lambda p: np.savez(open(p, "wb"), name=zeros.numpy())  # noqa: E731
    bomb(path, write)
    with pytest.raises((SystemExit, ValueError), match="unpacks to [0-9]* times its size"):
        read()


@pytest.mark.parametrize("load", [lambda p: load_vit("vit_tiny14", p), load_reconstructor])
@pytest.mark.parametrize("length, entry", [
    (2**60, None), (99_000_000, None), (None, ([10**12], [0, 4 * 10**12])),
    (None, ([2**62, 4], [0, 16])), (None, ([4], [0, 17])), (None, ([5], [0, 16])),
])  # fmt: skip
def test_headers_of_safetensors_are_not_believed(load, length, entry, tmp_path):
    shape, offsets = entry or ([4], [0, 16])
    head = {"cls_token": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
    head = json.dumps(head).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length or len(head)) + head + bytes(16))
    with pytest.raises(ValueError, match="a.safetensors: not a state dict that can be") as error:
        load(path)
    assert "\n" not in str(error.value)
