"""Diversified multiplet upcycling on emoji: a dense CLIP from scratch, experts from clusters, assembly, routers.

    python -m train.dmu --out runs/dmu              the whole recipe; the same command goes on where it was stopped
    python -m train.dmu --out runs/dmu --controls   and the controls with the same number of steps

Paper: arXiv 2409.19291, section 3. Stages: (1) the dense base; (2) multistage contrastive learning: cluster all
pictures and names with the newest model, then train only the feed-forward layers of the base with batches from one
cluster of all partitions so far; (3) assembly, expert 0 being the base; (4) routers alone with the balance loss.
Where we differ: everything is tiny and the base is trained by us.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

import zoo
from mmoe.atomic import atomic_path
from mmoe.errors import BadInput, MmoeError, nearest
from train.clusters import refine_cells
from train.contrastive import ContrastiveRun, StageConfig
from train.data.emoji import EmojiSet, load_emoji
from train.evaluate import evaluate, expert_use
from zoo.clip_moe.convert import upcycle
from zoo.clip_moe.model import ClipMoE
from zoo.state import read_json

RECIPE = Path(__file__).parent / "dmu_tiny.yaml"


class DmuConfig(BaseModel):
    """The recipe.

    Attributes:
        model: card whose config is trained; its `num_experts` sets the number of MCL stages plus one.
        init_scale: initial logarithm of the inverse temperature of the base.
        image_clusters, text_clusters: k-means clusters of each modality in each stage; cells multiply from stage to
            stage. The paper has 3 and 3 for a million pairs.
        base, mcl, router: stages.
        expert_dropout: after the experts' activation while the routers train.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    init_scale: float = 2.64
    image_clusters: int = Field(default=3, gt=0)
    text_clusters: int = Field(default=3, gt=0)
    base: StageConfig
    mcl: StageConfig
    router: StageConfig
    expert_dropout: float = Field(default=0.1, ge=0, lt=1)


def read_recipe(path: Path) -> DmuConfig:
    """The recipe in a YAML file; all mistakes are reported at once with the nearest right key.

    Raises:
        BadInput: no such file, or the recipe has mistakes.
    """
    if not path.is_file():
        raise BadInput(
            f"no recipe '{path}'", f"looked in {path.absolute().parent}", "python -m train.dmu   (the bundled recipe)"
        )
    try:
        return DmuConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot use the recipe '{path}'", _mistakes(error), f"compare with {RECIPE.name}") from error


