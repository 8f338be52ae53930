"""Weight files: where they come from, what is refused, and the account of what was loaded."""

from __future__ import annotations

import argparse
import os
import pickle
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmoe.errors import BadInput, CorruptFile, LoadMismatch, Offline
from zoo import weights
from zoo.state import LoadReport, collapse, load_state, read_state
from zoo.weights import find_local, locate, online, split_hub

SHA_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_bundled_file(root: Path) -> None:
    assert locate("bundled:examples/fox.png") == root / "assets" / "examples" / "fox.png"
    with pytest.raises(BadInput) as error:
        locate("bundled:weights/nothing.safetensors")
    assert str(error.value).startswith("no bundled file 'weights/nothing.safetensors'\n  looked in ")
    assert error.value.fix == "pip install --force-reinstall mmoe"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as error:
        locate(str(tmp_path / "a.pt"))
    assert str(error.value) == (
        f"no weights file '{tmp_path / 'a.pt'}'\n  looked in {tmp_path}\n  try: give a .safetensors or .pt file"
    )
    with pytest.raises(BadInput, match="it is a folder"):
        locate(str(tmp_path))


def test_the_checksum_is_verified(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_text("abc")
    assert locate(str(path), SHA_OF_ABC) == path
    with pytest.raises(CorruptFile) as error:
        locate(str(path), "0" * 64)
    assert str(error.value) == (
        f"the weights file '{path}' is not the one the card names\n"
        "  3 bytes with sha256 ba7816bf8f01cfea..., expected 0000000000000000...\n"
        f"  try: delete it and load again: rm '{path}'"
    )


# ---- reading ----


class Bomb:
    """A pickle that leaves a file behind when it is loaded as code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def state() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(600.0), "b.weight": torch.ones(2, 3)}


@pytest.mark.parametrize("wrapped", ["", "state_dict", "model"])
@pytest.mark.parametrize("old_format", [False, True])
def test_torch_checkpoints(tmp_path: Path, wrapped: str, old_format: bool) -> None:
    saved: Any = {f"module.{name}": value for name, value in state().items()}
    saved = {wrapped: saved, "epoch": 3} if wrapped else saved
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=not old_format)
    found = read_state(tmp_path / "a.pt")
    assert list(found) == ["a", "b.weight"] and found["a"].equal(state()["a"])


def damage(kind: str, tmp_path: Path) -> Path:
    """A file that cannot be used."""
    path = tmp_path / ("a.safetensors" if kind.startswith("st_") else "a.pt")
    content = b""
    if kind == "st_cut":
        save_file(state(), path)
        content = path.read_bytes()[:500]
    elif kind == "pt_cut":
        torch.save(state(), path)
        content = path.read_bytes()[:700]
    elif kind.endswith("garbage"):
        content = bytes(range(256)) * 8
    elif kind.endswith("text"):
        content = b"hello, this is no weights file\n" * 9
    elif kind.endswith("lfs"):
        content = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    elif kind.endswith("html"):
        content = b"\n<!DOCTYPE html><html><body>404</body></html>"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("st_cut", "500 bytes; Error while deserializing header: incomplete metadata, file not fully covered"),
        ("st_empty", "0 bytes; Error while deserializing header: header too small"),
        ("st_garbage", "2,048 bytes; Error while deserializing header: header too large"),
        ("st_lfs", "it is a pointer of Git LFS in place of the file"),
        ("st_html", "it is a web page"),
        ("pt_cut", "700 bytes; it is no torch file, or damaged"),
        ("pt_empty", "0 bytes; it is no torch file, or damaged"),
        ("pt_garbage", "2,048 bytes; it is no torch file, or damaged"),
        ("pt_text", "279 bytes; it is no torch file, or damaged"),
        ("pt_html", "it is a web page"),
    ],
)
def test_damaged_files(kind: str, wrong: str, tmp_path: Path) -> None:
    path = damage(kind, tmp_path)
    with pytest.raises(CorruptFile) as error:
        read_state(path)
    fix = "git lfs pull" if kind.endswith("lfs") else f"delete it and get it again: rm '{path}'"
    assert str(error.value) == f"cannot read the weights file '{path}'\n  {wrong}\n  try: {fix}"


@pytest.mark.parametrize("saved", [[1, 2], {"a": 1}, {"state_dict": {"a": "text"}}, torch.ones(2)])
def test_checkpoints_that_hold_something_else(saved: Any, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(CorruptFile, match=r"it holds no state dict \(names with tensors\)"):
        read_state(tmp_path / "a.pt")


@pytest.mark.parametrize("plain", [False, True])
def test_a_file_that_would_run_code_is_refused(plain: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path, mark = tmp_path / "bomb.pt", tmp_path / "it_ran"
    if plain:
        path.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save({"a": torch.ones(1), "b": Bomb(mark)}, path)
    with pytest.raises(CorruptFile) as error:
        read_state(path)
    assert not mark.exists()
    assert not recwarn.list
    if not plain:
        assert error.value.wrong == "it is damaged or wants to run code: it asks for posix.mkdir; nothing was run"
        assert error.value.fix.endswith("(only if you trust it)")


def test_what_to_do_with_a_checkpoint_that_holds_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that the error offers turns the file into one that can be read."""
    path = tmp_path / "run.pt"
    torch.save({"state_dict": state(), "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(CorruptFile, match=r"it asks for argparse\.Namespace") as error:
        read_state(path)
    monkeypatch.chdir(tmp_path)
    exec(error.value.fix.partition("   (")[0], {"torch": torch})
    assert read_state(tmp_path / "state.pt")["a"].equal(state()["a"])


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_torchscript_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's own files of CLIP are such archives."""
    path = tmp_path / "jit.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
    with pytest.raises(CorruptFile, match="it is a TorchScript archive, which runs code when it is read") as error:
        read_state(path)
    monkeypatch.chdir(tmp_path)
    exec(error.value.fix.partition("   (")[0], {"torch": torch})
    assert set(read_state(tmp_path / "state.pt")) == {"weight", "bias"}


# ---- network ----


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Addresses that `online` tried to reach; nobody answers."""
    addresses: list[Any] = []

    def refuse(address: Any, timeout: float | None = None) -> None:
        addresses.append(address)
        raise OSError("no route")

    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return addresses


def test_offline_is_decided_once(asked: list[Any]) -> None:
    assert [online(), online(), online()] == [False] * 3
    assert asked == [("huggingface.co", 443)]


@pytest.mark.parametrize(
    ("variable", "value", "address"),
    [
        ("HF_ENDPOINT", "http://mirror.example:8080/hf", ("mirror.example", 8080)),
        ("HF_ENDPOINT", "http://mirror.example", ("mirror.example", 80)),
        ("HTTPS_PROXY", "http://proxy.example:3128", ("proxy.example", 3128)),
        ("https_proxy", "proxy.example:3128", ("proxy.example", 3128)),
    ],
)
def test_whom_it_asks(
    variable: str, value: str, address: Any, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert not online()
    assert asked == [address]


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_the_hubs_own_switch_is_kept(value: str, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert not online()
    assert asked == []


def test_a_broken_proxy_means_offline(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:notaport")
    assert not online()


def test_a_name_server_that_never_answers_costs_less_than_3_seconds(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking up a name has no time limit of its own: 10 to 40 s on a machine whose network is gone."""

    def look_up(address: Any, timeout: float) -> None:
        time.sleep(4)
        raise OSError("no answer")

    monkeypatch.setattr(socket, "create_connection", look_up)
    begin = time.perf_counter()
    assert not online(0.3)
    assert time.perf_counter() - begin < 2.5
    assert online.__wrapped__.__defaults__[0] + 0.5 < 3


def test_online_when_somebody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.delenv("HTTPS_PROXY", raising=False)
        monkeypatch.delenv("https_proxy", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert online()


# ---- the hub ----


def put_into_cache(files: dict[str, bytes], revision: str = "main") -> Path:
    """A repository in the hub's cache, as `hf download org/repo` leaves it."""
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / "models--org--repo"
    folder = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(folder.name)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_hub_names() -> None:
    assert split_hub("org/repo") == ("org/repo", None, "")
    assert split_hub("org/repo@v1.0/sub/a.pt") == ("org/repo", "v1.0", "sub/a.pt")
    for wrong in ("repo", "", "org/", "/repo", "org/repo@"):
        with pytest.raises(BadInput) as error:
            split_hub(wrong)
        assert str(error.value) == f"cannot read 'hf-hub:{wrong}'\n  a hub name is org/repo\n  try: hf-hub:org/repo"


def test_a_cached_hub_file_needs_no_network() -> None:
    folder = put_into_cache({"a.pt": b"abc", "model.safetensors": b"x"})
    assert locate("hf-hub:org/repo/a.pt", SHA_OF_ABC) == folder / "a.pt"
    assert locate("hf-hub:org/repo@main/a.pt") == folder / "a.pt"
    assert locate("hf-hub:org/repo") == folder / "model.safetensors"


def test_a_hub_file_without_network() -> None:
    with pytest.raises(Offline) as error:
        locate("hf-hub:org/repo/a.pt")
    assert str(error.value) == (
        "cannot fetch 'a.pt' of 'org/repo'\n"
        "  there is no network and the file is not in the cache\n"
        "  try: hf download org/repo a.pt   "
        "(on a machine with network, then copy its ~/.cache/huggingface, or load the file by its path)"
    )


def test_a_hub_that_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def download(*args: object, **options: object) -> str:
        raise EntryNotFoundError("404 Client Error.\n\nEntry Not Found for url: https://...")

    monkeypatch.setattr(weights, "online", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(BadInput) as error:
        locate("hf-hub:org/repo/a.pt")
    assert str(error.value) == (
        "cannot fetch 'a.pt' of 'org/repo'\n  404 Client Error.\n  try: look at https://huggingface.co/org/repo"
    )


def test_what_is_on_this_machine(tmp_path: Path) -> None:
    assert find_local("hf-hub:org/repo/a.pt") is None
    folder = put_into_cache({"a.pt": b"abc"})
    assert find_local("hf-hub:org/repo/a.pt") == folder / "a.pt"
    assert find_local("bundled:nothing") is None
    assert find_local("bundled:examples/fox.png") is not None
    assert find_local("pypi:a==1.0/b") is None
    assert find_local(str(tmp_path / "a.pt")) is None


# ---- loading ----


def test_collapse() -> None:
    assert collapse([]) == ""
    assert collapse(["a"]) == "a"
    assert collapse(["b.0.w", "b.1.w", "b.2.w"]) == "b.{0..2}.w"
    assert collapse(["b.0.w", "b.2.w", "b.5.w"]) == "b.{0,2,5}.w"
    assert collapse(["b.3.w"]) == "b.3.w"
    assert collapse(["b.0.w", "b.0.b", "b.1.w", "b.1.b"]) == "b.{0..1}.w, b.{0..1}.b"
    assert collapse(["b.0.e.7.w", "b.1.e.7.w"]) == "b.{0..1}.e.7.w"
    assert collapse(map(chr, range(97, 97 + 8))) == "a, b, c, d, e, f, and 2 more"
    assert collapse("abc", most=2) == "a, b, and 1 more"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_everything_fits() -> None:
    model, other = Net(), Net()
    report = load_state(model, values(other), "a file")
    assert report == LoadReport(source="a file", matched=("a.weight", "a.bias", "b.weight", "b.bias"))
    assert report.coverage == 1 and str(report) == "100.0% of the model's tensors loaded from a file"
    assert model.a.weight.equal(other.a.weight)


def test_nothing_is_copied_when_something_does_not_fit() -> None:
    model = Net()
    before, wrong = values(model), values(Net())
    wrong["c.0.weight"], wrong["c.1.weight"] = torch.ones(1), torch.ones(1)
    wrong["b.weight"] = torch.ones(4, 4)
    del wrong["a.bias"]
    with pytest.raises(LoadMismatch) as error:
        load_state(model, wrong, "a file")
    assert str(error.value) == (
        "the weights do not fit Net\n"
        "  50.0% of the model's tensors loaded from a file\n"
        "  missing 1: a.bias\n"
        "  unexpected 2: c.{0..1}.weight\n"
        "  reshaped 1: b.weight (4, 4) for (1, 3)\n"
        "  try: the weights of this model, or zoo.load(..., allow_missing=['a.bias', ...]) for what may stay random"
    )
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_what_is_allowed_to_be_missing_stays_as_it_is() -> None:
    model = Net()
    before, partly = values(model), values(Net())
    del partly["b.bias"]
    partly |= {"b.weight": torch.ones(4, 4), "head.x": torch.ones(1)}
    with pytest.raises(LoadMismatch):
        load_state(model, partly, "a file", allow_missing=["b.*"])
    report = load_state(model, partly, "a file", allow_missing=["b.*", "head.*"])
    assert report.missing == ("b.bias",) and report.unexpected == ("head.x",)
    assert report.reshaped == ("b.weight (4, 4) for (1, 3)",)
    assert report.coverage == report.as_dict()["coverage"] == 0.5
    assert model.a.weight.equal(partly["a.weight"])
    assert model.b.weight.equal(before["b.weight"]) and model.b.bias.equal(before["b.bias"])


def test_values_take_the_models_type() -> None:
    model = Net()
    load_state(model, {name: value.half() for name, value in values(Net()).items()}, "a file")
    assert model.a.weight.dtype == torch.float32
