"""Claims: declared data, the rule of the verdicts, and what makes a kept result valid."""

import json
import re
import shlex
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from eval.claims import page, runs
from eval.claims.__main__ import about_runs, main, parse
from eval.claims.declaration import WRITES_RECORDS, Comparison, merged, read_claim, read_claims, with_folders
from eval.claims.measuring import Remembering
from eval.claims.runs import Results, Run, RunFailed, Workers, execute, fusing, planned
from eval.claims.verdicts import FAILS, HOLDS, OPEN, RULE, compare, interval, overall
from eval.vectors import ndcg_by_query
from mmembed.cli import build_parser
from mmembed.config import load_config
from mmembed.config.blocks import EmbedderConfig, RerankerConfig
from mmembed.content import Text
from mmembed.errors import ConfigError, MmembedError
from mmembed.metrics import pooled_auc
from mmembed.objectives import build_objective

CLAIM = """
paper: "A paper, arXiv 0000.00000"
sentence: One thing is better than another.
base: {data: {train: [{path: mbpp, format: beir}]}}
arms:
  one: {objective: {type: infonce, temperature: 0.05}}
  other: {objective: {type: dcl}}
comparisons:
  - {arm: one, than: other, task: mbpp}
"""


def seeds(*numbers):
    return dict(enumerate(numbers))


def outcome(direction, arm, than):
    return compare(Comparison(arm="a", than="b", task="t", direction=direction), seeds(*arm), seeds(*than))


def declared(tmp_path, text=CLAIM):
    path = tmp_path / "thing.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("direction", "arm", "than", "verdict"),
    [
        ("higher", (0.52, 0.53, 0.54), (0.40, 0.42, 0.41), HOLDS),
        ("higher", (0.40, 0.42, 0.41), (0.52, 0.53, 0.54), FAILS),
        ("lower", (0.40, 0.42, 0.41), (0.52, 0.53, 0.54), HOLDS),
        ("lower", (0.52, 0.53, 0.54), (0.40, 0.42, 0.41), FAILS),
        ("higher", (0.5010, 0.5011, 0.5012), (0.5, 0.5, 0.5), FAILS),  # surely higher, by what does not matter
        ("higher", (0.50, 0.56, 0.48), (0.5, 0.5, 0.5), OPEN),
        ("higher", (0.6,), (0.5,), OPEN),
        ("higher", (0.6, 0.6), (0.5, 0.5), OPEN),
        ("higher", (), (0.5,), OPEN),
        ("not_lower", (0.501, 0.502, 0.500), (0.5, 0.5, 0.5), HOLDS),
        ("not_lower", (0.48, 0.481, 0.479), (0.5, 0.5, 0.5), FAILS),
        ("not_lower", (0.48, 0.52, 0.50), (0.5, 0.5, 0.5), OPEN),
    ],
)
def test_verdicts_follow_the_rule(direction, arm, than, verdict):
    assert outcome(direction, arm, than).verdict == verdict


def test_one_seed_has_no_interval_and_says_so():
    found = outcome("higher", (0.6,), (0.5,))
    assert found.low is None and found.reason == "1 seed" and found.difference == pytest.approx(0.1)
    assert outcome("higher", (0.6, 0.6), (0.5, 0.5)).reason == "the seeds all give one number"


def test_interval_is_students_t_of_paired_differences():
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(0)
    arm, than = rng.normal(0.5, 0.1, (2, 6))
    expected = ttest_rel(arm, than).confidence_interval(0.95)
    assert interval(list(arm - than)) == pytest.approx((expected.low, expected.high))


def test_seeds_that_one_arm_lacks_are_left_out():
    comparison = Comparison(arm="a", than="b", task="t")
    found = compare(comparison, {0: 0.6, 2: 0.7, 3: 9.0}, {0: 0.5, 1: -9.0, 2: 0.5})
    assert list(found.arm) == list(found.than) == [0, 2] and found.difference == pytest.approx(0.15)


