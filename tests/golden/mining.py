"""Cases of rules that choose negatives and records."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_tools.synthesis.stages.multicsr_curate import curate
from mmembed.mining import MINERS, Candidates
from mmembed.mining.mcl import composite
from mmembed.mining.retrieval import retrieve
from mmembed.mining.saha import SelfAware
from tests.golden.case import LOSS, Compared, Entry, equal, golden


@golden("topk-percpos", "rule `percent_of_positive`", trains=False)
def percent_of_positive(entry: Entry) -> Iterator[Compared]:
    """The bar that does not rise above a negative score. The file's loss is the plain product, which does."""
    scores = np.array([entry["inputs"]["neg_scores"]], np.float64)
    positive = np.array([[entry["inputs"]["pos_score"]]])
    count = scores.shape[1]
    percent = 100 * (1 - entry["params"]["percentage_margin"])
    candidates = Candidates.of(np.arange(count)[None], scores, np.array([[count]]), count + 1, positive_scores=positive)
    kept = candidates.rows[MINERS.build({"type": "percent_of_positive", "percent": percent}).keep(candidates)]
    yield equal(LOSS, positive[0, 0] * entry["params"]["percentage_margin"], entry["loss"])
    yield equal("kept", sorted(kept.tolist()), entry["expected"]["kept_abs"])


@golden("saha", "rule `saha`", "self-aware sampling", trains=False)
def saha(entry: Entry) -> Iterator[Compared]:
    """Clusters of the released sampler."""
    queries, documents = (
        np.array(list(entry["inputs"][name].values()), np.float32) for name in ("query_vecs", "cand_vecs")
    )
    names = list(entry["inputs"]["query_vecs"])
    positives = np.array([[list(entry["inputs"]["owner"]).index(f"d{name[1:]}")] for name in names])
    parameters = entry["params"]
    multiple = parameters["first_n_cands"] // parameters["top_k"]
    rule = SelfAware(parameters["top_k"], multiple, labels=parameters["subset"] == "ImageNet_1K")
    assert rule.depth == parameters["pool_size"]
    depth = min(rule.depth, len(documents))
    clusters = rule.clusters(retrieve(queries, documents, positives, depth, similarity="dot", spare=False), queries)
    yield equal(LOSS, len(clusters), entry["loss"])
    expected = entry["expected"]["clusters"]
    yield equal("queries", [one.query for one in clusters], [names.index(one["query"]) for one in expected])
    owners = [names.index(owner) for one in expected for owner in one["neg_owner_queries"]]
    yield equal("owners", [owner for one in clusters for owner in one.owners.tolist()], owners)


@golden("mcl", "`mmembed.mining.mcl.composite`", trains=False)
def mcl(entry: Entry) -> Iterator[Compared]:
    """Composite clusters. Each entry of the file is one sample."""
    stages = list(np.array(entry["inputs"]["stage_labels"]))
    joined = composite(stages, entry["inputs"]["K"])
    yield equal(LOSS, joined.sum(), entry["loss"])
    yield equal("composite", joined.tolist(), entry["expected"]["pseudo_labels"])


@golden("multicsr", "stage `multicsr_curate`", "stage-2 self-curation", trains=False)
def curation(entry: Entry) -> Iterator[Compared]:
    """Which pairs of scores keep a record. The file's loss is how many."""
    lines = entry["params"]["positive_line"], entry["params"]["negative_line"]
    pairs = entry["inputs"]["scores_pos_neg"]
    kept = [place for place, (positive, negative) in enumerate(pairs) if curate(positive, negative, *lines) == "keep"]
    yield equal(LOSS, len(kept), entry["loss"])
    yield equal("kept", kept, entry["expected"]["kept"])
