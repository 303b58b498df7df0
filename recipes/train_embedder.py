"""Fine-tunes a decoder or vision-language decoder into an embedder.

    python -m recipes.train_embedder --config recipes/configs/embedder/demo.yaml training.learning_rate=1e-4
    accelerate launch recipes/train_embedder.py --config recipes/configs/embedder/qwen3_vl_2b_lora.yaml

Reads top to bottom: config, data, model, objective, report, training and saving. What comes out in
`training.output_dir` loads with `Embedder.from_pretrained`. The same command again goes on from the last complete
checkpoint. Exit status: 0 done, 2 refused, 75 stopped (SIGTERM, SIGUSR1, a process lost): start the same command again.
"""

from __future__ import annotations

import argparse
import atexit
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__" and __package__ is None:  # run as a file: its folder is on the path, the repository is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmembed.arguments import Parser
from mmembed.config import load_config
from mmembed.config.blocks import EmbedderConfig
from mmembed.errors import ConfigError, MmembedError, Preempted, WorkerLost

logger = logging.getLogger("train_embedder")
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, for example recipes/configs/embedder/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file: training.max_steps=10")
    parser.add_argument(
        "--worst-batch-first", action="store_true", help="the batch with the most tokens before step 1, without effect"
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads would spin beside the workers
    overrides = [*options.overrides, *(["training.worst_batch_first=true"] * options.worst_batch_first)]
    return exit_status(lambda: train(load_config(options.config, overrides)))


def exit_status(run: Callable[[], object]) -> int:
    """Of a command that trains: 0 when it ran to its end, 2 when it was refused, `TRY_AGAIN` when it was stopped."""
    try:
        run()
    except (Preempted, WorkerLost) as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        return TRY_AGAIN
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(config: EmbedderConfig) -> dict[str, float]:
    """Trains, saves and verifies; returns the last metrics of dev sources and benchmark."""
    # 1. Processes and seeds -------------------------------------------------------------------------------------------
    from mmembed.training.arguments import output_folder, set_seed, training_arguments, with_metric

    args = training_arguments(config)
    output = output_folder(args)
    main_process = args.process_index == 0
    logging.basicConfig(level=logging.INFO if main_process else logging.WARNING, format="%(message)s")
    check_world(args.world_size)
    set_seed(args.seed)

    # 2. What can be refused before anything is read -------------------------------------------------------------------
    from mmembed.models.continuing import build_for_training, check_trainable, inherit_settings, reads_media
    from mmembed.objectives import build_objective
    from mmembed.training.checkpoints import checkpoint_to_resume, how_to_go_on, writing
    from mmembed.training.launch import check_inherited
    from mmembed.training.lost_worker import naming_lost_workers
    from mmembed.training.preflight import preflight

    if not config.data.train:
        raise ConfigError("data.train: there is no source; add one, for example {path: squad-en, format: beir}")
    config = inherit_settings(config)  # a second stage is what the first one was
    check_inherited(args, config)
    objective = preflight(config)
    resume = checkpoint_to_resume(config, args)

    # 3. Data ----------------------------------------------------------------------------------------------------------
    from mmembed.data.dataset import media_store, open_dev
    from mmembed.data.streaming import open_source

    media = media_store(config.data)
    seed = args.seed if args.data_seed is None else args.data_seed
    with args.main_process_first(desc="reading the data"):
        train_data = [open_source(source, config.data, media, seed, objective.title) for source in config.data.train]
        dev_data = open_dev(config.data, media)

    # 4. Model, objective, trainer -------------------------------------------------------------------------------------
    from mmembed.training.batch_report import check_sources
    from mmembed.training.supply import check_dev
    from mmembed.training.trainer import EmbedderTrainer

    check_sources(train_data, config, objective, reads_media(config), args.world_size)
    check_dev(dev_data, config)
    args = with_metric(args, config, dev_data)
    model, preprocessor = build_for_training(config, media)
    check_trainable(model, any({"image", "video"} & source.fields for source in train_data))
    objective = build_objective(config.objective, model.embedding_size, model.depth)
    trainer = EmbedderTrainer(config, args, model, preprocessor, objective, train_data, dev_data)
    if main_process:
        print(trainer.report(), flush=True)

    # 5. Train, save, verify, evaluate ---------------------------------------------------------------------------------
    with naming_lost_workers(lambda: how_to_go_on(output)):
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        trainer.save_state()
        metrics = trainer.evaluate(metric_key_prefix="final") if dev_data or config.evaluation else {}
        difference = trainer.verify()
    if main_process:
        results = Path(output, "metrics.json")
        with writing(results, output):
            results.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        logger.info("saved %s; reloaded vectors differ by at most %.1g", output, difference)
    return metrics


def check_world(size: int) -> None:
    """Says how many processes train together; refuses several that do not know of each other."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != size:
        raise ConfigError(
            f"{started} processes were started but each would train alone; on a CPU set ACCELERATE_USE_CPU=true"
        )
    logger.info("processes: %d", size)


def leave(status: int) -> NoReturn:
    """Ends the process of a command. Of several that have trained to the end each leaves their group, does what is to
    be done at exit, and is gone without the C++ destructors of its libraries: threads of theirs have aborted a process
    on its way out ("terminate called without an active exception"), after all was saved."""
    if status == 0:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