def test_a_claim_holds_only_where_all_its_comparisons_do():
    assert overall([HOLDS, HOLDS]) == HOLDS
    assert overall([HOLDS, OPEN]) == OPEN and overall([]) == OPEN
    assert overall([HOLDS, OPEN, FAILS]) == FAILS


def test_every_declared_claim_builds_its_arms(tmp_path):
    claims = read_claims()
    assert len(claims) >= 14
    for claim in claims:
        for arm in (arm for arm in claim.arms if claim.made(arm) is None):
            path = tmp_path / f"{claim.name}-{arm}.json"  # JSON is YAML
            path.write_text(json.dumps(claim.config(arm, steps=7, seed=3)))
            kind = RerankerConfig if claim.model == "reranker" else EmbedderConfig
            config = load_config(path, (), kind)
            build_objective(config.objective, 256)
            assert config.training.arguments["seed"] == 3
            assert config.training.arguments.get("max_steps") == (7 if claim.trained else None)


def test_stages_of_declared_claims_are_configs_of_their_commands(tmp_path):
    from data_tools.mining.settings import load_mining, load_scoring

    loads = {
        "mine": load_mining,
        "score": load_scoring,
        "embedder": load_config,
        "reranker": lambda file: load_config(file, (), RerankerConfig),
        "fuse": lambda file: build_parser()[0].parse_args([*fusing(json.loads(file.read_text())), "--output", "x"]),
    }
    seen = set()
    for claim in read_claims():
        for name, stage in claim.stages.items():
            config = with_folders(claim.stage_config(name, 7, 3), {other: tmp_path / other for other in claim.stages})
            config |= {"output": "x"} if stage.command in WRITES_RECORDS else {}
            file = tmp_path / f"{claim.name}-{name}.json"
            file.write_text(json.dumps(config))
            loaded = loads[stage.command](file)
            if stage.command in ("embedder", "reranker"):
                assert loaded.training.arguments["max_steps"] == round(7 * stage.steps)
                assert loaded.training.arguments["seed"] == 3
            seen.add(stage.command)
    assert seen == set(loads)


RERANKERS = """
paper: "A paper, arXiv 0000.00000"
sentence: A reranker helps.
model: reranker
stages:
  mined: {command: mine, config: {sources: [{path: mbpp, format: beir}], negatives: 3}}
  teacher:
    command: reranker
    steps: 2
    config: {objective: sft, data: {root: "{mined}", train: [{path: mbpp.jsonl}]}}
  scored:
    command: score
    config: {root: "{mined}", sources: [{path: mbpp.jsonl}], teacher: {type: reranker, model: "{teacher}"}}
base: {data: {root: "{scored}", train: [{path: mbpp.jsonl}]}}
arms:
  one: {objective: sft}
  other: {objective: {type: ranking, loss: infonce}}
first_stages: {bm25: bm25, taught: "{teacher}"}
depth: 7
comparisons:
  - {arm: one, than: first_stage, candidates: bm25, task: mbpp}
  - {arm: one, than: other, candidates: taught, task: [mbpp]}
"""


