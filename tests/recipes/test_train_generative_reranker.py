"""Rerankers that answer in words, through the real command, real trl and a tiny vision-language model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmembed import Embedder, ListwiseReranker, RationaleReranker
from mmembed.config import load_blocks
from mmembed.config.generative import GenerativeConfig
from mmembed.errors import CheckpointError, MmembedError
from recipes.train_generative_reranker import main, train
from recipes.trl_arguments import training_arguments
from tests.runs import launch

RECIPE = "recipes/train_generative_reranker.py"
DOCUMENTS = ["a red bus in the town", "the dog slept", "photosynthesis turns sunlight into sugar"]


@pytest.fixture
def records(tmp_path):
    """Three graded documents a query, which are told apart by words; every third one has a picture."""
    from families import picture

    lines = []
    for number in range(12):
        best = {"content": f"{DOCUMENTS[0]} {number}", "relevance": 2}
        if number % 3 == 0:
            picture(number, 60, 60).save(tmp_path / f"{number}.png")
            best["content"] = [best["content"], {"image": f"{number}.png"}]
        documents = [{"content": f"{DOCUMENTS[2]} {number}", "relevance": 0}]
        documents += [{"content": f"{DOCUMENTS[1]} {number}", "relevance": 1}, best]
        lines.append({"query": f"bus {number}", "documents": documents, "instruction": "Find the bus"})
    (tmp_path / "graded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [line for number, line in enumerate(lines) if number % 3]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    for line in texts:
        for document, reason in zip(line["documents"], ("no bus", "a dog", "it names a bus"), strict=True):
            document["rationale"], document["relevance"] = reason, float(reason == "it names a bus")
    (tmp_path / "reasons.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    return tmp_path


@pytest.fixture
def config_file(tmp_path, backbone, records):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
model: {{name_or_path: {backbone}, dtype: float32}}
answer: {{type: listwise, documents: 3}}
adapter: {{type: lora, r: 8, alpha: 16, dropout: 0.0}}
lengths: {{query_max_length: 32, document_max_length: 24}}
data:
  root: {records}
  train: [{{path: texts.jsonl}}]
training:
  output_dir: {tmp_path / "out"}
  per_device_train_batch_size: 4
  max_steps: 3
  learning_rate: 0.01
  lr_scheduler_type: constant
  logging_steps: 1
  save_strategy: "no"
  gradient_checkpointing: false
  disable_tqdm: true
"""
    )
    return path


def run(config_file, *overrides):
    """The trainer of a run, which the command has, too."""
    return train(load_blocks(GenerativeConfig, config_file, overrides))


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_an_order_is_learned_and_given(config_file, tmp_path, capsys):
    """From the command to `rank`: the order of a prompt that was learned by heart; a folder that says what it is."""
    one = ["data.train=[{path: texts.jsonl, max_examples: 1}]", "training.max_steps=60", "training.logging_steps=10"]
    assert main(["--config", str(config_file), *one, "training.per_device_train_batch_size=1"]) == 0
    said = capsys.readouterr().out
    assert "texts.jsonl: 1 records, 1 orders" in said and "first answer ('texts.jsonl'): [" in said
    out = tmp_path / "out"
    described = json.loads((out / "mmembed.json").read_text())
    assert described["kind"] == "generative_reranker" and described["trained_with"].endswith("SFTTrainer")
    assert described["settings"]["answer"]["documents"] == 3 and described["adapter"]["r"] == 8

    reranker = ListwiseReranker.from_pretrained(out)
    trainer = run(config_file, *one[:1], "training.max_steps=1", f"training.output_dir={tmp_path / 'again'}")
    (row,) = trainer.train_dataset
    tokenizer = reranker.generator.tokenizer
    learned = tokenizer.decode(
        [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label > 0]
    )
    prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label < 0]
    assert learned.strip().removesuffix("<|im_end|>").replace("[", "").replace("]", "").split(" > ").__len__() == 3

    shown = shown_documents(tokenizer.decode(prompt))
    query = tokenizer.decode(prompt).split("<Query>: ")[1].split("\n")[0]
    asked = reranker.generator.writer.listwise(*contents(query, shown), "Find the bus")
    assert reranker.inputs([asked])["input_ids"][0].tolist() == prompt, "training and serving write the same tokens"
    places = reranker.rank(query, shown, instruction="Find the bus")
    assert [DOCUMENTS.index(shown[place].rsplit(" ", 1)[0]) for place in places] == [0, 1, 2]


def contents(query, documents):
    from mmembed.content import to_content

    return to_content(query), [to_content(one) for one in documents]


