"""Fine-tunes a language model into a reranker that answers in words: an order of documents, or a reason and yes or no.

    python -m recipes.train_generative_reranker --config recipes/configs/generative_reranker/sft_listwise.yaml
    accelerate launch recipes/train_generative_reranker.py --config recipes/configs/generative_reranker/dpo.yaml

The training loop is trl's (SFTTrainer, DPOTrainer): every argument in `training` is one of its own names, and DDP,
DeepSpeed and FSDP come by `accelerate launch`. What is ours is before and behind it: records become conversations, and
the folder says what it is. It loads with `ListwiseReranker.from_pretrained` or `RationaleReranker`. The same command
again goes on from the last checkpoint. Exit status: 0 done, 2 refused.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and __package__ is None:  # run as a file: its folder is on the path, the repository is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmembed.arguments import Parser
from mmembed.config import load_blocks
from mmembed.config.generative import GenerativeConfig
from mmembed.errors import ConfigError
from recipes.train_embedder import check_world, exit_status, leave
from recipes.trl_arguments import last_checkpoint, training_arguments

logger = logging.getLogger("train_generative_reranker")
EXAMPLES = "recipes/configs/generative_reranker"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help=f"a YAML file, for example {EXAMPLES}/sft_listwise.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file: training.max_steps=10")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads would spin beside the workers
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # trl would report each run
    return exit_status(lambda: train(load_blocks(GenerativeConfig, options.config, options.overrides, EXAMPLES)))


def train(config: GenerativeConfig) -> Any:
    """Trains and saves; returns trl's trainer."""
    # 1. What can be refused before data is read and weights are loaded ------------------------------------------------
    args, output = training_arguments(config), config.training.output_dir
    logging.basicConfig(level=logging.INFO if args.process_index == 0 else logging.WARNING, format="%(message)s")
    check_world(args.world_size)
    from mmembed.models.generator import (
        check_generator,
        describe,
        is_generative,
        load_generator,
        lora_config,
        settings_of,
    )

    check_generator(config)
    resume = last_checkpoint(config)

    # 2. Model and conversations ---------------------------------------------------------------------------------------
    from recipes.conversations import conversations_of, report, table

    settings, name = settings_of(config), config.model.name_or_path
    trained = name if is_generative(name) else None
    generator = load_generator(
        settings, trust_remote_code=config.model.trust_remote_code, folder=trained, trainable=True
    )
    with args.main_process_first(desc="reading the data"):
        made, media = conversations_of(
            config, generator.writer, args.seed if args.data_seed is None else args.data_seed
        )
    if args.process_index == 0:
        print(report(made, config), flush=True)

    # 3. trl's trainer -------------------------------------------------------------------------------------------------
    from trl import __version__ as version
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.sft_trainer import SFTTrainer

    kind: Any = DPOTrainer if config.method.type == "dpo" else SFTTrainer
    data = {"train_dataset": table(made, generator, media), "processing_class": generator.processor}
    adapter = lora_config(config) if trained is None else None
    try:
        trainer = kind(generator.model, args=args, peft_config=adapter, **data)
    except (ValueError, TypeError, ImportError) as error:  # what trl refuses of its arguments
        raise ConfigError(f"training: {error}") from error

    # 4. Train and save ------------------------------------------------------------------------------------------------
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    if args.process_index == 0:
        remove_leftovers(Path(output))
        told = config.adapter.model_dump(mode="json") if trained is None else {"of": trained}
        describe(output, config, told, f"trl {version} {kind.__name__}")
        logger.info("saved %s", output)
    return trainer


def remove_leftovers(folder: Path) -> None:
    """What transformers and trl save beside the adapter and nothing loads: pickled arguments, DPO's reference."""
    (folder / "training_args.bin").unlink(missing_ok=True)
    shutil.rmtree(folder / "ref", ignore_errors=True)


if __name__ == "__main__":
    leave(main())