def test_stages_are_made_once_and_their_folders_reach_the_commands(tmp_path):
    claim = read_claim(declared(tmp_path, RERANKERS))
    planned_runs = planned([claim], 2, 5, runs.REPOSITORY / "data")
    asked = []

    def command(arguments, log):
        asked.append([str(one) for one in arguments])
        log.write_text("done")
        if "--output" in arguments:
            numbers = {"mbpp@bm25": {"ndcg_at_10": 0.5}, "mbpp@taught": {"ndcg_at_10": 0.25}}
            first = {"mbpp@bm25": {"ndcg_at_10": 0.25}, "mbpp@taught": {"ndcg_at_10": 0.125}}
            output = Path(arguments[arguments.index("--output") + 1])
            output.write_text(json.dumps({"scores": numbers, "first_stage": first}))
            (output.parent / "reranker").mkdir()
        return 0

    results = [execute(run, tmp_path, command) for run in planned_runs]
    modules = [arguments[1] for arguments in asked]
    stages = ["data_tools.mine_negatives", "recipes.train_reranker", "data_tools.score"]
    arm = ["recipes.train_reranker", "eval.claims.measuring"]
    assert modules == [*stages, *arm, *arm, *stages[1:], *arm, *arm], "negatives once, the others once a seed"
    first = yaml.safe_load(Path(asked[3][3]).read_text())
    made = {folder.name.split("-")[0]: folder / "output" for folder in (tmp_path / "stages").iterdir()}
    assert first["data"]["root"].startswith(str(tmp_path / "stages" / "scored-"))
    assert not any(one.startswith("data.root=") for one in asked[3])
    assert "--depth" in asked[4] and "bm25=bm25" in asked[4] and asked[4][asked[4].index("--depth") + 1] == "7"
    assert any(re.fullmatch(rf"taught={tmp_path}/stages/teacher-.*/output", one) for one in asked[4])
    training = yaml.safe_load((made["teacher"].parent / "config.yaml").read_text())
    assert training["training"]["max_steps"] == 10 and training["data"]["root"] == str(made["mined"])
    assert "stages" in results[0]["seconds"] and "stages" not in results[1]["seconds"]
    assert len({run.key for run in planned_runs}) == 4
    kept = {name: {seed: results[2 * seed + place] for seed in (0, 1)} for place, name in enumerate(("one", "other"))}
    first_stage, arms = page.found(claim, kept).outcomes
    assert first_stage.difference == pytest.approx(0.25) and arms.difference == 0
    page.write(tmp_path / "claims.md", [page.found(claim, kept)], [])
    text = (tmp_path / "claims.md").read_text()
    assert "| mbpp of candidates from bm25, ndcg_at_10 | one | 0.5000 | first_stage | 0.2500 | higher |" in text
    assert "| scored | `data_tools.score` | `{root: '{mined}'" in text


def test_a_stage_that_failed_is_made_again(tmp_path):
    claim = read_claim(declared(tmp_path, RERANKERS))
    (run, *_) = planned([claim], 1, 5, runs.REPOSITORY / "data")
    asked = []

    def breaks(arguments, log):
        asked.append(arguments[1])
        log.write_text("no memory")
        return 1 if arguments[1] == "data_tools.score" else 0

    for expected in (stages := ["data_tools.mine_negatives", "recipes.train_reranker", "data_tools.score"], stages[2:]):
        asked.clear()
        with pytest.raises(RunFailed, match="stage scored: exit status 1") as failed:
            execute(run, tmp_path, breaks)
        assert asked == expected and "no memory" in str(failed.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'model: "{teacher}"}',
            'model: "{teachr}"}',
            "stages.scored: no stage 'teachr' is made before it; did you mean",
        ),
        ('root: "{scored}"', 'root: "{scord}"', "base: no stage 'scord' is made before it; did you mean 'scored'"),
        ("bm25: bm25", "bm25: bm52", "first_stages.bm25: 'bm52'; give bm25, mmembed-nano or {stage}"),
        ("candidates: bm25", "candidates: bm52", "candidates 'bm52' of rerankers; did you mean 'bm25'"),
        ("candidates: bm25, ", "", "candidates 'None' of rerankers"),
        ("candidates: bm25", "candidates: bm25, dim: 8", "are of vectors, and rerankers have none"),
        ("model: reranker\n", "model: reranker\ntrained: false\n", "rerankers are measured after training"),
        ("command: score", "command: scor", "stages.scored.command"),
    ],
)
def test_rerankers_and_stages_that_cannot_be_are_refused(tmp_path, old, new, message):
    assert old in RERANKERS
    with pytest.raises(ConfigError, match=r"thing\.yaml") as refused:
        read_claim(declared(tmp_path, RERANKERS.replace(old, new)))
    assert message in str(refused.value)
    with pytest.raises(ConfigError, match="first_stages and depth have no effect on embedders"):
        read_claim(declared(tmp_path, CLAIM + "depth: 3"))
    with pytest.raises(ConfigError, match="than: first_stage are of rerankers"):
        read_claim(declared(tmp_path, CLAIM.replace("than: other", "than: first_stage")))


