"""Options of registered components: the constructor's annotations are the schema, values included."""

import inspect

import pytest

from mmembed.data.format_base import FORMATS
from mmembed.errors import ConfigError
from mmembed.losses import LOSSES
from mmembed.objectives import OBJECTIVES, build_objective
from mmembed.objectives.similarity import get_similarity
from mmembed.pooling import POOLINGS
from mmembed.prompts import PROMPTS

OPTIONS = [
    (registry, name, option)
    for registry in (POOLINGS, PROMPTS, LOSSES, OBJECTIVES, FORMATS)
    for name, cls in registry.classes().items()
    for option in inspect.signature(cls).parameters
    if option not in registry.given
]


@pytest.mark.parametrize(
    ("registry", "name", "option"), OPTIONS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_value_of_the_wrong_type_is_refused_with_its_key(registry, name, option):
    """{1: 2} is no string, number, boolean, list, nor a block; a quoted boolean is none either."""
    kind = inspect.signature(registry.classes()[name]).parameters[option].annotation
    for wrong in [{1: 2}, *(["false"] if kind in (bool, "bool") else [])]:
        with pytest.raises(ConfigError, match=rf"{name}\.{option}: found"):
            registry.build({"type": name, option: wrong}, hidden_size=8)


def test_the_options_were_found():
    assert len(OPTIONS) > 30
    assert (POOLINGS, "multi_vector", "dim") in OPTIONS


@pytest.mark.parametrize(
    ("build", "block", "message"),
    [
        (build_objective, {"temperature": {"value": 0.1, "learn": "no"}}, "temperature.learn: found 'no'"),
        (build_objective, {"temperature": float("inf")}, "temperature: found inf"),
        (
            build_objective,
            {"type": "pairs", "loss": "wasserstein"},
            "'wasserstein' compares the rows of several queries",
        ),
        (build_objective, {"type": "pairs", "loss": "distil_kl"}, "'distil_kl' learns from a teacher's 'score'"),
        (build_objective, {"type": "pairs", "loss": "dcl"}, "'dcl' tells positives from negatives only"),
        (build_objective, {"type": "pairs", "loss": "decoupled_softmax"}, "'decoupled_softmax' tells positives from"),
        (
            build_objective,
            {"type": "pairs", "loss": "soft_top_k"},
            "'soft_top_k' tells .* take one of infonce, .*, listnet, pearson, pro, rank_kl, ranknet, or write",
        ),
        (build_objective, {"loss": {"type": "pearson"}}, "'pearson' compares graded pairs .* write {type: pearson}"),
        (build_objective, {"loss": "pro"}, "'pro' compares graded pairs"),
        (build_objective, {"loss": "rank_kl"}, "'rank_kl' compares graded pairs"),
        (build_objective, {"matryoshka": {"dims": ["64", 32]}}, r"matryoshka.dims: found '64' at \['64', 32\]"),
        (build_objective, {"matryoshka": {"dims": [64.5]}}, "matryoshka.dims: found 64.5"),
        (build_objective, {"matryoshka": {"dims": [64, 32], "weights": [0, 1]}}, "matryoshka.weights: found 0"),
        (build_objective, {"matryoshka": {"dims": [64, 32], "weights": [1, -1]}}, "matryoshka.weights: found -1"),
        (build_objective, {"false_negative_margin": float("nan")}, "false_negative_margin: found nan"),
        (build_objective, {"loss": {"infonce": {}}}, "has no 'type'"),
        (POOLINGS.build, {"type": "multi_vector", "dim": 0}, "multi_vector.dim: found 0; .*greater than 0"),
        (POOLINGS.build, {"type": "latent_attention", "num_latents": True}, "num_latents: found True"),
        (POOLINGS.build, {"type": "latent_attention", "variant": "print"}, "variant: .* did you mean 'printed'"),
        (POOLINGS.build, {"type": "mean", "hidden_size": 8}, "unknown option 'hidden_size'; it takes no options"),
        (
            POOLINGS.build,
            {"type": "latent_attention", "variant": "printed", "num_heads": 8},
            "num_heads: 8 has no effect with variant 'printed'",
        ),
        (
            POOLINGS.build,
            {"type": "latent_attention", "variant": "printed", "dim_head": 16},
            "dim_head: 16 has no effect with variant 'printed'",
        ),
        (FORMATS.build, {"type": "labelled", "negatives": -1}, "labelled.negatives: found -1"),
        (FORMATS.build, {"type": "parquet", "negative_columns": "wrong"}, "parquet.negative_columns: found 'wrong'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # an address would differ between workers
)
def test_values_that_cannot_be_meant(build, block, message):
    extra = {"hidden_size": 8} if build == POOLINGS.build else {}
    with pytest.raises(ConfigError, match=message):
        build({"type": "contrastive", **block}, **extra)


def test_what_yaml_writes_is_taken():
    assert build_objective({"type": "contrastive", "false_negative_margin": 1}).false_negative_margin == 1.0
    assert POOLINGS.build({"type": "multi_vector", "dim": None}, hidden_size=8).embedding_size == 8
    FORMATS.build({"type": "beir", "lang": ["en", "fr"]})
    FORMATS.build({"type": "pairs", "at_least": 4})


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (["infonce", {"type": "gram", "temperature": 0}], r"^objective\[1\] 'gram'.temperature: found 0"),
        ([{"type": "supcon", "temperature": 0}], r"^objective\[0\] 'supcon': objectives.supcon.temperature: found 0"),
        (["infonce", "grem"], r"^objective\[1\] 'grem': .*did you mean 'gram'"),
        (
            {"by_task": {"sts": ["pearson", {"type": "pro", "temperature": 0}]}},
            r"^objective.by_task.sts: objective\[1\] 'pro'.temperature: found 0",
        ),
        ({"type": "infonce", "temperature": 0}, "^objective 'infonce'.temperature: found 0"),
        (
            {"type": "pearson", "temperature": float("nan")},
            "^objective 'pearson': objectives.pairs.temperature: found nan",
        ),
        (["infonce", {"type": "rafa", "weight": float("inf")}], r"^objective\[1\].weight: found inf; give a finite"),
        (["infonce", {"type": "rafa", "weight": float("nan")}], r"^objective\[1\].weight: found nan; give a finite"),
        ({"type": "isogclr", "rho": -0.1}, "isogclr.rho: found -0.1; .*greater than or equal to 0"),
        ({"type": "dcl", "similarity": "cosin"}, "^objective 'dcl'.similarity: there is no 'cosin'"),
        ({"type": "rafa", "matryoshka": {"dims": [0]}}, "^objective 'rafa'.matryoshka.dims: found"),
        ({"by_source": {"a": {"type": "dclw", "temperature": 0}}}, "^objective.by_source.a: objective 'dclw'.temp"),
    ],
    ids=str,
)
def test_an_error_names_the_objective_and_the_part_of_a_list(block, message):
    with pytest.raises(ConfigError, match=message):
        build_objective(block)


# objective, the option that has no effect there, values, what makes it act
IDLE = [
    ({"type": "pearson"}, "temperature", [0.1, 0.05, {"learn": True}], {"type": "rank_kl"}),
    ({"type": "pairs"}, "temperature", [0.1, {"value": 0.1, "learn": True}], {"loss": "pro"}),
    ({"type": "prototypes"}, "labels", [3, 8], {"target": "multi_label"}),
    ({"type": "cacr"}, "t_positive", [2, 1], {"views": 3}),
    ({"type": "degla", "text_grounded": 0}, "text_temperature", [0.2, 0.1], {"text_grounded": 0.1}),
]


@pytest.mark.parametrize(("block", "option", "values", "acting"), IDLE, ids=lambda value: str(value)[:30])
def test_an_option_without_effect_is_refused_where_a_config_gives_it(block, option, values, acting):
    """Its value may be the default: who writes it means something. Alone, in a list, and under matryoshka."""
    build_objective(block)
    build_objective({**block, option: None})
    for value in values:
        given = {**block, option: value}
        message = f"{option}: .*has no effect with .*remove"
        with pytest.raises(ConfigError, match=f"^objective.*{block['type']}.*{message}"):
            build_objective(given)
        with pytest.raises(ConfigError, match=rf"^objective\[0\] '{block['type']}'.*{message}"):
            build_objective([given])
        with pytest.raises(ConfigError, match=message):
            build_objective({**given, "matryoshka": {"dims": [8]}})
        build_objective({**given, **acting})


def test_options_that_may_have_no_effect_have_the_defaults_of_their_papers():
    objective = build_objective("degla")
    assert (objective.temperature, objective.text_temperature) == (0.07, 0.1)
    assert build_objective({"type": "cacr", "views": 3}).t_positive == 1
    assert build_objective({"type": "prototypes", "target": "multi_label"}).labels == 8
    assert build_objective("rank_kl").temperature.value == 0.05
    build_objective({"type": "prototypes", "prototypes": 4})  # fewer than the labels that it does not have


@pytest.mark.parametrize("name", ["dcl", "dclw"])
@pytest.mark.parametrize("given", [{}, {"temperature": 0.3, "same_tower_negatives": False}], ids=["defaults", "given"])
def test_dcl_has_the_negatives_and_temperature_of_its_paper_unless_others_are_given(name, given):
    temperature, same_tower = (0.3, False) if given else (0.1, True)
    for block in ({"type": name}, {"type": "contrastive", "loss": {"type": name}}):
        for objective in (
            build_objective({**block, **given}),
            build_objective(["uniformity", {**block, **given}]).parts[1].objective,
        ):
            assert (objective.temperature.value, objective.same_tower_negatives) == (temperature, same_tower)


def test_dcd_compares_cosines_with_the_teachers_scores_at_temperature_1():
    objective = build_objective("dcd")
    assert (objective.temperature.value, objective.similarity, objective.wants_lengths) == (1.0, None, False)
    assert build_objective({"type": "dcd", "temperature": 0.05}).temperature.value == 0.05


@pytest.mark.parametrize("name", ["dse", "margin_mse", "mann_whitney"])
@pytest.mark.parametrize("given", [{}, {"temperature": 0.3, "similarity": "cosine"}], ids=["defaults", "given"])
def test_a_loss_brings_its_papers_options_unless_others_are_given(name, given):
    """By its name and as `loss` of contrastive, as a name and as a block."""
    paper = {"mann_whitney": (0.01, None)}.get(name, (1.0, get_similarity("dot")))
    wanted = (0.3, get_similarity("cosine")) if given else paper
    for block in (
        {"type": name},
        {"type": "contrastive", "loss": name},
        {"type": "contrastive", "loss": {"type": name}},
    ):
        objective = build_objective({**block, **given})
        assert (objective.temperature.value, objective.similarity) == wanted


def test_a_default_of_dot_products_is_no_silent_choice_where_they_cannot_work():
    assert build_objective("dse").many_vectors is False  # which the preflight holds against the pooling
    assert build_objective({"type": "dse", "similarity": "maxsim"}).many_vectors is None
    block = {"type": "margin_mse", "matryoshka": {"dims": [64]}}
    with pytest.raises(ConfigError, match="'margin_mse': matryoshka.dims .* name a similarity"):
        build_objective(block)
    build_objective({**block, "similarity": "cosine"})