def shown_documents(prompt):
    lines = prompt.split("documents:\n")[1].split("\n")[:3]
    return [line.split("] ", 1)[1] for line in lines]


def test_only_the_answer_is_learned_and_documents_are_shuffled(config_file):
    trainer = run(config_file, "answer.shuffles=3", "training.max_steps=1")
    assert len(trainer.train_dataset) == 8 * 3
    tokenizer, answers = trainer.processing_class.tokenizer, set()
    for row in trainer.train_dataset:
        shown = shown_documents(tokenizer.decode(row["input_ids"]))
        right = sorted(range(3), key=lambda place: DOCUMENTS.index(shown[place].rsplit(" ", 1)[0]))
        learned = tokenizer.decode([token for token in row["labels"] if token >= 0])
        assert learned.startswith(" > ".join(f"[{place + 1}]" for place in right) + "<|im_end|>")
        answers.add(learned)
    assert len(answers) > 3


def test_long_lists_are_ranked_through_windows(config_file, tmp_path, caplog):
    run(config_file)
    reranker = ListwiseReranker.from_pretrained(tmp_path / "out", device="cpu")
    documents = [f"{DOCUMENTS[number % 3]} {number}" for number in range(8)]
    alone = reranker.rank("bus", documents)
    assert sorted(alone) == list(range(8))
    both = reranker.rank_all(["bus", "dog"], [documents, documents[:1]], top_k=3)
    assert both == [alone[:3], [0]]
    assert reranker.rank("bus", []) == []
    for wrong, message in (
        ({"stride": 3}, "stride: 3 with a window of 3"),
        ({"window": 1}, "window: 1"),
        ({"top_k": 0}, "top_k: 0"),
    ):
        with pytest.raises(MmembedError, match=message):
            reranker.rank("bus", documents, **wrong)
    with pytest.raises(MmembedError, match="are more than the 2,048 positions"):
        reranker.rank("bus", ["the dog slept in the garden"] * 300, window=300)


def test_pictures_are_read_as_in_training(config_file, tmp_path, records):
    trainer = run(config_file, "data.train=[{path: graded.jsonl}]", "training.max_steps=2")
    assert all(loss == loss for loss in logged(trainer, "loss"))
    reranker = ListwiseReranker.from_pretrained(tmp_path / "out", device="cpu")
    asked = reranker.generator.writer.listwise(
        *contents("bus", [{"image": str(records / "0.png")}, "a dog"]), "Find the bus"
    )
    tensors = reranker.inputs([asked])
    assert "pixel_values" in tensors
    assert sorted(reranker.rank("bus", [{"image": str(records / "0.png")}, "a dog"])) == [0, 1]


def test_a_reason_is_learned_and_given(config_file, tmp_path):
    one = "data.train=[{path: reasons.jsonl, max_examples: 1}]"
    answer = 'answer={type: rationale, words: ["yes", "no"]}'
    trainer = run(config_file, one, answer, "training.max_steps=60", "training.logging_steps=10")
    assert len(trainer.train_dataset) == 3
    reranker = RationaleReranker.from_pretrained(tmp_path / "out", device="cpu")
    number = (
        trainer.processing_class.tokenizer.decode(trainer.train_dataset[0]["input_ids"]).split("bus ")[1][:2].strip()
    )
    pairs = [(f"bus {number}", f"{one} {number}") for one in DOCUMENTS]
    found = reranker.judge(pairs, instruction="Find the bus", max_new_tokens=24)
    assert [(one.rationale, one.relevant) for one in found] == [
        ("it names a bus", True),
        ("a dog", False),
        ("no bus", False),
    ]
    with pytest.raises(MmembedError, match="trained to answer 'rationale'; load RationaleReranker"):
        ListwiseReranker.from_pretrained(tmp_path / "out", device="cpu")