FUSED = """
paper: "A paper, arXiv 0000.00000"
sentence: Two models are one.
compares_data: true
stages:
  first: {command: embedder, config: {data: {train: [{path: mbpp, format: beir}]}}}
  second: {command: embedder, config: {data: {train: [{path: stsb-en, format: pairs}]}}}
  both: {command: fuse, config: {models: ["{first}", "{second}"], rule: {type: linear, weights: [3, 1]}}}
arms:
  alone: {made: "{first}"}
  fused: {made: "{both}"}
comparisons:
  - {arm: fused, than: alone, task: mbpp}
"""


def test_an_arm_that_stages_made_is_measured_as_it_is(tmp_path):
    """Every seed has its own stages; nothing is trained for such an arm, and its model stays."""
    claim = read_claim(declared(tmp_path, FUSED))
    asked = []

    def command(arguments, log):
        asked.append(list(arguments))
        if "measuring" in arguments[1]:
            Path(arguments[arguments.index("--output") + 1]).write_text('{"scores": {}, "by_query": {}}')
        return 0

    root = runs.REPOSITORY / "data"
    alone, fused, later = (
        Run(claim, "alone", 0, 5, root),
        Run(claim, "fused", 0, 5, root),
        Run(claim, "fused", 1, 5, root),
    )
    assert execute(alone, tmp_path, command)["steps"] == 0
    modules = [arguments[1] for arguments in asked]
    assert modules == ["recipes.train_embedder"] * 2 + ["mmembed", "eval.claims.measuring"]
    outputs = [[one for one in arguments if one.startswith("training.output_dir=")] for arguments in asked[:2]]
    folders = [output.split("=")[1] for (output,) in outputs]
    assert asked[2][2:10] == ["fuse", *folders, "--rule", "linear", "--weights", "3", "1"]
    assert asked[3][asked[3].index("--model") + 1] == folders[0]
    execute(fused, tmp_path, command)
    assert len(asked) == 5 and asked[4][asked[4].index("--model") + 1] == asked[2][asked[2].index("--output") + 1]
    execute(later, tmp_path, command)
    assert len(asked) == 9 and len({alone.key, fused.key, later.key}) == 3
    page.write(tmp_path / "claims.md", [page.found(claim, {})], [])
    assert "fused" in (tmp_path / "claims.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('made: "{first}"', "made: first", "arms.alone: made is the one key"),
        ('made: "{first}"', 'made: "{frist}"', "arms.alone: no stage 'frist' is made before it"),
        ('{made: "{first}"}', '{made: "{first}", pooling: mean}', "arms.alone: made is the one key"),
        (", rule: {type: linear, weights: [3, 1]}", "", "stages.both: a fusion names its models and its rule"),
    ],
)
def test_fusions_that_cannot_be_are_refused(tmp_path, old, new, message):
    assert old in FUSED
    with pytest.raises(ConfigError, match=r"thing\.yaml") as refused:
        read_claim(declared(tmp_path, FUSED.replace(old, new)))
    assert message in str(refused.value)


