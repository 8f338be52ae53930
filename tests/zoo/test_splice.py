"""Features between the tokens of a text: order, padding on either side, labels, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmoe.errors import BadInput
from zoo.hosts.chat import CHATML, VICUNA, encode
from zoo.hosts.splice import IGNORED, PADDING, clips, splice

IMAGE, SOUND = -200, -300


@pytest.fixture
def table() -> nn.Embedding:
    return nn.Embedding(20, 4)


def block(length: int, value: float) -> Tensor:
    return torch.full((length, 4), value)


def test_blocks_stand_where_their_placeholders_stood(table: nn.Embedding) -> None:
    ids = torch.tensor([[1, SOUND, 2, IMAGE, 3, SOUND]])
    features = {IMAGE: [[block(2, 7.0)]], SOUND: [[block(1, 8.0), block(3, 9.0)]]}
    found = splice(ids, table, features)
    assert found.modality.tolist() == [[0, 2, 0, 1, 1, 0, 2, 2, 2]]
    assert found.embeds[0, [1, 3, 4, 6, 7, 8], 0].tolist() == [8.0, 7.0, 7.0, 9.0, 9.0, 9.0]
    torch.testing.assert_close(found.embeds[0, [0, 2, 5]], table(torch.tensor([1, 2, 3])))
    assert found.mask.all() and found.labels is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_filled_up_on_the_side_of_their_text(table: nn.Embedding, side: str) -> None:
    texts = [[1, IMAGE, 2], [4]]
    rows = [row + [0] * (3 - len(row)) if side == "right" else [0] * (3 - len(row)) + row for row in texts]
    mask = torch.tensor([[1, 1, 1], [1, 0, 0] if side == "right" else [0, 0, 1]])
    ids = torch.tensor(rows)
    labels = torch.where(mask.bool() & (ids > 0), ids, IGNORED)
    found = splice(ids, table, {IMAGE: [[block(3, 7.0)], []]}, mask, labels)
    alone = splice(torch.tensor([[4]]), table, {IMAGE: [[]]}, labels=torch.tensor([[4]]))
    place = found.mask[1].nonzero().flatten().tolist()
    assert place == ([0] if side == "right" else [4])
    torch.testing.assert_close(found.embeds[1, place], alone.embeds[0])
    assert found.labels[1].tolist().count(IGNORED) == 4 and found.labels[1, place].tolist() == [4]
    assert (found.modality == PADDING).sum() == 4 and found.mask[0].all()


def test_gradients_reach_features_and_embeddings(table: nn.Embedding) -> None:
    feature = block(2, 1.0).requires_grad_()
    splice(torch.tensor([[1, IMAGE]]), table, {IMAGE: [[feature]]}).embeds.square().sum().backward()
    assert feature.grad.abs().sum() > 0 and table.weight.grad[1].abs().sum() > 0


@pytest.mark.parametrize(
    ("ids", "features", "told"),
    [
        ([1, IMAGE], {IMAGE: [[]]}, "sample 0 has 1 of its places and 0 blocks"),
        ([1], {IMAGE: [[block(2, 1.0)]]}, "sample 0 has 0 of its places and 1 blocks"),
        ([1, SOUND], {IMAGE: [[]]}, "sample 0 has placeholders -300 without features"),
    ],
)
def test_what_does_not_fit_is_told(table: nn.Embedding, ids: list[int], features: dict, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        splice(torch.tensor([ids]), table, features)


class Waits(TorchDispatchMode):
    """Counts what waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_a_batch_waits_for_no_placeholder(table: nn.Embedding) -> None:
    ids = torch.tensor([[1, IMAGE, 2, IMAGE], [IMAGE, IMAGE, 2, 3]])
    with Waits() as waits:
        splice(ids, table, {IMAGE: [[block(2, 1.0)] * 2] * 2})
    assert waits.count <= 1


def test_clips_of_padding_chunks_alone() -> None:
    assert clips(torch.zeros(2, 5, 4), torch.tensor([0, 0])) == []


class Letters:
    """One token per letter."""

    bos_token_id = None

    def __call__(self, text: str, **options: bool) -> dict[str, list]:
        return {"input_ids": [ord(sign) for sign in text], "offset_mapping": [(i, i + 1) for i in range(len(text))]}


@pytest.mark.parametrize("template", [VICUNA, CHATML])
def test_a_loss_counts_replies_alone(template) -> None:
    ids, labels = encode(Letters(), template.parts(["<image>Hi", "A fox.", "Sure?", "Yes."]), {"<image>": IMAGE})
    counted = "".join(chr(label) for label in labels if label != IGNORED)
    assert counted == template.reply.format("A fox.") + template.reply.format("Yes.")
    assert ids.count(IMAGE) == 1 and labels[ids.index(IMAGE)] == IGNORED


@pytest.mark.parametrize(("turns", "reply"), [([], False), (["a", "b"], True), (["a"], False)])
def test_turns_that_are_no_conversation(turns: list[str], reply: bool) -> None:
    with pytest.raises(BadInput, match=f"there are {len(turns)} turns"):
        VICUNA.parts(turns, reply)