def test_a_preferred_order_gains(config_file, tmp_path):
    """DPO after SFT, from its folder: the margin between right and wrong orders grows."""
    run(config_file, "training.max_steps=10")
    method = "method={type: dpo, rejected: swapped, pairs: 2}"
    start = [f"model={{name_or_path: {tmp_path / 'out'}, dtype: float32}}", f"training.output_dir={tmp_path / 'dpo'}"]
    without = tmp_path / "dpo.yaml"
    without.write_text(Path(config_file).read_text().replace("adapter:", "#"))
    one = "data.train=[{path: texts.jsonl, max_examples: 1}]"
    trainer = run(without, method, one, *start, "training.max_steps=60", "training.learning_rate=0.002")
    margins = logged(trainer, "rewards/margins")
    assert margins[0] == 0 and margins[-1] > 0.3 and logged(trainer, "rewards/accuracies")[-1] == 1
    row = trainer.train_dataset[0]
    decode = trainer.processing_class.tokenizer.decode
    assert sorted(decode(row["chosen_ids"])) == sorted(decode(row["rejected_ids"]))
    assert row["chosen_ids"] != row["rejected_ids"]
    assert not list((tmp_path / "dpo").rglob("*.bin")) and not (tmp_path / "dpo" / "ref").exists()
    described = json.loads((tmp_path / "dpo" / "mmembed.json").read_text())
    assert described["trained_with"].endswith("DPOTrainer")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "dpo"))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert sorted(ListwiseReranker.from_pretrained(tmp_path / "dpo", device="cpu").rank("bus", DOCUMENTS)) == [0, 1, 2]


def test_the_same_command_goes_on(config_file, tmp_path, capsys):
    """As if it had not been stopped; a checkpoint of another run is refused."""
    options = ["training.max_steps=4", "training.save_strategy=steps", "training.save_steps=2"]
    run(config_file, *options)
    whole = load_file(tmp_path / "out" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    trainer = run(config_file, *options)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry][-1] == 4
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert main(["--config", str(config_file), *options, "answer.shuffles=2"]) == 2
    assert "holds checkpoints of a run with another model" in capsys.readouterr().err


def test_what_teaches_nothing_and_what_is_cut_is_said(config_file, records, capsys):
    lines = (records / "texts.jsonl").read_text().splitlines()
    equal = json.loads(lines[0])
    for document in equal["documents"]:
        document["relevance"] = 1.0
    (records / "some.jsonl").write_text("\n".join([*lines, json.dumps(equal)]) + "\n")
    run(config_file, "data.train=[{path: some.jsonl}]", "training.max_steps=1", "lengths.document_max_length=3")
    said = capsys.readouterr().out
    assert f"warning: 1 records, the first at {records / 'some.jsonl'}:9, have no two documents that differ" in said
    assert "24 texts are cut to fit `lengths`: the last" in said
    (records / "all.jsonl").write_text(json.dumps(equal) + "\n")
    assert main(["--config", str(config_file), "data.train=[{path: all.jsonl}]"]) == 2
    assert f"all 1 records, the first at {records / 'all.jsonl'}:1, have no two documents" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["answer=listwse"], "answer.type"),
        (["answer={type: rationale, documents: 4}"], "'documents' has no effect with type 'rationale'"),
        (["answer.documents=1"], "answer.documents: found 1"),
        (["answer.documnets=4"], "did you mean 'documents'"),
        (["answer={type: rationale, words: [yes, no]}"], "answer.words"),
        (["answer=rationale"], "have no document with a 'rationale'"),
        (["answer.by=score", "data.ignore_fields=[relevance]"], "documents[0] has no 'score'"),
        (["answer.by=score"], "carries 'relevance', which answer.by 'score' does not read"),
        (["answer=rationale", "method=dpo"], "method 'dpo' compares orders"),
        (["method={type: sft, swaps: 2}"], "'swaps' has no effect with type 'sft'"),
        (["method={type: dpo, rejected: reversed, pairs: 2}"], "have no effect with rejected 'reversed'"),
        (["adapter={type: prefix}"], "adapter: type 'prefix': trl trains lora, dora, rslora here"),
        (["adapter.target_modules=[lm_head]"], "no layer outside frozen towers ends in 'lm_head'"),
        (["data.train=[{path: nowhere.jsonl}]"], "there is no"),
        (["data.train=[]"], "there is no source"),
        (["training.max_length=512"], "a conversation that is cut loses its answer"),
        (["training.lerning_rate=1"], "did you mean 'learning_rate'?"),
        (["training.beta=0.1"], "unknown key 'beta'"),
        (["training.eval_strategy=steps"], "there is no dev data"),
        (["training.lr_scheduler_type=lineal"], "training: lineal is not a valid SchedulerType"),
        (["training.learning_rate=fast"], "training.learning_rate: found 'fast'; give a number"),
        (["training.per_device_train_batch_size=0"], "give a number above 0"),
        (["training.gradient_accumulation_steps=0"], "give a number above 0"),
        (["training.max_steps=0"], "training.max_steps: found 0"),
        (["training.lr_scheduler_kwargs={a: 1}"], "lr_scheduler_type 'constant' takes no 'a'"),
        (["training.report_to=wandbb"], "did you mean 'wandb'?"),
        (["training.loss_type=nope"], "training.loss_type: there is no 'nope'; known: chunked_nll, dft, nll"),
        (["method=dpo", "training.loss_type=[sigmod]"], "did you mean 'sigmoid'?"),
        (["method=dpo", "training.beta=-1"], "training.beta: found -1"),
        (["training.packing=true"], "it cuts conversations at max_length"),
        (["training.resume_from_checkpoint=x"], "goes on from the last checkpoint of output_dir"),
        (["training.fp16=true"], "training.fp16: half precision on a CPU"),
        (["training.use_liger_kernel=true"], "liger-kernel"),
        (["training.output_dir=/proc/x"], "training.output_dir: /proc/x cannot be written"),
        (["data.train=[{path: texts.jsonl, streaming: true}]"], "unknown key 'data.train.0.streaming'"),
        (["model.name_or_path=nowhere"], "model.name_or_path: cannot load 'nowhere'"),
        (["model.dtype=float8"], "model.dtype: found 'float8'"),
        (["data.train=[{path: reasons.jsonl}]"], "carries 'rationale', which answer 'listwise' does not read"),
    ],
)
def test_what_cannot_be_is_refused(config_file, capsys, overrides, message):
    assert main(["--config", str(config_file), *overrides]) == 2
    assert message in capsys.readouterr().err