def test_a_misspelt_claim_names_the_nearest(capsys):
    assert main(["--only", "mw_acu", "--plan"]) == 2
    assert "there is no claim 'mw_acu'; did you mean 'mw_auc'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("than: other", "than: othr", "there is no arm 'othr'; did you mean 'other'"),
        ("task: mbpp}", "task: mbpp, metrik: accuracy}", "comparisons.0.metrik"),
        ("type: dcl}", "type: dcl}, training: {max_grad_norm: 0.1}", "differ in training"),
        ("type: dcl}", "type: dcl}, lengths: {query_max_length: 8}", "differ in lengths"),
        ("type: dcl}", "type: dcl}, data: {train: [{path: odex, format: beir}]}", "differ in data.train"),
        ("type: dcl}", "type: dcl}, data: {train_group_size: 2}", "differ in data,"),
        ("type: dcl}", "type: dcl}, data: {train_group_size: 2, mining: {}}", "differ in data"),
    ],
)
def test_a_claim_that_compares_unlike_things_is_refused(tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=r"thing\.yaml") as refused:
        read_claim(declared(tmp_path, CLAIM.replace(old, new)))
    assert message in str(refused.value)


def test_a_typed_block_is_taken_as_a_whole():
    base = {"objective": {"type": "a", "x": 1}, "data": {"root": "r", "train": [1]}}
    assert merged(base, {"objective": {"type": "b"}, "data": {"train": [2]}}) == {
        "objective": {"type": "b"},
        "data": {"root": "r", "train": [2]},
    }
    assert merged({"pooling": "mean"}, {"pooling": {"type": "latent"}}) == {"pooling": {"type": "latent"}}


@pytest.fixture
def one_run(tmp_path):
    return planned([read_claim(declared(tmp_path))], seeds=1, steps=2, root=runs.REPOSITORY / "data")[0]


def test_a_result_is_valid_while_config_code_and_data_agree(one_run, tmp_path, monkeypatch):
    def is_kept(run, **options):
        return Results(tmp_path, **options).of(run) is not None

    assert not is_kept(one_run)
    path = one_run.result(tmp_path)
    path.parent.mkdir()
    path.write_text(json.dumps({"key": one_run.key, "code": runs.code_digest()}))
    assert is_kept(one_run)
    longer = replace(one_run, budget=3)
    assert not is_kept(longer)
    monkeypatch.setattr(runs, "fingerprint", lambda folder: "other data")
    assert not is_kept(replace(one_run))
    monkeypatch.undo()
    monkeypatch.setattr(runs, "code_digest", lambda: "other code")
    assert not is_kept(one_run) and is_kept(one_run, any_code=True)
    assert not is_kept(longer, any_code=True)


def test_results_beside_a_page_count_and_those_of_this_code_first(one_run, tmp_path, monkeypatch):
    shipped = tmp_path / "results.jsonl"
    same = {"claim": "thing", "arm": one_run.arm, "seed": one_run.seed, "key": one_run.key}
    lines = [{**same, "code": "older"}, {**same, "code": runs.code_digest()}, {**same, "key": "of another config"}]
    shipped.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Results(tmp_path, shipped).of(one_run) == lines[1]
    assert Results(tmp_path, shipped, any_code=True).of(one_run) == lines[1]
    monkeypatch.setattr(runs, "code_digest", lambda: "newer")
    assert Results(tmp_path, shipped).of(one_run) is None
    assert Results(tmp_path, shipped, any_code=True).of(one_run) == lines[0]


def test_numbers_of_code_that_changed_meanwhile_are_no_result(one_run, tmp_path, monkeypatch):
    source = tmp_path / "module.py"
    source.write_text("before")
    monkeypatch.setattr("eval.files.REPOSITORY", tmp_path)
    monkeypatch.setattr(runs, "CODE", ("module.py",))
    runs.code_digest.cache_clear()
    try:
        with pytest.raises(RunFailed, match="the code changed while it ran"):
            execute(one_run, tmp_path, lambda *_: source.write_text("after") * 0)
    finally:
        runs.code_digest.cache_clear()
    assert Results(tmp_path).of(one_run) is None