def _mistakes(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    lines = []
    for mistake in error.errors():
        if not mistake["loc"]:
            return "it holds no mapping from options to values"
        place = ".".join(map(str, mistake["loc"]))
        known = StageConfig.model_fields if len(mistake["loc"]) > 1 else DmuConfig.model_fields
        near = nearest(str(mistake["loc"][-1]), known) if mistake["type"] == "extra_forbidden" else []
        lines.append(f"{place}: {mistake['msg']}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return "\n".join(lines)


class DmuRun:
    """Runs the stages in a folder; a stage that is done there is read, not run again.

    Args:
        config: the recipe.
        out: folder of the run.
        seed: of everything random.
        progress: shows bars.
    """

    def __init__(self, config: DmuConfig, out: Path, seed: int = 0, progress: bool = True) -> None:
        self.config, self.out, self.seed, self.progress = config, out, seed, progress
        self.emoji: EmojiSet = load_emoji()
        self.card = zoo.card(config.model)
        if not self.card.moe:
            raise BadInput(
                f"grow experts for {config.model!r}", "it is a dense model", "model: clip_moe_tiny in the recipe"
            )
        self._check_resolved()

    def _check_resolved(self) -> None:
        """Writes what is run into the folder, or makes sure that it is the same run."""
        resolved = {"seed": self.seed, **self.config.model_dump(mode="json")}
        path = self.out / "recipe.json"
        if path.exists() and read_json(path, f"rm '{path}'") != resolved:
            raise BadInput(
                f"go on with the run in '{self.out}'",
                "it was started with another recipe or seed",
                "--out OTHER_FOLDER",
            )
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(resolved, indent=2))

    def stage(self, name: str, make: Callable[[], ClipMoE]) -> ClipMoE:
        """The model of a stage: from its folder when it is finished, else made now and saved."""
        folder = self.out / name
        if not (folder / "config.json").exists():
            make().save(folder)
            (self.out / f"{name}.pt").unlink(missing_ok=True)
        model = zoo.load(folder, device="cpu")
        assert isinstance(model, ClipMoE)
        return model

    def train(self, model: ClipMoE, config: StageConfig, name: str, cells: Tensor | None = None) -> ClipMoE:
        """Runs one stage of training on a model."""
        run = ContrastiveRun(model, self.emoji, config, seed=self.seed, name=name, folder=self.out, cells=cells)
        run.run(self.progress)
        return model

    def base(self) -> ClipMoE:
        """The dense CLIP, trained from scratch on all weights."""

        def make() -> ClipMoE:
            torch.manual_seed(self.seed)
            options = {"num_experts": 0, "init_logit_scale": self.config.init_scale}
            model = zoo.load(self.config.model, weights=False, device="cpu", **options)
            assert isinstance(model, ClipMoE)
            return self.train(model, self.config.base, "base")

        return self.stage("base", make)

    def experts(self) -> list[ClipMoE]:
        """The base and one model per MCL stage, whose feed-forward layers become the experts."""
        models = [self.base()]
        cells = [torch.zeros(len(self.emoji.training_styles), len(self.emoji), dtype=torch.long)]
        clusters = self.config.image_clusters, self.config.text_clusters

        def make() -> ClipMoE:
            for model in models[len(cells) - 1 :]:  # clusters that finished stages have not needed again
                cells.append(refine_cells(cells[-1], model, self.emoji, clusters, self.seed))
            return self.train(copy.deepcopy(models[0]), self.config.mcl, f"mcl_{len(models)}", cells[-1])

        for number in range(1, int(self.card.moe["experts"])):
            models.append(self.stage(f"mcl_{number}", make))
        return models

    def clip_moe(self) -> ClipMoE:
        """The assembled mixture with trained routers."""

        def make() -> ClipMoE:
            sources = [model.state_dict() for model in self.experts()]
            return self.train(self.upcycled(sources), self.config.router, "clip_moe")

        return self.stage("clip_moe", make)

    def upcycled(self, sources: list[dict[str, Tensor]] | None = None) -> ClipMoE:
        """The untrained mixture of the given sources, or of copies of the base."""
        options = self.card.config
        torch.manual_seed(self.seed)
        return upcycle(
            self.base(),
            options["num_experts"],
            top_k=options["top_k"],
            moe_layers=options["moe_layers"],
            sources=sources,
            expert_dropout=self.config.expert_dropout,
        )

    @property
    def added_steps(self) -> int:
        """Steps that the mixture had beyond the base, over all stages."""
        return self.config.mcl.steps * (int(self.card.moe["experts"]) - 1) + self.config.router.steps

    def dense_control(self) -> ClipMoE:
        """The base trained on as it began, all weights, for as many steps as the mixture had."""
        config = self.config.base.model_copy(update={"steps": self.added_steps})
        return self.stage("base_longer", lambda: self.train(copy.deepcopy(self.base()), config, "base_longer"))

    def plain_control(self) -> ClipMoE:
        """Plain upcycling: copies of the base as experts, trained with their routers for as many steps.

        The settings are those of the MCL stages, with ordinary batches in place of clusters.
        """
        config = self.config.mcl.model_copy(update={"steps": self.added_steps})
        return self.stage("upcycled", lambda: self.train(self.upcycled(), config, "upcycled"))

    def seconds(self) -> dict[str, float]:
        """Time that each stage trained, over all its interruptions."""
        logs = {path.name.removesuffix(".log.json"): path for path in sorted(self.out.glob("*.log.json"))}
        return {name: read_json(path, f"rm '{path}'")["seconds"] for name, path in logs.items()}

    def results(self, controls: bool) -> dict[str, Any]:
        """Measures every model of the run."""
        models = {"base": self.base(), "clip_moe": self.clip_moe()}
        if controls:
            models |= {f"expert_{i}": model for i, model in enumerate(self.experts()) if i}
            models |= {"base_longer": self.dense_control(), "upcycled": self.plain_control()}
        rows = {name: evaluate(model, self.emoji) for name, model in models.items()}
        results = {
            "seed": self.seed,
            "added_steps": self.added_steps,
            "seconds": self.seconds(),
            "retrieval": rows,
            "experts": expert_use(models["clip_moe"], self.emoji),
        }
        with atomic_path(self.out / "results.json") as temporary:
            temporary.write_text(json.dumps(results, indent=2))
        return results


def print_results(results: dict[str, Any]) -> None:
    """A table of recalls on a terminal or in a log."""
    for name, row in results["retrieval"].items():
        shown = [
            f"{split} {values['text_to_image']['R@1']:.3f}/{values['text_to_image']['R@10']:.3f}"
            for split, values in row.items()
        ]
        print(f"{name:12} text to image R@1/R@10: " + "  ".join(shown))


def main(
    recipe: Annotated[Path, typer.Argument(help="YAML of the recipe.")] = RECIPE,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/dmu"),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    controls: Annotated[bool, typer.Option(help="Also train the controls with the same number of steps.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves them as they are.")] = 0,
) -> None:
    """Trains the tiny CLIP-MoE by diversified multiplet upcycling; the same command goes on after an interruption."""
    if threads:
        torch.set_num_threads(threads)
    try:
        print_results(DmuRun(read_recipe(recipe), out, seed).results(controls))
    except MmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print(f"stopped; the same command with --out {out} goes on", file=sys.stderr)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    typer.run(main)