def test_backbones_that_cannot_answer_are_refused(config_file, backbone, tmp_path, capsys):
    """No output embedding, no template, and one without the assistant's header: before data and weights."""
    shutil.copytree(backbone, tmp_path / "bare")
    embedder = tmp_path / "bare"
    tensors = load_file(embedder / "model.safetensors")
    from safetensors.torch import save_file

    save_file({name: one for name, one in tensors.items() if "lm_head" not in name}, embedder / "model.safetensors")
    settings = json.loads((embedder / "config.json").read_text())
    settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = False
    (embedder / "config.json").write_text(json.dumps(settings))
    assert main(["--config", str(config_file), f"model.name_or_path={embedder}"]) == 2
    assert "lm_head.weight" in capsys.readouterr().err
    for name, change, message in (
        ("headless", lambda text: text.split("{%- if add_generation_prompt")[0], "leaves no place for an answer"),
        ("mute", None, "has no chat template"),
    ):
        shutil.copytree(backbone, tmp_path / name)
        file = tmp_path / name / "chat_template.jinja"
        if change is None:
            file.unlink()
        else:
            file.write_text(change(file.read_text()))
        assert main(["--config", str(config_file), f"model.name_or_path={tmp_path / name}"]) == 2
        assert message in capsys.readouterr().err


def test_folders_are_told_apart(config_file, tmp_path, backbone, capsys):
    run(config_file, "training.max_steps=1")
    with pytest.raises(CheckpointError, match="answers in words.*load it with ListwiseReranker"):
        Embedder.from_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match="is no reranker that answers in words"):
        ListwiseReranker.from_pretrained(backbone)
    assert main(["--config", str(config_file), f"model.name_or_path={tmp_path / 'out'}"]) == 2
    assert "brings a trained adapter, which goes on; remove the block" in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["zero3"])  # ddp, zero2 and fsdp2 give the same losses, docs/log.md
def test_two_processes_train_as_one(config_file, tmp_path, strategy):
    """By `accelerate launch`, on halves of the same batches; the adapter is saved whole."""
    losses = []
    for name, rows in ((None, 4), (strategy, 2)):
        out = tmp_path / str(name)
        options = [f"training.output_dir={out}", f"training.per_device_train_batch_size={rows}"]
        command = ["--config", str(config_file), *options]
        assert main(command) == 0 if name is None else launch(name, *command, command=RECIPE)
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and len(losses[0]) == 3
    adapters = [load_file(tmp_path / str(name) / "adapter_model.safetensors") for name in (None, strategy)]
    assert {name: one.shape for name, one in adapters[0].items()} == {n: one.shape for n, one in adapters[1].items()}
    assert sorted(ListwiseReranker.from_pretrained(out, device="cpu").rank("bus", DOCUMENTS)) == [0, 1, 2]


@pytest.mark.parametrize(
    "path", sorted(Path("recipes/configs/generative_reranker").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_configs_are_read(path):
    config = load_blocks(GenerativeConfig, path)
    args = training_arguments(
        config.model_copy(update={"training": type(config.training)(**{**config.training.arguments, "bf16": False})})
    )
    assert args.learning_rate <= 1e-3 and args.max_length is None
