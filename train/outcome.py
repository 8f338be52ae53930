"""What a stage leaves behind: a folder that `zoo.load` reads, and with LoRA the adapters as peft writes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from train import tune

if TYPE_CHECKING:
    from train.engine import StageRun


def write_model(run: StageRun, folder: Path) -> None:
    """Writes the model of a stage as it is now; every process has to call it.

    Args:
        run: the stage.
        folder: of the model.
    """
    model: Any = run.trained
    if run.sharded:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole = get_model_state_dict(model, options=options)
    if run.accelerator.is_main_process:
        if run.sharded:
            model = type(run.model)(run.model.config)
            model.card, model.preprocessing = run.model.card, run.model.preprocessing
            model.load_state_dict(whole)
        if run.stage.tune.method == "lora":
            base = run.stage.start or run.stage.model.name
            tune.save_adapters(model, folder, str(base), merge=run.stage.tune.merge)
        else:
            stage = run.stage
            told = {"verb": "train", "source": stage.model.name, "stage": stage.name, "data": stage.data.name}
            model.save(folder, made_by={**told, "steps": run.state.step, "seed": stage.run.seed})
    run.accelerator.wait_for_everyone()