def test_arms_that_are_one_config_are_one_result(one_run, tmp_path):
    elsewhere = one_run.claim.model_copy(update={"name": "another", "arms": {"same": one_run.claim.arms["one"]}})
    same = Run(elsewhere, "same", one_run.seed, one_run.steps, one_run.data_root)
    assert same.result(tmp_path) == one_run.result(tmp_path) and same.folder(tmp_path) != one_run.folder(tmp_path)
    asked = []
    workers = Workers(2, tmp_path)
    log_of = one_run.folder(tmp_path) / "training.log"

    def breaks(arguments, log):
        log.write_text("it broke")
        asked.append(log)
        return 1

    workers.command = breaks
    with workers:
        ((run, outcome),) = workers.finished([one_run, same])
    assert run is one_run and asked == [log_of] and "it broke" in str(outcome)


def test_commands_end_with_their_workers(tmp_path):
    sleeper = ["-c", "import time; print('up', flush=True); time.sleep(600)"]
    log, statuses = tmp_path / "log", []
    with Workers(1, tmp_path) as workers:
        thread = threading.Thread(target=lambda: statuses.append(workers.command(sleeper, log)))
        thread.start()
        while not (log.exists() and log.read_text()):
            time.sleep(0.01)
    thread.join(30)
    assert statuses == [-signal.SIGKILL]
    assert workers.command(sleeper, log) == -signal.SIGKILL  # nothing starts any more


def test_a_claim_about_data_may_train_its_arms_on_different_sets(tmp_path):
    other = CLAIM.replace("type: dcl}", "type: dcl}, data: {train: [{path: odex, format: beir}]}")
    claim = read_claim(declared(tmp_path, "compares_data: true" + other))
    assert [claim.config(arm, 1, 0)["data"]["train"][0]["path"] for arm in claim.arms] == ["mbpp", "odex"]
    with pytest.raises(ConfigError, match="differ in lengths"):
        longer = other.replace("objective: {type: dcl", "lengths: {query_max_length: 8}, objective: {type: dcl")
        read_claim(declared(tmp_path, "compares_data: true" + longer))


def test_what_only_the_repository_ships_is_read_there(tmp_path):
    root = tmp_path / "root"
    (root / "mbpp").mkdir(parents=True)
    config = {"data": {"train": [{"path": "mbpp"}, {"path": "odex/corpus.jsonl"}], "train_group_size": 2}}
    shipped = runs.REPOSITORY / "data"
    paths = [source["path"] for source in runs.placed(config, root)["data"]["train"]]
    assert paths == [str(root / "mbpp"), str(shipped / "odex/corpus.jsonl")]
    made = {"data": {"root": "made", "train": [{"path": "odex"}]}}
    assert runs.placed(made, root) == made, "what a stage made is there"


def test_steps_follow_the_claim(tmp_path):
    claim = read_claim(declared(tmp_path, "steps: 2.5" + CLAIM))
    assert {run.steps for run in planned([claim], 1, 10, tmp_path)} == {25}


def test_a_claim_that_needs_more_data_is_left_out_or_refused(capsys):
    assert main(["--only", "sycl_wasserstein", "--plan"]) == 2
    refused = capsys.readouterr().err
    assert "says nothing on 8 train queries of dbpedia-entity: it needs 200" in refused and "--data-root" in refused
    assert main(["--plan"]) == 0
    shown = capsys.readouterr().out
    assert "left out: claim 'sycl_wasserstein'" in shown and "3 seeds x wasserstein" not in shown


def test_several_tasks_are_their_mean():
    comparison = Comparison(arm="a", than="b", task=["x", "y"], metric="m", dim=8)
    result = {"claim": "c", "scores": {"x@8": {"m": 0.2}, "y@8": {"m": 0.5}, "x": {"m": 9}, "y": {"m": 9}}}
    assert runs.value(result, comparison) == pytest.approx(0.35)
    assert Comparison(arm="a", than="b", task="x").scores == ("x",)


