"""The store of answers, whatever is cut off its file."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.generators import Answer
from data_tools.synthesis.answers import Answers

texts = st.text(st.characters(blacklist_categories=("Cs",)), max_size=40)
answers = st.lists(
    st.builds(Answer, texts, st.sampled_from(["stop", "length", "refused"]), st.integers(0, 9), st.integers(0, 9)),
    max_size=6,
)


@settings(max_examples=80, deadline=None)
@given(first=answers, second=answers, lost=st.integers(0, 400))
def test_what_is_whole_is_there_and_what_is_cut_off_is_missing(first, second, lost):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "answers.jsonl"
        with Answers(path) as store:
            for number, answer in enumerate(first):
                store.add(f"a{number}", answer)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) - min(lost, len(whole))])
        kept = path.read_bytes().count(b"\n")
        with Answers(path) as store:
            assert [store.get(f"a{number}") for number in range(len(first))] == first[:kept] + [None] * (
                len(first) - kept
            )
            assert len(store) == kept
            for number, answer in enumerate(second):
                store.add(f"b{number}", answer)
        with Answers(path) as store:
            assert [store.get(f"b{number}") for number in range(len(second))] == second
            everything = first[:kept] + second
            assert store.tokens == sum(one.tokens for one in everything)
            assert store.prompt_tokens == sum(one.prompt_tokens for one in everything)
        assert path.read_bytes().count(b"\n") == kept + len(second)


def test_zeros_that_a_power_failure_left_are_passed_over(tmp_path):
    path = tmp_path / "answers.jsonl"
    with Answers(path) as store:
        store.add("a", Answer("one", "stop", 1, 1))
    with path.open("ab") as file:
        file.write(b"\0" * 30 + b"\n")
    with Answers(path) as store:
        assert "a" in store and len(store) == 1
        store.add("b", Answer("two", "stop", 1, 1))
    with Answers(path) as store:
        assert store.get("b") == Answer("two", "stop", 1, 1)


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    store = Answers(tmp_path / "answers.jsonl")
    store.add("a", Answer("one", "stop", 1, 1))
    file = store._file

    class Full:
        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, line):
            file.write(line[:5])  # a part goes
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_file", Full())
    with pytest.raises(OSError, match="No space"):
        store.add("b", Answer("two", "stop", 1, 1))
    assert "b" not in store
    monkeypatch.setattr(store, "_file", file)
    store.add("c", Answer("three", "stop", 1, 1))
    store.close()
    with Answers(tmp_path / "answers.jsonl") as again:
        assert again.get("c") == Answer("three", "stop", 1, 1)
        assert again.get("b") is None and len(again) == 2
