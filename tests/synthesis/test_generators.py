"""What every generator promises, asked of each with a real model: the nano backbone."""

import json
import shutil
import subprocess
import sys

import pytest

from data_tools.generators import GENERATORS, GeneratorDown, Request, RequestFailed, Sampling, transformers
from mmembed.errors import MmembedError
from mmembed.media import MediaStore

SCHEMA = {
    "type": "object",
    "properties": {
        "query": {"type": "string", "maxLength": 30},
        "level": {"type": "integer", "enum": [0, 1, 2, 3]},
        "tags": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["query", "level", "tags"],
    "additionalProperties": False,
}
FOLDERS = {"openai": {"serve": {}}, "transformers": {}, "vllm": {}}


def question(content, schema=None, **sampling):
    messages = ({"role": "user", "content": content},)
    return Request("q", messages, Sampling(**{"max_tokens": 24, "seed": 1, **sampling}), schema)


def about(picture):
    return [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]


def test_no_engine_is_imported_before_it_starts():
    code = "import sys; from data_tools.generators import GENERATORS as g; g.classes(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "data_tools.generators.vllm" in loaded and not {"torch", "transformers", "vllm"} & set(loaded)


def ask(generator, *requests):
    return [future.result(120) for future in [generator.submit(request) for request in requests]]


def test_every_generator_is_tested_here():
    assert set(FOLDERS) == set(GENERATORS.classes())


def test_a_seed_has_one_answer(generator):
    alone = [ask(generator, question(f"a bus {n}", seed=n))[0] for n in range(6)]
    together = ask(generator, *(question(f"a bus {n}", seed=n) for n in (5, 3, 1, 0, 2, 4)))
    assert [together[place] for place in (3, 2, 4, 1, 5, 0)] == alone
    drawn = {answer.text for answer in ask(generator, *(question("a red bus", seed=seed) for seed in range(8)))}
    assert len(drawn) > 3


def test_answers_keep_their_schema(generator):
    for answer in ask(generator, *(question("a bus", SCHEMA, seed=seed, max_tokens=96) for seed in range(6))):
        assert answer.finish == "stop"
        said = json.loads(answer.text)
        assert list(said) == ["query", "level", "tags"] and said["level"] in (0, 1, 2, 3)
        assert isinstance(said["query"], str) and len(said["query"]) <= 30
        assert 1 <= len(said["tags"]) <= 2 and set(said["tags"]) <= {"a", "b"}


def test_an_answer_ends_at_its_length_and_is_counted(generator):
    [answer] = ask(generator, question("a red bus", SCHEMA, max_tokens=5))
    assert (answer.finish, answer.tokens) == ("length", 5) and answer.text.startswith('{"que')
    longer = ask(generator, question("a red bus and a blue car and a green tree"))[0]
    assert longer.prompt_tokens > answer.prompt_tokens > 5


def test_an_answer_ends_before_a_stop(generator):
    [whole] = ask(generator, question("a red bus", SCHEMA, max_tokens=96))
    [cut] = ask(generator, question("a red bus", SCHEMA, max_tokens=96, stop=('"level"', "never so")))
    assert cut.finish == "stop" and cut.text == whole.text[: whole.text.index('"level"')]


def test_pictures_are_seen(generator):
    text, red, noise = ask(
        generator,
        *(question(content, temperature=0.0) for content in ("What is it?", about("red.png"), about("noise.jpg"))),
    )
    assert "image" in generator.reads and red.prompt_tokens > text.prompt_tokens + 8
    assert red.text != noise.text


def test_what_one_request_does_wrong_leaves_the_others(generator):
    wrong = [
        (question(about("half.jpg")), "picture: truncated or damaged"),
        (question(about("../else.png")), "picture: outside the media folders"),
        (question(about("none.png")), "picture: missing"),
        (question("word " * 5000), "rejected"),
        (question("a bus", {"type": "nonsense"}), ""),
    ]
    futures = [generator.submit(request) for request, _ in wrong]
    right = generator.submit(question("a red bus"))
    for future, (_, kind) in zip(futures, wrong, strict=True):
        with pytest.raises(RequestFailed, match=".") as raised:
            future.result(120)
        assert raised.value.kind.startswith(kind)
    assert right.result(120).tokens > 0


def test_many_in_flight_are_not_mixed_up(generator):
    requests = [question(f"number {n}", {"type": "integer", "enum": [n]}, seed=n) for n in range(60)]
    assert generator.capacity >= 8
    assert [json.loads(answer.text) for answer in ask(generator, *requests)] == list(range(60))


@pytest.mark.parametrize("kind", sorted(FOLDERS))
def test_the_fingerprint_is_of_the_weights_and_settings(kind, tmp_path, family_folder):
    def build(folder):
        return GENERATORS.build({"type": kind, "model": str(folder), **FOLDERS[kind]})

    folder = family_folder("qwen3")
    first, again = (build(folder).fingerprint() for _ in range(2))
    assert json.loads(json.dumps(first)) == again == first
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    assert build(other).fingerprint() != first
    with pytest.raises(MmembedError, match="no folder"):
        build(tmp_path / "nowhere").fingerprint()
    assert build("owner/name").fingerprint()[1] == "name:owner/name", "of a hub; the engine finds it, or says so"


def test_what_only_makes_it_faster_is_not_in_the_fingerprint():
    def build(**engine):
        return GENERATORS.build({"type": "vllm", "model": "mmembed-nano", "engine": engine}).fingerprint()

    assert build(max_num_seqs=4) == build(max_num_seqs=8, kv_cache_memory_bytes=1) != build(dtype="float16")


@pytest.mark.parametrize("kind", sorted(FOLDERS))
def test_a_generator_can_be_closed_unstarted_and_twice_and_is_over_then(kind):
    generator = GENERATORS.build({"type": kind, "model": "mmembed-nano", **FOLDERS[kind]})
    with pytest.raises(GeneratorDown, match="not started"):
        generator.submit(question("a"))
    generator.close()
    generator.close()
    with pytest.raises(GeneratorDown, match="closed"):
        generator.submit(question("a"))
    with pytest.raises(GeneratorDown):
        generator.start(MediaStore())


def test_closing_ends_what_waits(store):
    generator = GENERATORS.build({"type": "transformers", "model": "mmembed-nano", "batch_size": 2})
    generator.start(store)
    futures = [generator.submit(question("a red bus", SCHEMA, max_tokens=500, seed=n)) for n in range(20)]
    futures[0].result(120)
    generator.close()
    generator.close()
    with pytest.raises(GeneratorDown, match="closed before the answer came"):
        futures[-1].result(1)
    assert all(future.done() for future in futures)


@pytest.fixture
def strict(family_folder, tmp_path):
    """A model whose chat template takes no system message, as those of Gemma 2 do."""
    folder = shutil.copytree(family_folder("qwen3"), tmp_path / "strict")
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refuses + "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return folder


def test_a_template_that_refuses_one_request_leaves_the_others(strict, store):
    generator = GENERATORS.build({"type": "transformers", "model": str(strict)})
    generator.start(store)
    refused = generator.submit(Request("seven", ({"role": "system", "content": "be brief"},), Sampling(max_tokens=3)))
    right = generator.submit(question("a red bus", max_tokens=3))
    with pytest.raises(RequestFailed, match="seven: TemplateError: no system role") as raised:
        refused.result(60)
    assert raised.value.kind == "rejected by the engine" and right.result(60).tokens <= 3
    generator.close()


def test_a_thread_that_breaks_leaves_no_future_open(store, monkeypatch):
    generator = GENERATORS.build({"type": "transformers", "model": "mmembed-nano", "batch_size": 2})
    monkeypatch.setattr(transformers.Writer, "write", lambda self, batch, stopped: [])  # fewer answers than questions
    generator.start(store)
    for _ in range(2):
        for future in [generator.submit(question("a red bus")) for _ in range(5)]:
            with pytest.raises(GeneratorDown, match="it broke .ValueError"):
                future.result(60)
    generator.close()


def test_a_text_model_refuses_pictures_alone(family_folder, store):
    generator = GENERATORS.build({"type": "transformers", "model": str(family_folder("qwen3"))})
    generator.start(store)
    try:
        with pytest.raises(RequestFailed, match="reads no pictures"):
            ask(generator, question(about("red.png")))
        assert ask(generator, question("a red bus", max_tokens=3))[0].tokens <= 3
    finally:
        generator.close()