def test_what_is_not_trained_has_an_interval_over_queries(tmp_path):
    claim = read_claim(declared(tmp_path, "trained: false" + CLAIM))
    rng = np.random.default_rng(0)
    queries = {"one": rng.uniform(0.4, 1.0, 200), "other": rng.uniform(0.0, 0.6, 200)}
    results = {
        arm: {0: {"scores": {"mbpp": {"ndcg_at_10": values.mean()}}, "by_query": {"mbpp": list(values)}}}
        for arm, values in queries.items()
    }
    (outcome,) = page.found(claim, results).outcomes
    assert outcome.low < outcome.difference < outcome.high and outcome.verdict == HOLDS
    (outcome,) = page.found(claim, {"one": results["one"]}).outcomes
    assert outcome.low is None and outcome.reason == "0 seeds"


def test_equal_texts_are_encoded_once_and_cut_as_encode_cuts():
    from mmembed import Embedder

    embedder = Embedder.from_pretrained("mmembed-nano")
    asked = []

    def encode(contents, *, role, instruction):
        asked.append(len(contents))
        return embedder.encode(contents, role=role, instruction=instruction)

    remembering = Remembering(SimpleNamespace(encode=encode, similarity=embedder.similarity))
    contents = [(Text("a red fox"),), (Text("a blue bird"),), (Text("a red fox"),)]
    whole = remembering.encode(contents, role="query", instruction=None)
    assert np.array_equal(whole, embedder.encode(contents, role="query"))
    remembering.dim = 16
    cut = remembering.encode(contents, role="query", instruction=None)
    assert np.allclose(cut, embedder.encode(contents, role="query", truncate_dim=16), atol=1e-6)
    assert asked == [2]
    remembering.encode(contents, role="document", instruction=None)
    assert asked == [2, 2]  # another role is another text


def test_ndcg_by_query_agrees_with_pytrec_eval():
    import pytrec_eval

    rng = np.random.default_rng(0)
    values, relevance = rng.normal(size=(9, 40)), (rng.random((9, 40)) < 0.1) * rng.integers(1, 3, (9, 40))
    relevance[:, 0] = 1
    qrels = {str(q): {str(d): int(relevance[q, d]) for d in range(40) if relevance[q, d]} for q in range(9)}
    run = {str(q): {str(d): float(values[q, d]) for d in range(40)} for q in range(9)}
    judged = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    assert ndcg_by_query(values, relevance) == pytest.approx([judged[str(q)]["ndcg_cut_10"] for q in range(9)])


def test_runs_come_seed_by_seed_and_an_untrained_claim_once(tmp_path):
    claim = read_claim(declared(tmp_path))
    order = [(run.seed, run.arm) for run in planned([claim], 2, 5, tmp_path)]
    assert order == [(0, "one"), (0, "other"), (1, "one"), (1, "other")]
    still = claim.model_copy(update={"trained": False})
    assert [(run.seed, run.steps) for run in planned([still], 3, 5, tmp_path)] == [(0, 0), (0, 0)]


def test_a_missing_data_set_is_named(tmp_path, capsys):
    (tmp_path / "mbpp").mkdir()
    assert main(["--only", "mw_auc", "--plan", "--data-root", str(tmp_path)]) == 2
    assert "claim 'mw_auc' is measured on odex, openstax-glossary, whose folder" in capsys.readouterr().err


def test_the_page_without_runs_has_no_numbers(tmp_path):
    page.write(tmp_path / "claims.md", [page.found(claim, {}) for claim in read_claims()], ["- Command"])
    text = (tmp_path / "claims.md").read_text()
    assert "No run was made yet" in text and "- Command" not in text and "mw_auc" in text
    assert not (tmp_path / "claims").exists()


