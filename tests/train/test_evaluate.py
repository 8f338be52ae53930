"""Tasks: metrics by hand on answers that are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from mmoe.errors import BadInput, Refused
from train.cli import _tables
from train.data.base import DataSet
from train.evaluate import check_metric, features, overlap, tasks
from train.recall import recall


class Listed(DataSet):
    """Samples of a list."""

    fields = ()
    task = "retrieval"

    def __init__(self, samples, **attributes):
        super().__init__()
        self.listed = samples
        vars(self).update(attributes)

    def __len__(self):
        return len(self.listed)

    def name(self, index):
        return str(index)

    def read(self, index):
        return self.listed[index]


class Says:
    """A model that answers from a list."""

    def __init__(self, *answers):
        self.answers, self.asked = iter(answers), []

    def predict(self, **question):
        self.asked.append(question)
        return next(self.answers)


class Rates:
    """A model that gives scores from a list."""

    def __init__(self, *scores):
        self.left = list(scores)

    def predict(self, images):
        scores, self.left = self.left[: len(images)], self.left[len(images) :]
        return SimpleNamespace(scores=scores)


class Colours:
    """Compares pictures of one colour with its name."""

    names = ("red", "green", "blue")

    def preprocess(self, images=None, texts=None):
        if images is not None:
            return {"image": torch.tensor([image.getpixel((0, 0)) for image in images]).float()}
        return {"text": torch.stack([torch.tensor([float(name in text) for name in self.names]) for text in texts])}

    def encode_image(self, image, normalize):
        return torch.nn.functional.normalize(image, dim=-1)

    encode_text = encode_image


def picture(red, green, blue):
    return Image.new("RGB", (4, 4), (red, green, blue))


def test_recall_counts_ties_as_misses():
    assert recall(torch.zeros(3, 3), ranks=(1, 3)) == {"R@1": 0.0, "R@3": 1.0}
    assert recall(torch.eye(3), ranks=(1,)) == {"R@1": 1.0}
    assert recall(torch.full((2, 2), float("nan")), ranks=(1,)) == {"R@1": 0.0}


def test_retrieval():
    samples = [
        {"image": picture(255, 0, 0), "text": "a red thing"},
        {"image": picture(0, 255, 0), "text": "a green thing"},
        {"image": picture(0, 200, 255), "text": "a blue thing"},
    ]
    found = tasks.build("retrieval").measure(Colours(), Listed(samples))
    assert found["T2I R@1"] == found["I2T R@1"] == found["R@1"] == 1.0
    samples[2]["image"] = picture(0, 255, 100)
    found = tasks.build("retrieval").measure(Colours(), Listed(samples))
    assert found["I2T R@1"] == pytest.approx(2 / 3, abs=1e-4) and found["T2I R@1"] == 1.0


class Captions(Listed):
    """Five captions for each of some pictures, under the name of the picture."""

    def __init__(self, colours):
        super().__init__(
            [{"image": picture(*rgb), "text": f"a {name} thing"} for name, rgb in colours for _ in range(5)]
        )

    def name(self, index):
        return str(index // 5)


def test_all_captions_of_a_picture_are_right():
    colours = [("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255))]
    found = tasks.build("retrieval").measure(Colours(), Captions(colours))
    assert found["T2I R@1"] == found["I2T R@1"] == found["R@1"] == 1.0
    colours[2] = ("blue", (0, 255, 10))  # it looks green
    found = tasks.build("retrieval").measure(Colours(), Captions(colours))
    assert found["I2T R@1"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["T2I R@1"] == 1.0, "of all pictures it is the bluest"
    assert found["I2T R@5"] == pytest.approx(2 / 3, abs=1e-4) and found["I2T R@10"] == 1.0


class Numbers(Listed):
    """Pictures and names of 100 numbers, a few of which cannot be read."""

    broken_ones = (7, 70)

    def __init__(self):
        super().__init__([{"image": number, "text": number} for number in range(100)])

    def read(self, index):
        if index in self.broken_ones:
            raise BadInput("read", "it is broken", "another")
        return super().read(index)


class Counts:
    """Knows every number, but takes 10 for 11."""

    def preprocess(self, images=None, texts=None):
        wanted = [10 if number == 11 else number for number in images] if images is not None else texts
        return {"batch": torch.eye(100)[wanted]}

    def encode_image(self, batch, normalize):
        assert len(batch) <= 64
        return batch

    encode_text = encode_image


def test_many_samples_are_compared_with_each_other_and_broken_ones_left_out():
    data = Numbers()
    data.most_broken = 2
    found = tasks.build("retrieval").measure(Counts(), data)
    assert found["T2I R@1"] == pytest.approx(96 / 98, abs=1e-4), "10 is found twice, 11 not at all"
    assert list(data.broken) == ["7", "70"]
    data.most_broken = 1
    with pytest.raises(BadInput, match="2 samples cannot be read"):
        tasks.build("retrieval").measure(Counts(), data)


def test_no_samples():
    for name in ("retrieval", "quality"):
        with pytest.raises(BadInput, match="no samples to evaluate on"):
            tasks.build(name).measure(Counts(), Listed([]))


def test_zero_shot_accuracy():
    samples = [{"image": picture(255, 0, 0), "label": 0}, {"image": picture(255, 0, 10), "label": 2}]
    found = tasks.build("zero_shot").measure(Colours(), Listed(samples, classes=["red", "green", "blue"]))
    assert found == {"top-1 accuracy": 0.5}
    two = tasks.build("zero_shot").measure(Colours(), Listed(samples[:1], classes=["red", "green"]))
    assert two == {"top-1 accuracy": 1.0}


def test_features_are_those_of_the_model():
    model = zoo.load("clip_moe_tiny", device="cpu")
    pictures = [picture(number, 0, 0) for number in (0, 100, 200)]
    expected = model.encode_image(model.preprocess(images=pictures)["image"], normalize=True)
    torch.testing.assert_close(features(model, images=pictures), expected)
    assert features(model, texts=["a", "b"]).norm(dim=1).allclose(torch.ones(2))
    with pytest.raises(Refused, match="compare pictures with texts by Says"):
        features(Says(), texts=["a"])


def test_quality():
    samples = [{"image": None, "score": score} for score in (1.0, 2.0, 3.0, 4.0)]
    found = tasks.build("quality").measure(Rates(10, 20, 40, 30), Listed(samples))
    assert (found["SRCC"], found["PLCC"]) == (0.8, 0.8) and found["PLCC logistic-4"] > 0.8
    assert set(found) == {"SRCC", "PLCC", "KRCC", "PLCC logistic-4"}, "there are no groups and no series"


def test_quality_of_groups_and_of_levels():
    samples = [
        {"image": None, "score": 1 - level / 4, "group": group, "photo": "a", "kind": f"{group}_1", "severity": level}
        for group in ("blur", "noise")
        for level in range(1, 4)
    ]
    samples.append({"image": None, "score": 1.0, "group": "pristine", "photo": "a", "kind": "pristine", "severity": 0})
    found = tasks.build("quality").measure(Rates(0.9, 0.5, 0.2, 0.2, 0.5, 0.9, 1.0), Listed(samples))
    assert (found["blur/SRCC"], found["noise/SRCC"], found["monotone"]) == (1.0, -1.0, 0.5)
    assert (found["blur/monotone"], found["noise/monotone"]) == (1.0, 0.0)
    assert (found["blur_1/SRCC"], found["noise_1/monotone"]) == (1.0, 0.0), "kinds are told as groups are"
    assert "pristine/SRCC" not in found, "all its scores are the same"
    others = [{**sample, "human": 1 - sample["score"], "metrics": sample["score"] ** 2} for sample in samples]
    again = tasks.build("quality").measure(Rates(0.9, 0.5, 0.2, 0.2, 0.5, 0.9, 1.0), Listed(others))
    assert again.pop("SRCC human") == -found["SRCC"] and again.pop("SRCC metrics") == found["SRCC"]
    assert again == found


@pytest.mark.parametrize(
    ("metrics", "fix"),
    [
        (["blur/SRCC", "SRCC human", "SRCC"], "run.best=SRCC"),
        (["SRCC human", "blur/SRCC"], "'run.best=SRCC human'"),
        (["pictures/choice", "pictures/exact match"], "run.best=pictures/choice"),
        (["WER", "CER"], "run.best=-WER"),
        (["dialogues/perplexity"], "run.best=-dialogues/perplexity"),
    ],
)
def test_a_metric_that_there_is_is_suggested(metrics, fix):
    task = SimpleNamespace(measure=lambda model, data: dict.fromkeys(metrics, 0.5))
    with pytest.raises(BadInput, match="keep the model with the best 'R@1'") as error:
        check_metric("R@1", task, None, Listed([{}]))
    assert error.value.fix == fix


def test_metrics_of_parts_are_shown_as_a_table():
    found = {"SRCC": 0.5, "blur/SRCC": 0.25, "blur/monotone": 1.0, "noise/SRCC": -0.5}
    assert "\n\n".join(_tables(found)).splitlines() == [
        "SRCC  0.5000",
        "",
        "       SRCC     monotone",
        "blur   0.2500   1.0000",
        "noise  -0.5000",
    ]
    assert list(_tables({"R@1": 1.0})) == ["R@1  1.0000"]


def test_masks_of_other_classes_are_not_compared():
    model = SimpleNamespace(card=None, config=SimpleNamespace(classes=("sea", "land")))
    task = tasks.build("segmentation")
    task.check(model, Listed([], classes=["sea", "land"]))
    task.check(model, Listed([]))
    with pytest.raises(BadInput, match="the model knows sea, land; the data has sea, ice"):
        task.check(model, Listed([], classes=["sea", "ice"]))


def test_models_that_ask_for_a_scene_are_told():
    class OfScenes:
        scenes = ("texture", "natural")

        def predict(self, images, scene):
            return SimpleNamespace(scores=[{"texture": 0.1, "natural": 0.2, "auto": 0.3}[one] for one in scene])

    samples = [
        {"image": None, "score": i, **scene} for i, scene in enumerate(({"scene": "texture"}, {"scene": "natural"}, {}))
    ]
    assert tasks.build("quality").measure(OfScenes(), Listed(samples))["SRCC"] == 1.0
    samples[2]["scene"] = "one that the model does not know"
    assert tasks.build("quality").measure(OfScenes(), Listed(samples))["SRCC"] == 1.0


def test_metrics_of_each_group():
    masks = {"land": np.array([[0, 1]]), "sea": np.array([[1, 1]])}
    samples = [{"image": None, "mask": mask, "group": group} for group, mask in masks.items()]
    found = tasks.build("segmentation").measure(Says(np.array([[0, 1]]), np.array([[0, 1]])), Listed(samples))
    assert found["land/accuracy"] == 1.0 and found["sea/accuracy"] == 0.5 and found["accuracy"] == 0.75
    assert found["sea/mIoU"] == 0.25


def test_groups_that_are_not_to_be_pooled():
    masks = {"hazy": [np.array([[0, 1]]), np.array([[0, 0]])], "clear": [np.array([[1, 1]])]}
    samples = [{"image": None, "mask": mask, "group": group} for group, some in masks.items() for mask in some]
    model, data = Says(*[np.array([[0, 1]])] * 3), Listed(samples, pooled=False)
    found = tasks.build("segmentation").measure(model, data)
    assert set(found) == {"hazy/mIoU", "hazy/accuracy", "clear/mIoU", "clear/accuracy"}
    assert found["hazy/mIoU"] == pytest.approx((2 / 3 + 1 / 2) / 2, abs=1e-4), "over the pixels of both"


def test_overlap_is_that_of_all_pixels():
    from sklearn.metrics import accuracy_score, jaccard_score

    given, predicted = (np.random.default_rng(seed).integers(0, 5, 2000) for seed in (0, 1))
    given[given == 3], predicted[predicted == 4] = 0, 1
    expected = jaccard_score(given, predicted, average="macro", zero_division=0), accuracy_score(given, predicted)
    assert tuple(overlap(predicted, given).values()) == pytest.approx(expected, abs=1e-4)


def test_segmentation_leaves_255_out():
    mask = np.array([[0, 0, 1], [1, 255, 255]])
    answer = np.array([[0, 1, 1], [1, 0, 1]])
    found = tasks.build("segmentation").measure(Says(answer), Listed([{"image": None, "mask": mask}]))
    assert found == {"mIoU": pytest.approx((1 / 2 + 2 / 3) / 2, abs=1e-4), "accuracy": 0.75}
    assert overlap(np.array([0, 0]), np.array([0, 0])) == {"mIoU": 1.0, "accuracy": 1.0}


@pytest.mark.parametrize(
    ("answer", "mask", "told"),
    [
        (np.zeros((3, 2)), np.zeros((2, 3)), "masks of different sizes"),
        (np.zeros((2, 2)), np.full((2, 2), 255), "every pixel is 255"),
    ],
)
def test_masks_that_cannot_be_compared(answer, mask, told):
    with pytest.raises(BadInput, match=told):
        tasks.build("segmentation").measure(Says(answer), Listed([{"image": None, "mask": mask}]))


def test_what_cannot_be_scored_is_told():
    samples = [{"image": None, "score": 1.0}, {"image": None, "score": 2.0}]
    with pytest.raises(BadInput, match="some are no numbers"):
        tasks.build("quality").measure(Rates(1.0, float("nan")), Listed(samples))
    samples = [{"image": picture(255, 0, 0), "label": 0}]
    with pytest.raises(BadInput, match="tell classes apart"):
        tasks.build("zero_shot").measure(Colours(), Listed(samples, classes=["red"]))


@pytest.mark.parametrize(
    ("said", "given", "errors"),
    [("हिन्दी", "हिन्दी", 0.0), ("caf\u00e9", "cafe\u0301", 0.0), ("don't", "don’t", 0.0), ("हिन्दी", "हन्दी", 1.0)],
)
def test_words_of_any_script(said, given, errors):
    found = tasks.build("transcription").measure(Says(said), Listed([{"audio": None, "text": given}]))
    assert found["WER"] == errors


@pytest.mark.parametrize(
    ("said", "given", "same"),
    [
        (" Red. ", "red", 1),
        ("5", "-5", 0),
        ("3 5", "3.5", 0),
        ("", "?", 0),
        ("\uff21\uff22", "ab", 1),
        ("a  b", "a b", 1),
    ],
)
def test_what_is_an_exact_match(said, given, same):
    found = tasks.build("exact_match").measure(Says(said), Listed([{"turns": ("What?", given)}]))
    assert found == {"exact match": same}


def test_transcription():
    pytest.importorskip("jiwer")
    samples = [{"audio": None, "text": "The cat sat."}, {"audio": None, "text": "It's here"}]
    found = tasks.build("transcription").measure(Says("the cat sits", "its here"), Listed(samples))
    assert found["WER"] == pytest.approx(1 / 5) and 0 < found["CER"] < 0.2


def test_exact_match_asks_every_question_with_what_was_said_before():
    turns = ("What?", "A fox.", "Colour?", "Red")
    model = Says("a fox", "blue")
    found = tasks.build("exact_match").measure(model, Listed([{"turns": turns}]))
    assert found == {"exact match": 0.5}
    assert [question["text"] for question in model.asked] == [list(turns[:1]), list(turns[:3])]


def test_every_task_says_what_it_measures():
    for name in tasks.names():
        assert tasks.get(name).__doc__ and tasks.get(name).fields, name
