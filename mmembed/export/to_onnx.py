"""A text model as one ONNX graph: token ids and mask in, vectors or probabilities out, pooling and all inside.

The graph is run by ONNX Runtime before it is kept, on texts of other lengths than the one that it was traced with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mmembed.errors import MmembedError
from mmembed.export import MANIFEST, Target
from mmembed.export.folder import check_template, settings_of, write_json, write_processor
from mmembed.export.subject import Refused, Subject
from mmembed.export.template import template_of
from mmembed.export.to_sentence_transformers import no_instruction, refuse_lists
from mmembed.heads import log_odds
from mmembed.models.embedding_model import EmbeddingModel

FILE = "model.onnx"
TOLERANCE = 1e-4  # of float32 arithmetic in another order


class ToOnnx(Target):
    """Writes the folder."""

    name: ClassVar[str] = "onnx"

    def check(self, subject: Subject) -> None:
        from importlib.util import find_spec

        refuse_lists(subject, "the exported graph takes one input at a time")
        if subject.multimodal:
            raise Refused(
                f"backbone '{subject.model.family.config.model_type}': reads pictures, whose patches a graph of fixed "
                "inputs does not cut; export --to sentence-transformers or vllm, or train a text backbone"
            )
        if subject.model.pooling.multi_vector:
            raise Refused(
                "pooling 'multi_vector': gives a vector a token; keep the checkpoint, mmembed.Embedder loads it"
            )
        if subject.masked:
            raise Refused(
                "prompt.mask_instruction: this model leaves tokens of its prompt out of pooling, and whoever runs the "
                "graph has one mask for both; leave the instruction out, or train with mask_instruction: false"
            )
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise MmembedError(f"--to onnx: {', '.join(missing)} is not installed; pip install 'mmembed[onnx]'")

    def write(self, subject: Subject, folder: Path) -> None:
        template = template_of(subject.preprocessor, subject.instructions, no_instruction(subject))
        write_processor(folder, subject, template, special_tokens=False)
        subject.model.base.config.save_pretrained(folder)
        check_template(folder, subject)
        graph = _Graph(subject.model).eval()
        ids = torch.ones(2, 7, dtype=torch.long)
        axes = {0: torch.export.Dim("inputs"), 1: torch.export.Dim("tokens", min=2, max=1 << 20)}
        program = torch.onnx.export(
            graph,
            (ids, torch.ones_like(ids)),
            dynamo=True,
            input_names=["input_ids", "attention_mask"],
            output_names=["scores" if subject.reranks else "vectors"],
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
            verbose=False,
        )
        assert program is not None, "dynamo gives one"
        program.save(str(folder / FILE))
        difference = largest_difference(folder, subject, graph)
        if not difference <= TOLERANCE:
            raise MmembedError(
                f"--to onnx: ONNX Runtime differs by {difference:.2g} from the model, more than {TOLERANCE:g}; use "
                "another target"
            )
        write_json(folder / MANIFEST, settings_of(subject, self.name, difference=difference))


class _Graph(nn.Module):
    """(B, T) token ids and mask -> (B, E) vectors, or (B, 1) probabilities."""

    def __init__(self, model: EmbeddingModel) -> None:
        super().__init__()
        self.model, self.reranks = model, model.settings.head is not None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.model.base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True)
        vectors = self.model.head(output.last_hidden_state, attention_mask.bool())
        return torch.sigmoid(log_odds(vectors)).unsqueeze(-1) if self.reranks else vectors


@torch.inference_mode()
def largest_difference(folder: Path, subject: Subject, graph: nn.Module) -> float:
    """Of ONNX Runtime's numbers to the model's own, over the fixed inputs, two in a batch."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    items = [probe.item for probe in subject.spoken]
    worst = 0.0
    for start in range(0, len(items), 2):
        batch = subject.preprocessor(items[start : start + 2]).tensors
        ids, mask = batch["input_ids"], batch["attention_mask"]
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        worst = max(worst, float(np.abs(found - graph(ids, mask).numpy()).max()))
    return worst
