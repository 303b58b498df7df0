"""The adapter alone, as peft loads it onto its base: a few megabytes beside a backbone that is there already.

Its names are those of `AutoModel` of the base. peft leaves out a name that it does not find without an error, which is
how an adapter comes to have no effect; so the written file is read again, and every tensor of the trained adapter has
to be in it, and none to be zero throughout where training has changed it.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from mmembed.backbones.adapters import adapted
from mmembed.errors import MmembedError
from mmembed.export import MANIFEST, Target
from mmembed.export.folder import change_json, settings_of, write_json
from mmembed.export.subject import Refused, Subject
from mmembed.models.folder import ADAPTER, check_fit, read_tensors


class ToAdapter(Target):
    """Writes the folder."""

    name: ClassVar[str] = "adapter"
    merges: ClassVar[bool] = False

    def check(self, subject: Subject) -> None:
        model = subject.model
        if model.settings.adapter_type == "none":
            raise Refused(
                f"{subject.path}: has no adapter, its weights were trained whole; export --to merged, or to a runtime"
            )
        head = [name for name, _ in model.named_parameters() if not name.startswith("backbone.")]
        if head:
            raise Refused(
                f"'{head[0]}': was trained beside the adapter, and peft loads adapters alone; export --to merged, or "
                "to a runtime"
            )
        if subject.instructions:
            raise MmembedError(
                "--query-instruction, --document-instruction: an adapter has no prompts; leave them out, or "
                "export to a runtime"
            )

    def write(self, subject: Subject, folder: Path) -> None:
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        model = subject.model
        tensors = {name: one.detach().contiguous() for name, one in get_peft_model_state_dict(model.backbone).items()}
        save_file(tensors, folder / ADAPTER, {"format": "pt"})
        adapted(model.backbone).peft_config["default"].save_pretrained(str(folder))
        change_json(
            folder / "adapter_config.json",
            base_model_name_or_path=model.settings.name_or_path,
            revision=model.settings.revision,
            task_type="FEATURE_EXTRACTION",
            inference_mode=True,
        )
        found = read_tensors(folder / ADAPTER)
        check_fit(folder / ADAPTER, tensors, found)
        if not any(tensor.any() for name, tensor in found.items() if "lora_B" in name or "lora_" not in name):
            raise MmembedError(
                f"{subject.path}: its adapter is zero, it was never trained; export a trained checkpoint"
            )
        subject.preprocessor.processor.save_pretrained(folder)
        write_json(folder / MANIFEST, settings_of(subject, self.name))
