"""Runs the training command again and again in processes that die of SIGKILL, until one reaches the end.

    python -m tests.recipes.killing '{"seed": 0, "lives": ["write", "step"], "folder": ..., "arguments": [...]}'

Imports cost most of a start, so this process imports everything once and forks: each life is a real process that
begins with `main(arguments)`. Where it dies is drawn: up to four milliseconds after it began its n-th step, its n-th
evaluation or its n-th operation on a file of a checkpoint, and before the next one of these however busy the machine
is, or at its n-th operation on the `final` model in the output folder. One that is to `stop` sends SIGTERM to its whole
process group in its n-th step instead, data workers included. Prints what each life left behind as JSON.
"""

import importlib
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

SPREAD = 6  # between the four moments of a final save, which is 23 operations long


def main() -> None:
    job = json.loads(sys.argv[1])
    draw, folder = random.Random(job["seed"]), Path(job["folder"])
    import_all()
    left = []
    for kind in [*job["lives"], None]:
        number = draw.randint(1, 4) * (SPREAD if kind == "final" else 1)
        status = life(job["arguments"], kind, number, draw.uniform(0, 0.004), folder)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-")[1]))
        whole = [path.name for path in found if (path / "trainer_state.json").exists()]
        left.append({"kind": kind, "killed": killed, "status": os.waitstatus_to_exitcode(status), "complete": whole})
        left[-1]["cut"] = [path.name for path in found if path.name not in whole]
        left[-1]["finished"] = (folder / "metrics.json").exists()
        left[-1]["root"] = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.exists() else []
    print(json.dumps(left))


def import_all() -> None:
    for name in (
        "mmembed.training.trainer",
        "recipes.train_embedder",
        "datasets",
        "peft",
    ):  # ours make torchvision work
        importlib.import_module(name)
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    assert all((Qwen3VLForConditionalGeneration, Qwen3VLProcessor))  # transformers loads a name when it is asked for
    assert threading.active_count() == 1, "a fork would lose the other threads"


def life(arguments: list[str], kind: str | None, number: int, delay: float, folder: Path) -> int:
    """Status of a process that runs the command and is killed `delay` seconds after event `number` of a kind."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    from recipes.train_embedder import main as train

    os.setsid()
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    if kind is not None:
        arrange(kind, number, delay, folder)
    os._exit(train(arguments))


def arrange(kind: str, number: int, delay: float, folder: Path) -> None:
    """Lets this process kill itself."""
    from mmembed.training import trainer

    seen = 0

    def note() -> None:
        nonlocal seen
        seen += 1
        if seen == number and kind == "stop":
            os.killpg(0, signal.SIGTERM)
        elif seen == number and kind != "final":
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif seen >= number and kind != "stop":  # at once: the timer is late, or might come after the last operation
            os.kill(os.getpid(), signal.SIGKILL)

    if kind in ("write", "final"):
        operations = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        saving = kind == "write"

        def watch(event: str, values: tuple) -> None:
            writes = event in operations or (event == "open" and isinstance(values[2], int) and values[2] & os.O_WRONLY)
            places = [f"{folder.name}/checkpoint-"] if kind == "write" else [f"/{folder.name}/", f"/.{folder.name}."]
            if saving and writes and any(place in str(values[0]) for place in places):
                note()

        def save(*arguments: object, **options: object) -> object:
            nonlocal saving
            saving = saving or len(arguments) == 1  # else a checkpoint's folder is given
            return usual_save(*arguments, **options)

        usual_save = trainer.EmbedderTrainer.save_model
        trainer.EmbedderTrainer.save_model = save
        sys.addaudithook(watch)
        return
    owner, name = (trainer, "evaluate") if kind == "evaluation" else (trainer.EmbedderTrainer, "training_step")
    usual = getattr(owner, name)

    def watched(*arguments: object, **options: object) -> object:
        note()
        return usual(*arguments, **options)

    setattr(owner, name, watched)


if __name__ == "__main__":
    main()
