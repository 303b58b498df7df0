"""What `mmembed plan` says of memory, against the peak of real trainings.

    python -m benchmarks.plan_memory --json

Each configuration trains the nano weights for three steps in a fresh process on the CPU, one thread. Measured is how
far the anonymous memory rises, from just before the first step to its peak (VmHWM, reset there), so the weights are
there already; estimated is what the plan says beside them: gradients, optimizer, graphs, scores. Pages of files (code
of kernels that run for the first time, mapped weights) are left out, and malloc gives large blocks back at once (one
arena, a fixed threshold): what is compared is what is held, not what an allocator keeps for later. In the table `ours`
is the estimate and `limit` the measurement, both in MB; a row meets its goal within 25 %.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._common import DATA, Row, parser, set_up, show

TOLERANCE = 0.25
CASES: dict[str, dict[str, Any]] = {
    "full_fp32": {"adapter": {"type": "none"}},
    "full_fp32_all_kept": {"adapter": {"type": "none"}, "training": {"grad_cache": False}},
    "full_fp32_recomputed": {"adapter": {"type": "none"}, "training": {"grad_cache": True}},
    "full_checkpointed": {"adapter": {"type": "none"}, "model": {"gradient_checkpointing": True}},
    "full_autocast": {"adapter": {"type": "none"}, "training": {"bf16": True}},
    "full_lion": {"adapter": {"type": "none"}, "training": {"optimizer": "lion"}},
    "lora": {"adapter": {"type": "lora", "r": 16, "dropout": 0.0}},
    "lora_pictures_vision_trained": {
        "adapter": {"type": "lora", "r": 16, "dropout": 0.0},
        "model": {"freeze": []},
        "data": {"train": [{"path": "openstax-figures", "format": "beir"}]},
    },
}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--queries", type=int, default=32, help="queries a batch (default 32)")
    options.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options.add_argument("--worker", metavar="CONFIG", help="used by the benchmark itself")
    arguments = options.parse_args()
    set_up(1)
    if arguments.worker:
        print(json.dumps(_train(json.loads(arguments.worker))))
        return
    show([_row(name, arguments.queries) for name in arguments.cases], arguments.json)


def _row(name: str, queries: int) -> Row:
    from mmembed.config import build_config
    from mmembed.plan import plan_run

    with tempfile.TemporaryDirectory() as folder:
        tree = _tree(name, queries, folder)
        stage = plan_run(build_config(tree), sample=3).stages[0]
        malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**16)}
        environment = {**os.environ, **malloc, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.plan_memory", "--worker", json.dumps(tree)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=DATA.parent, env=environment)
    measured = json.loads(done.stdout.strip().splitlines()[-1])["rise_mb"]
    estimated = (stage.total - stage.weights) / 2**20
    ratio = round(estimated / measured, 3)
    return Row(
        f"plan_{name}",
        "MB",
        round(estimated, 1),
        limit=round(measured, 1),
        ratio_to_limit=ratio,
        goal_to_limit=1.0,
        meets=abs(ratio - 1) <= TOLERANCE,
    )


def _tree(name: str, queries: int, folder: str) -> dict[str, Any]:
    """The config of a case: its own keys over what all share."""
    case = CASES[name]
    return {
        "model": {"name_or_path": "mmembed-nano", "dtype": "float32", **case.get("model", {})},
        "adapter": case["adapter"],
        "lengths": {"query_max_length": 64, "document_max_length": 256},
        "data": {
            "root": str(DATA),
            "train_group_size": 1,
            **case.get("data", {"train": [{"path": "squad-en", "format": "beir"}]}),
        },
        "training": {
            "output_dir": str(Path(folder, "out")),
            "per_device_train_batch_size": queries,
            "max_steps": 3,
            "token_budget": 4096,
            "save_strategy": "no",
            "disable_tqdm": True,
            **case.get("training", {}),
        },
    }


def _train(tree: dict[str, Any]) -> dict[str, float]:
    from mmembed.config import build_config
    from mmembed.data.dataset import RecordDataset, media_store
    from mmembed.models.embedding_model import build_embedding_model
    from mmembed.objectives import build_objective
    from mmembed.training.arguments import training_arguments
    from mmembed.training.trainer import EmbedderTrainer

    config = build_config(tree)
    media = media_store(config.data)
    model, preprocessor = build_embedding_model(config, media)
    data = [RecordDataset(source, media, root=config.data.root) for source in config.data.train]
    objective = build_objective(config.objective, model.embedding_size, model.depth)
    trainer = EmbedderTrainer(config, training_arguments(config), model, preprocessor, objective, data)
    start = _start()
    trainer.add_callback(start)
    trainer.train()
    files = _status("RssFile")  # they stay resident: what is there now was there at the peak
    return {"rise_mb": (_status("VmHWM") - files - start.before) / 1024}


def _start() -> Any:
    from transformers import TrainerCallback

    class Start(TrainerCallback):
        def on_train_begin(self, *args: Any, **options: Any) -> None:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
            self.before = _status("RssAnon")

    return Start()


def _status(key: str) -> int:
    """A line of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


if __name__ == "__main__":
    main()
