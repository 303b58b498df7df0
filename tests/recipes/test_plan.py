"""`mmembed plan`: numbers of a run from its config, its data and a folder without weights; equal to the run's own."""

import json
import shutil
from itertools import islice

import pytest

from mmembed.cli import main
from mmembed.config import load_config
from mmembed.plan import plan_run
from tests.runs import build_trainer

TEXT = "data.train=[{path: text.jsonl}]"


@pytest.fixture
def without_weights(config_file, backbone, tmp_path):
    """The config of the small run, its backbone without the weight files."""
    shutil.copytree(backbone, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return f"model.name_or_path={tmp_path / 'bare'}"


def planned(capsys, *arguments):
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_numbers_are_those_of_the_run(config_file, without_weights, capsys):
    """Parameters, steps, tokens and negatives, against the trainer that loads the weights."""
    plan = planned(capsys, "--config", config_file, "--sample", 99, without_weights)
    trainer = build_trainer(load_config(config_file))
    parameters = list(trainer.model.parameters())
    assert sum(mine for mine, _ in plan["parameters"].values()) == sum(p.numel() for p in parameters if p.requires_grad)
    assert sum(every for _, every in plan["parameters"].values()) == sum(p.numel() for p in parameters)
    batches = [trainer.collator([trainer.train_dataset[draw] for draw in draws]) for draws in trainer.plan]
    assert plan["batches_sampled"] == len(batches)
    assert plan["tokens"] == pytest.approx(sum(batch.tokens for batch in batches) / len(batches))
    assert plan["largest_chunk"] == max(chunk.padded_tokens for batch in batches for chunk in batch.chunks)
    assert plan["visual_tokens"] > 0
    assert plan["steps"] == 4
    assert plan["negatives"]["other_processes"] == 0
    weights = sum(p.numel() * p.element_size() for p in parameters)
    assert plan["stages"][0]["weights"] == weights
    assert plan["seconds"] is None


def test_a_stream_is_planned_as_it_is_trained(config_file, without_weights, capsys):
    """The first batches of the run; how often the records pass is not known, and said so."""
    options = ["data.train=[{path: text.jsonl, streaming: true}]", "training.data_seed=0"]
    plan = planned(capsys, "--config", config_file, "--sample", 2, without_weights, *options)
    trainer = build_trainer(load_config(config_file, options))
    batches = [trainer.collator([trainer.train_dataset[draw] for draw in draws]) for draws in islice(trainer.plan, 2)]
    assert plan["batches_sampled"] == 2
    assert plan["tokens"] == sum(batch.tokens for batch in batches) / 2
    assert plan["steps"] == 4 and plan["epochs"] is None
    assert main(["plan", "--config", str(config_file), without_weights, *options]) == 0
    assert "steps: 4 (training.max_steps; a stream has no length)" in capsys.readouterr().out
    assert main(["plan", "--config", str(config_file), without_weights, *options, "training.max_steps=-1"]) == 2
    assert "nobody knows the length of a stream; set training.max_steps" in capsys.readouterr().err


def test_chunks_share_prefixes_as_in_training(config_file, without_weights, capsys):
    """What is shared is not computed again and takes no memory again; where nothing is, the plan says why."""
    prompt = "prompt={type: plain, query_prefix: 'Find the one that fits: ', document_prefix: 'The one that fits is: '}"
    options = [prompt, "data.train=[{path: text.jsonl}]"]
    plan = planned(capsys, "--config", config_file, "--sample", 99, without_weights, *options)
    trainer = build_trainer(load_config(config_file, options))
    batches = [trainer.collator([trainer.train_dataset[draw] for draw in draws]) for draws in trainer.plan]
    assert plan["saved_tokens"] == sum(batch.saved_tokens for batch in batches) / len(batches) > 0
    assert plan["padded_tokens"] == sum(batch.padded_tokens for batch in batches) / len(batches)
    alone = planned(
        capsys, "--config", config_file, "--sample", 99, without_weights, *options, "training.share_prefix=off"
    )
    assert alone["saved_tokens"] == 0 and alone["unshared"] == "training.share_prefix is off"
    assert alone["tokens"] == plan["tokens"] and alone["padded_tokens"] > plan["padded_tokens"]
    kernel = ("model.attn_implementation=eager",)
    assert "eager" in planned(capsys, "--config", config_file, without_weights, *options, *kernel)["unshared"]


def test_packed_texts_have_no_padding(config_file, without_weights, capsys):
    """Where the run packs on any device; `auto` is planned padded, and what the run refuses is refused."""
    options = ["data.train=[{path: text.jsonl}]", "training.token_budget=64", "training.share_prefix=off"]
    packed = planned(capsys, "--config", config_file, without_weights, *options, "training.attention_kernel=packed")
    assert packed["padded_tokens"] == packed["tokens"]
    plain = planned(capsys, "--config", config_file, without_weights, *options)
    assert plain["tokens"] == packed["tokens"] < plain["padded_tokens"]
    for other in ("model.attn_implementation=eager", "model.attention=bidirectional"):
        given = [without_weights, *options, "training.attention_kernel=packed", other]
        assert main(["plan", "--config", str(config_file), *given]) == (2 if "eager" in other else 0)
    assert "'packed' cannot be (attn_implementation is 'eager'" in capsys.readouterr().err


def test_kept_features_of_images_are_told(config_file, without_weights, capsys):
    def said(*options):
        return planned(capsys, "--config", config_file, without_weights, *options)["features"]

    assert said() == "not kept (training.vision_cache is off)"
    assert said("training.vision_cache=auto") == "kept on disk: from the second epoch on the vision tower does not run"
    assert said("data.train=[{path: text.jsonl}]") == ""
    trained = ["model.freeze=[]", "adapter.target_modules=all-linear"]
    assert "trained, so features change" in said("training.vision_cache=auto", *trained)
    insisted = [without_weights, "training.vision_cache=features", *trained]
    assert main(["plan", "--config", str(config_file), *insisted]) == 2
    assert "training.vision_cache: features of images cannot be kept" in capsys.readouterr().err


def test_devices_share_what_a_stage_shards(config_file, without_weights, capsys):
    options = ["adapter={type: none}", "data.train=[{path: text.jsonl}]"]
    one, two = (
        planned(capsys, "--config", config_file, "--devices", count, without_weights, *options) for count in (1, 2)
    )
    for stage in (1, 2, 3):
        assert two["stages"][stage]["optimizer"] == pytest.approx(one["stages"][stage]["optimizer"] / 2)
    assert two["stages"][1]["gradients"] == one["stages"][1]["gradients"]
    assert two["stages"][2]["gradients"] == pytest.approx(one["stages"][2]["gradients"] / 2)
    assert two["stages"][3]["weights"] < two["stages"][2]["weights"]
    assert [stage["name"] for stage in two["stages"]] == ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"]
    assert [stage["name"] for stage in one["stages"]] == ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"]  # nothing to share
    whole, divided = two["stages"][0], two["stages"][4]
    four = planned(capsys, "--config", config_file, "--devices", 4, without_weights, *options)["stages"][4]
    assert divided["weights"] - four["weights"] == pytest.approx(whole["weights"] / 4)  # what is gathered stays
    assert divided["optimizer"] == pytest.approx(whole["optimizer"] / 2)
    assert divided["gradients"] == pytest.approx(
        1.5 * sum(mine for mine, _ in two["parameters"].values()) * 4, rel=0.01
    )
    assert two["negatives"]["other_processes"] > 0


@pytest.mark.parametrize(
    "option, missing",
    [
        ("adapter={type: qlora}", ["ZeRO-3"]),
        ("training.optimizer=adafactor", ["ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"]),
        ("training.grad_cache=false", ["ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"]),
        ("training.optim=sgd", ["FSDP2"]),
        ("objective=hycd", ["ZeRO-3", "FSDP2"]),
        ("objective={type: negative_queue, momentum: 0.99, in_batch: false}", ["ZeRO-3", "FSDP2"]),
    ],
)
def test_what_a_launch_would_refuse_is_not_planned(config_file, without_weights, capsys, option, missing):
    """With the reason; `tests/unit/test_launch.py` and `tests/recipes` have the refusals."""
    command = ["--config", config_file, "--devices", 2, without_weights, TEXT, option, "model.dtype=auto"]
    plan = planned(capsys, *command, "data.ignore_fields=[negatives]")  # some of these compare positives only
    every = ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"]
    assert [stage["name"] for stage in plan["stages"]] == [name for name in every if name not in missing]
    (note,) = [note for note in plan["notes"] if note.startswith("no ")]
    assert note.startswith(f"no {', '.join(missing)}: ") and note.split(": ")[1]


def test_a_teacher_is_the_trained_weights_once_more(config_file, without_weights, capsys):
    command = ["--config", config_file, without_weights, TEXT, "adapter={type: none}", "data.ignore_fields=[negatives]"]
    without, taught = (
        planned(capsys, *command, f"objective={{type: hycd, momentum: {momentum}}}") for momentum in ("null", "1")
    )
    held = [taught["stages"][0]["weights"] - without["stages"][0]["weights"]]
    assert held == [4 * sum(trained for trained, _ in taught["parameters"].values())]
    (note,) = [one for one in taught["notes"] if "a teacher: the model as it is now, " in one]
    assert note not in without["notes"]
    assert taught["negatives"]["own"] == 0  # the records have some, `hycd` compares none


def test_four_bits_stay_whole_under_fsdp2(config_file, without_weights, capsys):
    """Of the weights only the others are divided."""
    command = ["--config", config_file, without_weights, TEXT, "model.dtype=bfloat16"]
    by_count = {
        count: planned(capsys, *command, "adapter={type: qlora}", "--devices", count)["stages"] for count in (2, 4)
    }
    divided = 4 * (by_count[2][-1]["weights"] - by_count[4][-1]["weights"])
    in_four_bits = by_count[2][0]["weights"] - divided
    of_lora = planned(capsys, *command, "adapter={type: lora}", "--devices", 2)["stages"][0]["weights"]
    values = (of_lora - divided) / 2  # the same ones, in 16 bits
    assert in_four_bits / values == pytest.approx(0.5, rel=0.05)


def test_the_sample_is_called_a_lower_bound(config_file, without_weights, capsys):
    command = ["--config", str(config_file), without_weights, "lengths={document_max_length: 200}", "--sample", "1"]
    assert main(["plan", *command]) == 0
    text = capsys.readouterr().out
    assert "a lower bound" in text and "`lengths` allow 512 text tokens" in text


@pytest.mark.parametrize("optimizer", ["lion", "adamw_8bit"])
def test_the_batch_report_says_what_the_plan_says(config_file, without_weights, capsys, optimizer):
    options = [TEXT, f"training.optimizer={optimizer}", "adapter={type: none}", "data.dev=[]"]
    held = planned(capsys, "--config", config_file, without_weights, *options)["stages"][0]
    weights, gradients, state = (f"{held[name] / 2**20:,.0f} MB" for name in ("weights", "gradients", "optimizer"))
    report = str(build_trainer(load_config(config_file, options)).report())
    assert f"weights {weights}, gradients {gradients}, state of {optimizer} {state}, " in report


def test_the_time_is_that_of_the_stated_throughput(config_file, without_weights, capsys):
    plan = planned(capsys, "--config", config_file, "--throughput", 100, without_weights)
    assert plan["seconds"] == pytest.approx(4 * plan["tokens"] / 100)
    assert plan["throughput_is"] == "stated"


def test_measured_throughput_needs_weights(config_file, without_weights, capsys):
    plan = planned(capsys, "--config", config_file, "--measure", 2, "data.dev=[]")
    assert plan["tokens_per_second"] > 0 and "measured" in plan["throughput_is"]
    assert main(["plan", "--config", str(config_file), "--measure", "2", without_weights]) == 2
    assert "safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "linear"])
def test_a_measurement_evaluates_nothing(config_file, capsys, schedule):
    """Whatever the run would do with what it evaluates."""
    evaluated = ["training.eval_strategy=steps", "training.eval_steps=2", "training.eval_on_start=true"]
    evaluated += ["training.metric_for_best_model=ndcg_at_10", "training.greater_is_better=true"]
    evaluated += ["training.load_best_model_at_end=true", "training.save_strategy=steps", "training.save_steps=2"]
    evaluated += [f"training.lr_scheduler_type={schedule}", "training.early_stopping_patience=2"]
    if schedule != "linear":
        evaluated.append("training.lr_scheduler_kwargs={patience: 3}")
    assert planned(capsys, "--config", config_file, TEXT, *evaluated, "--measure", 1)["tokens_per_second"] > 0


def test_what_the_run_would_refuse_is_not_planned(config_file, without_weights, capsys, tmp_path):
    """`tests/recipes/test_refusals.py` and `tests/unit/test_launch.py` have what both refuse of the config alone."""
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}, "scheduler": {}}')
    for options, message in (
        ([f"training.deepspeed={tmp_path / 'zero.json'}"], "the block 'scheduler' would replace"),
        (["training.fsdp_config={version: 2}"], "training.fsdp_config has no effect without training.fsdp"),
        (
            ["training.eval_strategy=steps", "training.save_strategy=best", "training.metric_for_best_model=spearman"],
            "training.metric_for_best_model: dev evaluation gives no 'spearman'",
        ),
    ):
        assert main(["plan", "--config", str(config_file), without_weights, *options]) == 2
        assert message in capsys.readouterr().err