def test_the_page_shows_means_interval_verdict_and_plot(tmp_path):
    claim = read_claim(declared(tmp_path))
    numbers = {"one": (0.5, 0.6, 0.55), "other": (0.3, 0.41, 0.36)}
    results = {
        arm: {
            seed: {
                "claim": "thing",
                "key": f"{arm}-{seed}",
                "code": "c0de",
                "arm": arm,
                "steps": 9 if arm == "one" else 36,
                "data": {"mbpp": "da7a"},
                "seconds": {"training": 1800},
                "scores": {"mbpp": {"ndcg_at_10": number}},
            }
            for seed, number in enumerate(values)
        }
        for arm, values in numbers.items()
    }
    waiting = page.found(read_claim(declared(tmp_path, CLAIM.replace("mbpp", "odex"))), {})
    page.write(tmp_path / "claims.md", [page.found(claim, results), waiting], ["- Command: `x`"])
    text = (tmp_path / "claims.md").read_text()
    low, high = interval([0.2, 0.19, 0.19])
    assert "| mbpp, ndcg_at_10 | one | 0.5500 | other | 0.3567 | higher |" in text
    assert f"+0.1933 ({low:+.4f} to {high:+.4f}) | 3 | holds" in text
    assert "## Declared, not measured" in text and "- `thing` (A paper, arXiv 0000.00000), one, other: One" in text
    assert "6 runs, 3.0 hours" in text and "- Code c0de: thing." in text and "- Command: `x`" in text
    assert "- Seeds 0, 1, 2; 9 to 36 steps a run.\n- Data: mbpp da7a.\n" in text  # of what is on the page
    assert (tmp_path / "claims" / "thing.svg").read_text().count("<circle") == 6
    assert len((tmp_path / "claims" / "results.jsonl").read_text().splitlines()) == 6


def test_pooled_auc_agrees_with_sklearn_on_the_pool():
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 12, (7, 30)) / 4  # ties
    relevance = (rng.random((7, 30)) < 0.1) * rng.integers(1, 3, (7, 30))
    valid = rng.random((7, 30)) < 0.8
    for k in (1, 5, 500):
        values, labels = [], []
        for row in range(7):
            places = [place for place in range(30) if valid[row, place]]
            found = [scores[row, place] for place in places if relevance[row, place] > 0]
            wrong = sorted((scores[row, place] for place in places if relevance[row, place] == 0), reverse=True)[:k]
            values += found + wrong
            labels += [1] * len(found) + [0] * len(wrong)
        assert pooled_auc(scores, relevance, k, valid) == pytest.approx(roc_auc_score(labels, values))


def test_pooled_auc_sees_a_shift_between_queries_and_refuses_nothing_to_compare():
    scores, relevance = np.array([[2.0, 1.0], [6.0, 5.0]]), [[1, 0], [1, 0]]
    assert pooled_auc(scores, relevance) == 0.75  # in each query it is 1
    assert np.isnan(pooled_auc(scores, [[0, 0], [0, 0]]))
    with pytest.raises(MmembedError, match="k is 0"):
        pooled_auc(scores, relevance, k=0)


def test_the_shipped_page_follows_the_rule_in_force_and_has_the_steps_of_its_results():
    shipped = runs.REPOSITORY / "docs" / "claims.md"
    text = shipped.read_text()
    assert f"## The rule of the verdicts\n\n{RULE}\n" in text
    results = [json.loads(line) for line in page.results_beside(shipped).read_text().splitlines()]
    steps = {result["steps"] for result in results if result["steps"]}
    said = " to ".join(str(bound) for bound in sorted({min(steps), max(steps)}))
    assert f"; {said} steps a run.\n" in text


def test_the_command_of_the_page_can_be_given_again_and_says_what_data_is(tmp_path):
    for given, explained in (([], False), (["--data-root", str(tmp_path)], True)):
        line, *_ = about_runs(parse(["--budget", "5", *given]))
        command, rest = re.fullmatch(r"- Command: `(.*?)`(.*)", line).groups()
        module, *arguments = shlex.split(command.removeprefix("python -m "))
        assert module == "eval.claims" and parse(arguments).budget == 5
        assert ("DATA stands for a folder" in rest) is explained is ("DATA" in arguments)
