"""Orders as text and over windows: whatever a model writes is an order, and a perfect judge ranks a long list."""

import math
import random
from collections import Counter

import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from mmembed.config.generative import MethodConfig
from mmembed.errors import MmembedError
from mmembed.generation.conversations import draw, worse_orders
from mmembed.generation.orders import best_order, read_order, slide, swapped, window_starts, write_order

ORDERS = st.integers(1, 30).flatmap(lambda count: st.permutations(range(count)))
GRADES = st.lists(st.integers(0, 3).map(float), min_size=2, max_size=12).filter(lambda grades: len(set(grades)) > 1)
NOISE = st.text(alphabet=st.characters(exclude_characters="0123456789[]"), max_size=8)


@given(ORDERS)
def test_what_is_written_is_read(order):
    found = read_order(write_order(order), len(order))
    assert found.places == tuple(order) and found.named == len(order)


@given(st.text() | st.text(alphabet="[]0123456789 ,;>-abc"), st.integers(0, 30))
def test_any_text_is_an_order(text, count):
    found = read_order(text, count)
    assert sorted(found.places) == list(range(count))
    assert 0 <= found.named <= count
    assert list(found.places[found.named :]) == sorted(found.places[found.named :])  # the rest as it was shown


@given(st.integers(1, 20), st.lists(st.integers(-5, 40), max_size=30), st.data())
def test_the_first_of_each_number_in_range_counts(count, numbers, data):
    """Missing, doubled and out of range, with words between."""
    written = "".join(f"{data.draw(NOISE)}[{number}]" for number in numbers)
    wanted = [place for place, _ in Counter(number - 1 for number in numbers if 1 <= number <= count).items()]
    assert list(read_order(written, count).places[: len(wanted)]) == wanted


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("[3] > [1]", (2, 0, 1)),
        ("Of the 3 documents: [2] > [3] > [1]", (1, 2, 0)),  # a number outside of brackets numbers none there
        ("2, 3, 1", (1, 2, 0)),
        ("[2, 1]", (1, 0, 2)),
        ("[2 > 1]", (1, 0, 2)),
        ("[02] > [0] > [4]", (1, 0, 2)),
        ("[" + "9" * 5000 + "] > [3]", (2, 0, 1)),
        ("[٣] > [1]", (0, 1, 2)),  # another script's digits number nothing
        ("", (0, 1, 2)),
    ],
)
def test_texts_of_models(text, places):
    assert read_order(text, 3).places == places


@given(st.lists(st.integers(0, 60), max_size=4), st.integers(2, 9), st.data())
def test_windows_of_a_perfect_judge_find_the_best(counts, size, data):
    """The best `size` - `stride` of each list, as sorting finds them; each list is asked as often as is promised."""
    stride = data.draw(st.integers(1, size - 1))
    generator = random.Random(0)
    quality = [generator.sample(range(1000), count) for count in counts]
    asked = Counter()

    def order(windows):
        for number, places in windows:
            asked[number] += 1
            assert len(places) <= size
        return [
            tuple(sorted(range(len(places)), key=lambda at: -quality[number][places[at]])) for number, places in windows
        ]

    for number, ranked in enumerate(slide(counts, size, stride, order)):
        best = sorted(range(counts[number]), key=lambda place: -quality[number][place])
        assert sorted(ranked) == list(range(counts[number]))
        assert ranked[: size - stride] == best[: size - stride]
        wanted = 0 if counts[number] < 2 else 1 + max(0, math.ceil((counts[number] - size) / stride))
        assert asked[number] == wanted


def test_windows_that_do_not_overlap_are_refused():
    assert window_starts(7, 4, 2) == [3, 1, 0]
    for size, stride in ((4, 4), (4, 0), (1, 1)):
        with pytest.raises(MmembedError, match="stride|window"):
            window_starts(7, size, stride)


def ndcg(order, grades):
    """trec_eval's, of documents listed in this order."""
    judged = {"q": {f"d{place}": int(grade) for place, grade in enumerate(grades)}}
    run = {"q": {f"d{place}": float(-rank) for rank, place in enumerate(order)}}
    return pytrec_eval.RelevanceEvaluator(judged, {"ndcg"}).evaluate(run)["q"]["ndcg"]


@given(GRADES, st.integers(1, 5), st.integers())
def test_rejected_orders_are_worse(grades, swaps, seed):
    best = best_order(grades)
    assert ndcg(best, grades) == pytest.approx(1)
    generator = random.Random(seed)
    seen = ndcg(best, grades)
    for count in range(1, swaps + 1):
        found = ndcg(swapped(best, grades, count, random.Random(seed)), grades)
        assert found <= seen + 1e-9  # each exchange makes it worse, until none is left
        seen = found
    for method in (MethodConfig(type="dpo", swaps=swaps, pairs=3), MethodConfig(type="dpo", rejected="reversed")):
        for worse in worse_orders(best, grades, method, generator):
            assert sorted(worse) == sorted(best) and ndcg(worse, grades) < 1 - 1e-9


@given(GRADES, st.integers(2, 12), st.integers())
def test_a_draw_has_a_best_and_a_worst_one(grades, count, seed):
    drawn = draw(grades, count, random.Random(seed))
    assert len(drawn) == len(set(drawn)) == min(count, len(grades))
    assert max(grades) in (shown := [grades[place] for place in drawn]) and min(grades) in shown


def test_equal_documents_keep_the_order_in_which_they_are_shown():
    assert best_order([1.0, 2.0, 1.0, 2.0, 0.0]) == (1, 3, 0, 2, 4)