def test_what_lengths_cut_is_said(config_file, without_weights, capsys, tmp_path):
    """By the plan and by the batch report; also where the instruction leaves no room at all."""
    records = [{"query": f"{'red ' * 20}{number}", "documents": [{"content": f"blue {number}"}]} for number in range(8)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    options = [f"data.train=[{{path: {tmp_path / 'long.jsonl'}}}]", "data.train_group_size=1", "data.dev=[]"]
    line = "50.0% of the inputs (8 of 16) are cut to fit `lengths`"

    def said(*more):
        assert main(["plan", "--config", str(config_file), without_weights, *options, *more, "--sample", "1"]) == 0
        report = build_trainer(load_config(config_file, [*options, *more])).report()
        return capsys.readouterr().out, str(report)

    assert not any("are cut" in text for text in said())
    for text in said("lengths.query_max_length=9"):
        assert line in text and "the prompt alone" not in text
    prompt = ["prompt={type: plain, query_prefix: 'find it: '}"]
    tokens = len(build_trainer(load_config(config_file, options)).preprocessor.tokenizer("find it: ").input_ids)
    for text in said(f"lengths.query_max_length={tokens}", *prompt):
        assert line in text
        assert "warning: the prompt alone fills the limit of 8 inputs" in text


def test_negatives_that_are_masked_do_not_count(config_file, without_weights, capsys, tmp_path):
    """Four of eight queries have one text: three in-batch negatives fewer for each of them."""
    texts = ["same"] * 4 + [f"other {number}" for number in range(4)]
    records = [{"query": f"q {number}", "documents": [{"content": text}]} for number, text in enumerate(texts)]
    (tmp_path / "alike.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    options = [f"data.train=[{{path: {tmp_path / 'alike.jsonl'}}}]", "data.train_group_size=1", "data.dev=[]"]
    plan = planned(capsys, "--config", config_file, without_weights, *options)
    assert plan["negatives"]["in_batch"] == (4 * 4 + 4 * 7) / 8
    report = str(build_trainer(load_config(config_file, options)).report())
    assert "5.5 in-batch negatives of this process (without duplicates and known positives)" in report
    off = planned(capsys, "--config", config_file, without_weights, *options, "objective.mask_duplicates=false")
    assert off["negatives"]["in_batch"] == 7


def test_what_does_not_fit_is_named_with_what_would(config_file, without_weights, capsys):
    """A budget that is advised fits, by the plan's own numbers."""
    base = ["--config", str(config_file), without_weights, "adapter={type: none}", "training.token_budget=4096"]
    held = planned(capsys, *base)["stages"][0]
    memory = int(held["total"] - 0.5 * held["activations"])
    assert main(["plan", *base, "--memory", f"{memory}B"]) == 0
    text = capsys.readouterr().out
    assert "DDP does not fit" in text
    budget = next(line for line in text.splitlines() if "training.token_budget: " in line)
    number = budget.split("training.token_budget: ")[1].split()[0]
    options = [f"training.token_budget={number}"]
    if "gradient_checkpointing" in budget:
        options.append("model.gradient_checkpointing=true")
    again = planned(capsys, *base, *options, "--memory", f"{memory}B")
    assert again["stages"][0]["fits"] is True


def test_little_memory_asks_for_another_way_to_train(config_file, without_weights, capsys):
    assert main(["plan", "--config", str(config_file), without_weights, "adapter={type: none}", "--memory", "1MB"]) == 0
    assert "weights, gradients and optimizer alone take" in capsys.readouterr().out


def test_four_bits_take_what_bitsandbytes_takes(config_file, backbone):
    """The base in NF4: the plan's bytes against those of the real quantised weights and their scales."""
    config = load_config(config_file, ["adapter={type: qlora, r: 4}", "model.dtype=bfloat16", "data.dev=[]"])
    plan = plan_run(config, sample=1)
    model = build_trainer(config).model
    real = 0
    for parameter in model.parameters():
        state = vars(parameter).get("quant_state")
        real += parameter.numel() * parameter.element_size()
        if state is not None:
            real += state.absmax.numel() * state.absmax.element_size() + state.state2.absmax.numel() * 4
    assert plan.stages[0].weights == pytest.approx(real, rel=0.02)


def test_what_only_a_gpu_can_is_planned_without_one(config_file, without_weights, capsys):
    half = planned(capsys, "--config", config_file, without_weights, "training.bf16=true")
    asked = ("training.fp16=true", "training.tf32=true")
    assert planned(capsys, "--config", config_file, without_weights, *asked) == half


def test_wrong_arguments_are_refused(config_file, capsys):
    for wrong, message in (
        (["--devices", "0"], "--devices: found 0"),
        (["--memory", "much"], "80GB"),
        (["--memory", "80"], "--memory: found '80'; write a size with its unit, for example 80GB"),
        (["--throughput", "-5"], "--throughput: found -5"),
        (["training.token_budgt=5"], "token_budget"),
    ):
        assert main(["plan", "--config", str(config_file), *wrong]) == 2
        assert message in capsys.readouterr().err
