"""The same command again goes on where the run was stopped, and ends where it would have ended: bit for bit."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from mmembed.config import load_config
from mmembed.errors import Preempted
from mmembed.objectives.contrastive import Contrastive
from mmembed.training.checkpoints import last_checkpoint
from recipes.train_embedder import main
from tests.runs import ROOT, build_trainer, losses

TIMES = ("runtime", "per_second", "seconds", "train_loss")  # of a process, not of the run


def command(config_file, folder, *overrides):
    return ["--config", str(config_file), f"training.output_dir={folder}", *overrides]


def outcome(folder):
    """(log, weights, optimizer's state, best metric) at the end of a run."""
    state = json.loads((folder / "trainer_state.json").read_text())
    log = [
        {key: value for key, value in entry.items() if not any(word in key for word in TIMES)}
        for entry in state["log_history"]
    ]
    tensors = load_file(folder / "adapter_model.safetensors") | load_file(folder / "objective.safetensors")
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-")[1]))
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    return log, tensors, optimizer, (state["best_metric"], state["best_global_step"])


def teacher_of(folder):
    """The teacher's weights in a run's last checkpoint."""
    return load_file(last_checkpoint(folder) / "teacher.safetensors")


def same(left, right):
    """Equality of trees with tensors: bit for bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def assert_same_outcome(whole, stopped):
    parts = ("log", "weights", "optimizer", "best")
    for part, expected, found in zip(parts, outcome(whole), outcome(stopped), strict=True):
        assert same(expected, found), f"{part}: {expected} {found}"


EVALUATED = ["training.eval_strategy=steps", "training.eval_steps=2", "training.load_best_model_at_end=true"]
EVALUATED += ["training.early_stopping_patience=3", "training.save_strategy=steps", "training.save_steps=2"]
STREAMED = ["data.train=[{path: text.jsonl, streaming: true, shuffle_buffer: 7, weight: 2}, {path: pictures.jsonl}]"]
REMEMBERING = "[{type: isogclr}, {type: negative_queue, size: 8}, rafa, {type: prototypes, prototypes: 4}]"
ACCUMULATED = ["training.gradient_accumulation_steps=2"]
TAUGHT = "[{type: negative_queue, size: 8, momentum: 0.8}, {type: hycd, momentum: 0.8}]"
POSITIVES = "data.ignore_fields=[negatives]"  # these objectives compare no others
BY_EPOCH = ["training.eval_strategy=epoch", "training.save_strategy=steps", "training.save_steps=2"]
BY_EPOCH += ["training.early_stopping_patience=1", "training.metric_for_best_model=eval_recall_at_10"]


@pytest.mark.parametrize(
    ("stops", "overrides"),
    [
        ((3, 5, 8), ["training.max_steps=8", *EVALUATED, "training.logging_steps=3"]),
        ((1, 2), ["training.max_steps=5", "training.gradient_accumulation_steps=4"]),
        ((6, 7), ["training.num_train_epochs=2", "training.max_steps=-1", *BY_EPOCH]),
        ((2, 6), ["training.max_steps=7", "training.dataloader_num_workers=1", "training.eval_on_start=true"]),
        ((3, 5), ["training.max_steps=7", *STREAMED, "training.dataloader_num_workers=1"]),
        ((2,), ["training.optimizer=lion", "training.learning_rate=1e-3", "training.logging_steps=4"]),
        ((2,), ["training.optimizer=adafactor"]),
        ((2,), ["training.optimizer=adamw_8bit", "adapter={type: none}", "training.learning_rate=1e-3"]),
        ((2, 3), [f"objective={REMEMBERING}", POSITIVES, "training.max_steps=6", *ACCUMULATED]),
        ((2, 3), [f"objective={TAUGHT}", POSITIVES, "training.max_steps=6", *ACCUMULATED]),
        ((2,), ["objective=hycd", POSITIVES]),
        ((3,), ["training.lr_scheduler_type=reduce_lr_on_plateau", "training.learning_rate=0.3", *EVALUATED]),
    ],
    ids=[
        "evaluated",
        "accumulated",
        "by epoch",
        "workers",
        "streamed",
        "lion",
        "adafactor",
        "8 bits, all weights",
        "an objective that remembers",
        "a teacher",
        "a frozen teacher",
        "plateau",
    ],
)
def test_a_stopped_run_ends_where_the_uninterrupted_one_does(config_file, tmp_path, stop_in_step, stops, overrides):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    end = ["training.save_strategy=steps"] if "training.save_strategy=steps" not in overrides else []
    assert main(command(config_file, whole, *end, *overrides)) == 0
    stop_in_step(*stops)
    statuses = [main(command(config_file, stopped, *end, *overrides)) for _ in range(len(stops) + 1)]
    assert statuses == [75] * len(stops) + [0]
    if "adapter={type: none}" in overrides:
        pair = [load_file(folder / "model.safetensors") for folder in (whole, stopped)]
        assert same(*pair)
        return
    if "objective=hycd" in overrides:  # the start is in no other file of a checkpoint
        assert same(*(load_file(folder / "adapter_model.safetensors") for folder in (whole, stopped)))
        assert same(*(teacher_of(folder) for folder in (whole, stopped)))
        return
    assert_same_outcome(whole, stopped)
    if f"objective={TAUGHT}" in overrides:
        assert same(*(teacher_of(folder) for folder in (whole, stopped)))
    if f"objective={REMEMBERING}" in overrides:
        memory = outcome(whole)[1]
        assert len(memory["objectives.0.memory.keys"]) > 8 and memory["objectives.1.queue.seen"] > 8
        assert memory["objectives.2.step"] == 6  # optimizer steps


SAVED = ["training.save_strategy=steps", "training.save_steps=2", "data.dev=[]"]


def test_a_finished_run_trains_no_further(config_file, tmp_path):
    """Also in the middle of an epoch, and after early stopping: the same command saves the same model once more."""
    stopping = [
        "training.learning_rate=5.0",
        "training.lr_scheduler_type=constant",
        "training.early_stopping_patience=1",
    ]
    stopping += ["training.eval_strategy=steps", "training.eval_steps=1", "training.save_steps=1"]
    stopping += ["training.save_strategy=steps", "training.max_steps=12", "training.save_total_limit=1"]
    for folder, overrides in ((tmp_path / "steps", SAVED), (tmp_path / "early", stopping)):
        assert main(command(config_file, folder, *overrides)) == 0
        before = outcome(folder)
        assert len(losses(folder)) < 12
        assert main(command(config_file, folder, *overrides)) == 0
        log, *rest = outcome(folder)
        assert same(before[1:], tuple(rest))
        assert [entry for entry in log if "loss" in entry] == [entry for entry in before[0] if "loss" in entry]


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(config_file, data, tmp_path, capsys):
    text = tmp_path / "own.jsonl"
    lines = (data / "text.jsonl").read_text().splitlines()
    text.write_text("\n".join(lines[:24]) + "\n")
    train = [*SAVED, f"data.train=[{{path: {text}}}]", "training.max_steps=2"]
    out = tmp_path / "out"
    assert main(command(config_file, out, *train)) == 0
    weights = (out / "checkpoint-2" / "adapter_model.safetensors").read_bytes()

    def refusal(*overrides):
        capsys.readouterr()
        assert main(command(config_file, out, *train, *overrides)) == 2
        assert (out / "checkpoint-2" / "adapter_model.safetensors").read_bytes() == weights
        return capsys.readouterr().err

    found = refusal("training.max_steps=4", "objective.temperature={value: 0.2, learn: true}")
    assert "training.max_steps: 2 then, 4 now" in found
    assert "objective.temperature.value: 0.1 then, 0.2 now" in found and "output_dir: " not in found
    assert "training.output_dir" in found and f"resume_from_checkpoint={out / 'checkpoint-2'}" in found
    found = refusal("training.per_device_train_batch_size=4")
    assert "8 rows (1 processes x 8), now it would have 4 (1 x 4)" in found
    assert "per_device_train_batch_size to 8" in found
    assert "would replace" in refusal("training.resume_from_checkpoint=false")
    assert "no complete checkpoint" in refusal("training.resume_from_checkpoint=elsewhere/checkpoint-2")
    text.write_text("\n".join(lines[1:25]) + "\n")
    assert "others than they were" in refusal()
    text.write_text("\n".join(lines[:25]) + "\n")
    assert "24 records then, 25 records now" in refusal()
    text.write_text("\n".join(lines[:24]) + "\n")
    allowed = ["training.logging_steps=2", "training.save_total_limit=2", "training.save_steps=1"]
    assert main(command(config_file, out, *train, *allowed)) == 0
    (out / "checkpoint-2" / "training_run.json").unlink()
    assert "training_run.json: missing" in refusal()


def test_a_named_checkpoint_goes_on_under_new_settings_with_a_warning(config_file, tmp_path, caplog):
    out = tmp_path / "out"
    assert main(command(config_file, out, *SAVED, "training.max_steps=2")) == 0
    named = f"training.resume_from_checkpoint={out / 'checkpoint-2'}"
    assert main(command(config_file, out, *SAVED, "training.max_steps=3", named)) == 0
    assert len(losses(out)) == 3
    assert "training.max_steps: 2 then, 3 now" in caplog.text


def test_weights_alone_are_nothing_to_go_on_from_but_a_stop_saves_all(config_file, tmp_path, stop_in_step, capsys):
    out, overrides = tmp_path / "out", [*SAVED, "training.save_steps=1", "training.save_only_model=true"]
    stop_in_step(2)
    assert main(command(config_file, out, *overrides)) == 75
    assert (out / "checkpoint-2" / "optimizer.pt").exists() and not (out / "checkpoint-1" / "optimizer.pt").exists()
    assert main(command(config_file, out, *overrides)) == 0
    assert main(command(config_file, out, *overrides)) == 2
    assert "weights alone (training.save_only_model)" in capsys.readouterr().err


def test_usr1_stops_as_well_and_the_usual_handlers_come_back(config_file, tmp_path, stop_in_step, capsys):
    stop_in_step(1, number=signal.SIGUSR1)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    assert main(command(config_file, tmp_path / "out", *SAVED)) == 75
    assert "stopped by SIGUSR1 after step 1; checkpoint-1 is complete" in capsys.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


class Remembering(Contrastive):
    """Compares with a memory of earlier losses as well: its state is a buffer and a learned parameter."""

    name = "remembering"

    def __init__(self):
        super().__init__(temperature=0.1)
        self.register_buffer("memory", torch.zeros(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.trust = torch.nn.Parameter(torch.ones(()))

    def compare(self, gathered):
        loss, metrics = super().compare(gathered)
        loss = loss * (1 + self.trust * self.memory.mean())
        self.memory[self.seen % 3] = loss.detach()
        self.seen += 1
        return loss, metrics


def test_what_an_objective_remembers_goes_on(config_file, tmp_path, stop_in_step):
    def trained(folder, resume=None):
        overrides = ["data.dev=[]", f"training.output_dir={folder}", "training.save_strategy=steps"]
        trainer = build_trainer(load_config(config_file, overrides), Remembering())
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_state()
        return trainer

    whole = trained(tmp_path / "whole")
    stop_in_step(2)
    with pytest.raises(Preempted):
        trained(tmp_path / "stopped")
    saved = load_file(tmp_path / "stopped" / "checkpoint-2" / "objective.safetensors")
    assert saved.keys() == {"memory", "seen", "trust"} and saved["seen"] == 2 and saved["memory"].count_nonzero() == 2
    resumed = trained(tmp_path / "stopped", str(last_checkpoint(tmp_path / "stopped")))
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert len(set(losses(tmp_path / "whole"))) == 4


def test_a_checkpoint_of_an_adapter_holds_adapter_and_heads_alone(config_file, tmp_path):
    heads = ["pooling={type: latent_attention, num_latents: 4}", "projection=16"]
    assert main(command(config_file, tmp_path / "out", *SAVED, *heads, "training.max_steps=2")) == 0
    folder = tmp_path / "out" / "checkpoint-2"
    weights = {file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".pth")}
    expected = {"adapter_model", "pooling", "objective", "sums_0"}
    assert weights == {f"{name}.safetensors" for name in expected} | {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    trainer = build_trainer(load_config(config_file, [*SAVED, *heads]))
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    saved = [load_file(folder / f"{name}.safetensors") for name in ("adapter_model", "pooling", "objective")]
    assert sum(tensor.numel() for tensors in saved for tensor in tensors.values()) == count
    moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"].values()
    assert len(moments) == len(trained)
    assert sum(one[name].numel() for one in moments for name in ("exp_avg", "exp_avg_sq")) == 2 * count


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again(config_file, tmp_path):
    """Real processes die of SIGKILL in steps, evaluations, writing checkpoints and the final model, one of SIGTERM,
    the last ends.

    Dropout, accumulation, a data worker, a learned temperature, early stopping's counter, logs that span checkpoints.
    """
    overrides = ["training.max_steps=7", *EVALUATED, "training.logging_steps=3", "training.dataloader_num_workers=1"]
    overrides += ["training.gradient_accumulation_steps=2", "training.save_total_limit=2"]
    lives = {
        "whole": [],
        "killed": [
            "write",
            "step",
            "write",
            "evaluation",
            "write",
            "stop",
            "write",
            "step",
            "write",
            "write",
            *["final"] * 4,
        ],
    }
    for name, kinds in lives.items():
        arguments = command(config_file, tmp_path / name, *overrides)
        job = {"seed": 5, "lives": kinds, "folder": str(tmp_path / name), "arguments": arguments}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = [sys.executable, "-m", "tests.recipes.killing", json.dumps(job)]
        done = subprocess.run(started, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        left = json.loads(done.stdout.splitlines()[-1])
        assert left[-1]["status"] == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
    assert all(one["killed"] or one["status"] == 75 for one in left[:-1]), left
    assert [one["kind"] for one in left if one["status"] == 75] == ["stop"]
    assert any(one["cut"] for one in left), left  # a kill while a checkpoint was written
    finals = [one for one in left if one["kind"] == "final"]
    assert all(one["killed"] and not one["finished"] for one in finals), left
    assert len({tuple(one["root"]) for one in finals}) > 1, left  # before and after the model was put in place
    assert len({tuple(one["complete"]) for one in left}) > 3, left  # and progress between kills
    assert_same_outcome(tmp_path / "whole", tmp_path / "killed")
