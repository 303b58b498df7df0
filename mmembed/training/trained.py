"""What a run trains, as one module: the embedding model and the parameters of its objective; and its files.

A folder is a self-describing embedder (`mmembed.models.checkpoint`) with the objective's tensors beside it. It is the
same whether the weights are whole or divided: divided ones are gathered before, and handed out again after.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmembed.embeddings import Embeddings
from mmembed.models.checkpoint import load_checkpoint, save_checkpoint
from mmembed.models.continuing import check_same_settings, restore_weights
from mmembed.models.embedding_model import EmbeddingModel
from mmembed.objectives import Objective
from mmembed.preprocess import ModelInputs, Preprocessor
from mmembed.staging import staging

OBJECTIVE = "objective.safetensors"


class Trained(nn.Module):
    """The embedding model and the objective's parameters as one module: one optimizer, one clipping, one zero_grad."""

    def __init__(self, model: EmbeddingModel, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        model.give_layers(objective.layers)
        if objective.routes:
            model.give_routing("objective 'router_balance'")

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of the layers that FSDP gathers one at a time."""
        return sorted(self.model.backbone._no_split_modules or ())

    def forward(self, inputs: ModelInputs) -> Embeddings:
        return self.model(inputs)

    def towers(self) -> dict[str, str]:
        """Parameter name -> tower."""
        towers = {f"model.{name}": tower for name, tower in self.model.parameter_towers().items()}
        return towers | {f"objective.{name}": "objective" for name, _ in self.objective.named_parameters()}

    def trained_towers(self) -> set[str]:
        """Towers with a parameter that is trained."""
        towers = self.towers()
        return {towers[name] for name, parameter in self.named_parameters() if parameter.requires_grad}

    def write(self, folder: Path, preprocessor: Preprocessor, run_hash: str, state: Mapping[str, Tensor]) -> None:
        """Writes a folder. Raises CheckpointError; what lay there stays.

        Args:
            state: whole weights, under the names of this module.
        """
        from safetensors.torch import save_file

        learned = {name: value.detach().cpu().contiguous() for name, value in _below(state, "objective.").items()}
        with staging(folder, "objective") as staged:  # moved when the weights are there
            if learned:  # buffers too: what an objective remembers
                save_file(learned, staged)
            save_checkpoint(folder, self.model, preprocessor, run_hash, _below(state, "model."))
            if learned:
                os.replace(staged, folder / OBJECTIVE)
            else:
                (folder / OBJECTIVE).unlink(missing_ok=True)  # of an earlier run

    def restore(self, folder: Path) -> None:
        """Loads a folder into whole weights. Raises CheckpointError where it is of another model, or broken."""
        restore_weights(folder, self.model)
        self._restore_objective(folder)

    def distribute(self, folder: Path, is_main_process: bool) -> None:
        """Loads a folder into divided weights: the main process reads it whole, the others get their parts.

        Raises:
            CheckpointError: as `restore`.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        check_same_settings(folder, self.model)
        state: dict[str, Any] = {}
        if is_main_process:
            saved, _ = load_checkpoint(folder, trust_remote_code=self.model.settings.trust_remote_code)
            state = {f"model.{name}": value for name, value in saved.state_dict().items()}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(self, state, options=options)
        self._restore_objective(folder)

    def _restore_objective(self, folder: Path) -> None:
        from safetensors.torch import load_file

        if self.objective.state_dict():
            self.objective.load_state_dict(load_file(folder / OBJECTIVE))


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
