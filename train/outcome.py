"""What a stage leaves behind: a folder that `zoo.load` reads, and with LoRA the adapters as peft writes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from mmoe.errors import BadInput
from train import tune

if TYPE_CHECKING:
    from train.engine import StageRun

_AGAIN = "free space or mend what is said above, then the same command with --resume"


def is_finite(model: nn.Module) -> bool:
    """Whether the trained weights are numbers, of sharded ones the part of this process."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = (parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in trained)
    return all(bool(values.isfinite().all()) for values in own)


def write_model(run: StageRun, folder: Path) -> None:
    """Writes the model of a stage as it is now; every process has to call it.

    Args:
        run: the stage.
        folder: of the model.

    Raises:
        BadInput: the disk is full, or the folder cannot be written to; the checkpoints and an older model stay.
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
        try:
            _save(model, run, folder)
        except (OSError, SafetensorError) as error:  # peft lets what its files meet through
            wrong = getattr(error, "strerror", None) or str(error)
            raise BadInput(f"cannot write '{folder}'", wrong, _AGAIN) from error
        except BadInput as error:
            raise BadInput(error.asked, error.wrong, _AGAIN) from error
    run.accelerator.wait_for_everyone()


def _save(model: Any, run: StageRun, folder: Path) -> None:
    stage = run.stage
    if stage.tune.method == "lora":
        tune.save_adapters(model, folder, str(stage.start or stage.model.name), merge=stage.tune.merge)
    else:
        told = {"verb": "train", "source": stage.model.name, "stage": stage.name, "data": stage.data.name}
        model.save(folder, made_by={**told, "steps": run.state.step, "seed": stage.run.seed})
