"""The README's examples run as they stand, and what it points at is there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import zoo
from tests import processes

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```([\w ]*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [line for language, text in BLOCKS if not language for line in text.splitlines() if line.startswith("mmoe ")]
HEAVY = "open_clip:ViT-B-32"  # 300 million parameters; tests/zoo converts a small one the same way


def in_python(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("index", range(len(PYTHON)))
def test_python_examples_run(index, tmp_path):
    """Each by itself, with what it imports."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    done = in_python("-c", PYTHON[index], folder=tmp_path)
    assert done.returncode == 0, done.stderr


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_the_parallel_example_runs(launcher, tmp_path):
    (example,) = [text for language, text in BLOCKS if language == "python torchrun"]
    (tmp_path / "train.py").write_text(example)
    done = in_python("-m", *launcher, "train.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "parallel" / ".metadata").exists()


@pytest.mark.parametrize("command", [c for c in COMMANDS if HEAVY not in c])
def test_commands_run(command, tmp_path):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    done = processes.command(shlex.split(command)[1:], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_folder_of_pictures_trains(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(50):
        Image.new("RGB", (48, 40), (5 * number, 250 - 5 * number, 90)).save(tmp_path / "photos" / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text(f"colour number {number}")
    examples = [text for language, text in BLOCKS if language == "sh photos"]
    for command in "".join(examples).splitlines():
        done = processes.command(shlex.split(command, comments=True)[1:], tmp_path)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert (tmp_path / "runs" / "mine" / "model" / "model.safetensors").exists()


def test_the_table_is_the_cards():
    rows = [
        m
        for m in zoo.card("clip_moe_tiny").metrics
        if m["data"].startswith("emoji: 1,341 concepts trained on, twemoji")
    ]
    found = {m["model"]: f"{100 * m['T2I R@1']:.1f} ± {100 * m['T2I R@1 sd']:.1f}" for m in rows}
    experts = ", ".join(found.pop(f"mcl_{i}") for i in (1, 2, 3))
    assert set(found) == {"base", "clip_moe", "upcycled", "base_longer"}
    for stage, value in found.items():
        assert re.search(rf"^\| {stage} \| [^|]+ \| {value} \|$", README, re.MULTILINE), stage
    assert f"| mcl_1, mcl_2, mcl_3 | its three MCL experts, each alone | {experts} |" in README


def test_the_speeds_are_the_measured_ones():
    measured = json.loads((ROOT / "assets" / "figures" / "bench_layer.json").read_text())["summary"]
    for name, value in measured.items():
        assert f"| {name} | {value:.2f} |" in README


def test_examples_were_found():
    assert len(PYTHON) >= 3 and len(COMMANDS) >= 4


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make ([a-z]+)|`make ([a-z]+)`", README, re.MULTILINE)
    assert len(targets) >= 4
    for target in map("".join, targets):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_file_tree_names_every_package():
    for folder in ("mmoe", "zoo", "train", "demos", "tests", "assets"):
        assert re.search(rf"^{folder}/ ", README, re.MULTILINE)
        assert (ROOT / folder).is_dir()
