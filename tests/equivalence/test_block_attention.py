"""A list read in blocks is what transformers' own eager attention gives under a mask that is written out by loops."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from families import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmembed.backbones.block_attention import Blocks, Part, attend_blocks, document_shares, read_logits
from mmembed.backbones.output_embedding import load_output_embedding
from mmembed.backbones.shared_prefix import masked_attention
from mmembed.config.blocks import SourceConfig
from mmembed.content import Document, Example, Image, Text
from mmembed.data.collate import Collator, plan_chunks
from mmembed.errors import ConfigError, MmembedError
from mmembed.inference.answering import answer
from mmembed.inference.cpu import accelerate
from mmembed.inference.lists import divided, read_list
from mmembed.inference.reranker import Reranker
from mmembed.objectives import build_objective
from mmembed.preprocess import Item, Place
from mmembed.training.gradcache import contrastive_step
from tests.equivalence.layouts import FULL, LORA, built
from tests.equivalence.toy import gradients, relative

OFFSET = 1024
HEAD = {"type": "attention", "layer": 2, "offset": OFFSET}
QUERY = "a question about the old town"
TEXTS = ("the town is old", "a red bus " * 6, "no", "photosynthesis turns sunlight into sugar " * 3)
FAMILIES = ["qwen3", "llama", "mistral", "qwen2", "qwen3_vl"]
BUDGETS = [1, 50, 110, 10**6]  # 1: a document at a time


def reads_lists(folder, head=HEAD, **options):
    options = {"prompt": "in_context", "pooling": "last_token", "normalize": False, "adapter": FULL} | options
    return built(folder, head=head, **options)


def without_window(family_folder, name, tmp_path):
    """Mistral as since version 0.2: without the window of the tests' own."""
    folder = family_folder(name)
    if name == "mistral":
        folder = shutil.copytree(folder, tmp_path / "mistral")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    return folder


def wider(inputs, columns):
    """With so many columns of padding more."""
    tensors = {name: torch.nn.functional.pad(one, (0, columns)) for name, one in inputs.tensors.items()}
    return replace(inputs, tensors=tensors, pool_mask=torch.nn.functional.pad(inputs.pool_mask, (0, columns)))


def listed(documents, query=QUERY, answer=None):
    places = (Place(0, number, answer) for number in range(1, len(documents) + 1))
    contents = [(Text(one),) if isinstance(one, str) else one for one in documents]
    return [Item((Text(query),), "query", None, one, place) for one, place in zip(contents, places, strict=True)]


def by_loops(model, inputs):
    """Hidden states and the attention of the layer that is read, of transformers' eager attention: (N,) shares."""
    prefix, tail = inputs.shared, inputs.tail
    ids, real = inputs.tensors["input_ids"], inputs.pool_mask
    tokens = [(0, place, ids[0, place].item()) for place in range(prefix)]  # block, position, token
    for row in range(len(ids)):
        own = range(prefix, int(real[row].sum()))
        tokens += [(row + 1, place, ids[row, place].item()) for place in own]
    last = len(ids) + 1
    tokens += [(last, OFFSET + place, token) for place, token in enumerate(tail.ids)]
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for query, (of_query, _, _) in enumerate(tokens):
        for key, (of_key, _, _) in enumerate(tokens[: query + 1]):
            seen[query, key] = of_key == of_query or of_key == 0 or of_query == last
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    base = model.base
    decoder = getattr(base, "language_model", base)
    implementation = decoder.config._attn_implementation
    decoder.config._attn_implementation_internal = "eager"
    positions = torch.tensor([[place for _, place, _ in tokens]])
    try:
        output = decoder(
            input_ids=torch.tensor([[token for _, _, token in tokens]]),
            position_ids=positions if decoder is base else positions.expand(3, 1, -1),
            attention_mask=mask,
            output_attentions=True,
            use_cache=False,
        )
    finally:
        decoder.config._attn_implementation_internal = implementation
    blocks = torch.tensor([block for block, _, _ in tokens])
    weights = output.attentions[HEAD["layer"] - 1][0]  # (H, S, S)
    rows = weights[:, [len(tokens) - len(tail.ids) + place for place in tail.signals]]  # (H, R, S)
    among = rows[:, :, (blocks > 0) & (blocks < last)]
    among = among / among.sum(-1, keepdim=True)  # a softmax over all tokens, of documents alone
    of_documents = blocks[(blocks > 0) & (blocks < last)]
    shares = [among[:, :, of_documents == number].sum(-1).mean() for number in range(1, last)]
    return torch.stack(shares), output.last_hidden_state[0], blocks


@pytest.mark.parametrize("name", FAMILIES)
def test_families(family_folder, name, tmp_path):
    model, preprocessor = reads_lists(without_window(family_folder, name, tmp_path))
    inputs = preprocessor(listed(TEXTS))
    expected, hidden, blocks = by_loops(model, inputs)
    found = model(inputs).vectors[:, 0]
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert found.sum().item() == pytest.approx(1) and found.std() > 0
    _, whole = model.run_list(dict(inputs.tensors, attention_mask=None), inputs.pool_mask, inputs)
    length = inputs.tensors["input_ids"].shape[1] - inputs.shared
    own = whole[0, inputs.shared : -len(inputs.tail.ids)].unflatten(0, (len(TEXTS), length))
    for number in range(len(TEXTS)):
        of_document = hidden[blocks == number + 1]
        torch.testing.assert_close(own[number, : len(of_document)], of_document, atol=2e-5, rtol=0)
    torch.testing.assert_close(whole[0, -len(inputs.tail.ids) :], hidden[blocks == blocks.max()], atol=2e-5, rtol=0)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_padding_and_other_documents_do_not_matter(family_folder, data):
    model, preprocessor = reads_lists(family_folder("qwen3"))
    words = st.text("abcdefg ", min_size=1, max_size=40).filter(str.strip)
    documents = data.draw(st.lists(words, min_size=2, max_size=6))
    inputs = preprocessor(listed(documents))
    shares = model(inputs).vectors[:, 0]
    left = preprocessor(listed(documents), padding_side="left")
    torch.testing.assert_close(model(left).vectors[:, 0], shares, atol=1e-6, rtol=0)
    padded = wider(inputs, data.draw(st.integers(1, 30)))
    torch.testing.assert_close(model(padded).vectors[:, 0], shares, atol=1e-6, rtol=0)

    others = [documents[0], *data.draw(st.lists(words, min_size=1, max_size=6))]
    states = []
    for some in (documents, others):
        given_ = preprocessor(listed(some))
        _, hidden = model.run_list(dict(given_.tensors), given_.pool_mask, given_)
        own = int(given_.pool_mask[0].sum()) - given_.shared
        states.append(hidden[0, given_.shared : given_.shared + own])
    torch.testing.assert_close(*states, atol=1e-5, rtol=0)


def test_the_order_of_documents_is_only_in_their_numbers(family_folder):
    """Documents stand at the same positions: with the same numbers their places make no difference."""
    model, preprocessor = reads_lists(family_folder("qwen3"))
    items = listed(TEXTS)
    turned = [*items[2:], *items[:2]]
    shares, other = model(preprocessor(items)).vectors[:, 0], model(preprocessor(turned)).vectors[:, 0]
    torch.testing.assert_close(other, torch.cat([shares[2:], shares[:2]]), atol=1e-6, rtol=0)


def test_pictures(family_folder):
    model, preprocessor = reads_lists(family_folder("qwen3_vl"))
    contents = [(Image(picture()),), "a red bus", (Text("seen:"), Image(picture(80, 40))), "no"]
    shares = model(preprocessor(listed(contents))).vectors[:, 0]
    assert shares.shape == (4,) and shares.sum().item() == pytest.approx(1)
    turned = [2, 0, 3, 1]
    items = listed(contents)
    again = model(preprocessor([items[one] for one in turned])).vectors[:, 0]
    torch.testing.assert_close(again, shares[turned], atol=1e-5, rtol=0)
    for budget in BUDGETS:
        torch.testing.assert_close(read_list(model, preprocessor(items), budget).shares, shares, atol=1e-5, rtol=0)
    with pytest.raises(MmembedError, match="give a query of text"):
        preprocessor([replace(items[0], content=(Image(picture()),))])

    texts = listed(TEXTS)
    plain = model(preprocessor(texts)).vectors
    preprocessor.touch_vision = True  # a dummy document with a picture, that no block may see
    inputs = preprocessor(texts)
    assert inputs.filler == 1 and len(inputs.pool_mask) == 5
    torch.testing.assert_close(model(inputs).vectors, plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(read_list(model, inputs, 1).shares, plain[:, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_of_any_size(family_folder, name, tmp_path):
    """A list that is read in parts is the list in one sequence."""
    model, preprocessor = reads_lists(without_window(family_folder, name, tmp_path))
    items = listed([f"{text} {number}" for number in range(3) for text in TEXTS])
    inputs = preprocessor(items)
    with torch.no_grad():
        expected, hidden, blocks = by_loops(model, inputs)
    last = hidden[blocks == blocks.max()]
    for budget in BUDGETS:
        for given_ in (inputs, preprocessor(items, padding_side="left"), wider(inputs, 21)):
            read = read_list(model, given_, budget)
            assert read.hidden is None
            torch.testing.assert_close(read.shares, expected, atol=2e-6, rtol=0)
        whole = read_list(model, inputs, budget, to_the_end=True)
        torch.testing.assert_close(whole.shares, expected, atol=2e-6, rtol=0)
        torch.testing.assert_close(whole.hidden[0], last, atol=2e-5, rtol=0)
        assert {tuple(one.shape[1:3]) for layer in whole.attended for one in layer} == {
            (model.config.num_key_value_heads, len(blocks))
        }, "no padding"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_with_faster_kernels(family_folder, dtype):
    model, preprocessor = reads_lists(family_folder("qwen3"))
    inputs = preprocessor(listed([f"{text} {number}" for number in range(3) for text in TEXTS]))
    expected = model(inputs).vectors[:, 0].detach()
    model.backbone.to(dtype)
    accelerate(model.backbone)
    for budget in BUDGETS:
        found = read_list(model, inputs, budget).shares
        tolerance = 2e-6 if dtype == torch.float32 else 0.03 * float(expected.max())
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_a_reranker_reads_in_parts(family_folder):
    """Lists of several queries, on threads of their own or not, whatever the budget."""
    reranker = Reranker(*reads_lists(family_folder("qwen3")))
    pairs = [(f"{QUERY} {number}", f"{text} {place}") for place in range(2) for text in TEXTS for number in range(3)]
    expected = reranker.score(pairs, token_budget=10**6)
    for budget in (None, 1, 60):
        torch.testing.assert_close(
            torch.from_numpy(reranker.score(pairs, token_budget=budget)), torch.from_numpy(expected), atol=2e-6, rtol=0
        )


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=20), budget=st.integers(1, 100))
def test_every_document_is_in_one_part(lengths, budget):
    parts = [part.tolist() for part in divided(torch.tensor(lengths), budget)]
    assert sorted(one for part in parts for one in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[one] for one in part) <= budget


@pytest.mark.parametrize("name", ["qwen3", "qwen3_vl"])
def test_decoding_is_greedy(family_folder, name):
    """Each token is the best one behind the list and those before it, computed anew without a cache."""
    folder = family_folder(name)
    model, preprocessor = reads_lists(folder)
    model.output_embedding = load_output_embedding(model.family, str(folder), None, torch.float32, "answer")
    weight = model.output_embedding.weight
    weight = model.base.get_input_embeddings().weight if weight is None else weight
    inputs = preprocessor(listed(TEXTS))
    text, shares = answer(model, inputs, preprocessor.tokenizer, 6)
    torch.testing.assert_close(shares, model(inputs).vectors[:, 0], atol=1e-6, rtol=0)
    written: list[int] = []
    with torch.no_grad():
        while len(written) < 6 and "]" not in preprocessor.tokenizer.decode(written):
            longer = replace(inputs, tail=replace(inputs.tail, ids=(*inputs.tail.ids, *written)))
            _, hidden, _ = by_loops(model, longer)
            written.append(int((weight @ hidden[-1]).argmax()))
            if written[-1] == preprocessor.tokenizer.eos_token_id:
                break
    assert text == preprocessor.tokenizer.decode(written).split("]")[0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_same(family_folder):
    folder = family_folder("qwen3")
    plain, preprocessor = reads_lists(folder)
    flex, _ = reads_lists(folder, head={**HEAD, "kernel": "flex"})
    inputs = preprocessor(listed(TEXTS))
    with torch.no_grad():
        _, expected = plain.run_list(dict(inputs.tensors), inputs.pool_mask, inputs)
        _, found = flex.run_list(dict(inputs.tensors), inputs.pool_mask, inputs)
        real = torch.cat(
            [
                torch.ones(inputs.shared, dtype=torch.bool),
                inputs.pool_mask[:, inputs.shared :].flatten(),
                torch.ones(len(inputs.tail.ids), dtype=torch.bool),
            ]
        )
        torch.testing.assert_close(found[0, real], expected[0, real], atol=2e-5, rtol=0)
        torch.testing.assert_close(flex(inputs).vectors, plain(inputs).vectors, atol=1e-6, rtol=0)


def test_reading_stops_at_its_layer(family_folder, monkeypatch):
    model, preprocessor = reads_lists(family_folder("qwen3"), head={**HEAD, "layer": 1})
    inputs = preprocessor(listed(TEXTS))
    passes = []
    note = Part.note

    def noting(part, layer, query, *rest):
        passes.append((layer, query.shape[2]))
        note(part, layer, query, *rest)

    monkeypatch.setattr(Part, "note", noting)
    budget = 60
    read = read_list(model, inputs, budget)
    assert {layer for layer, _ in passes} == {0} and read.hidden is None, "the first layer's keys are enough"
    own = inputs.pool_mask[:, inputs.shared :].sum()
    *documents, last = (tokens for _, tokens in passes)
    assert max(documents) <= budget and own <= sum(documents) < len(inputs) * budget and last == len(inputs.tail.ids)
    passes.clear()
    read_list(model, inputs, budget, to_the_end=True)
    assert {layer for layer, _ in passes} == {0, 1}


def example(index):
    good, *bad = (f"an answer {index} " * (1 + index), "no " * (1 + 2 * index), f"the bus {index}", "a town")
    return Example(
        (Text(f"a question about {index}"),),
        (Document((Text(good),)), *(Document((Text(one),), 0.0) for one in bad)),
        source="s",
        where=str(index),
    )


def collator(preprocessor, **options):
    source = SourceConfig(path="s", name="s")
    return Collator(preprocessor, {"s": source}, 10**6, train_group_size=4, judges=True, share_prefix=True, **options)


BOTH = [{"type": "answer"}, {"type": "ranking", "loss": "infonce", "temperature": 0.05, "weight": 0.5}]


@pytest.mark.parametrize("adapter", [FULL, LORA])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(family_folder, adapter, checkpointing):
    """Of chunks, with and without recomputed activations, against both losses written out on the whole batch."""
    folder = family_folder("qwen3")
    model, preprocessor = reads_lists(folder, adapter=adapter)
    model.output_embedding = load_output_embedding(model.family, str(folder), None, torch.float32, "answer")
    for name, one in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one, std=0.1)
    batch = collator(preprocessor, predicted={"s": {"document"}})([example(index) for index in range(3)])
    assert len(batch.chunks) == 3 and all(chunk.shared for chunk in batch.chunks)

    losses, nlls, tokens = [], [], 0
    weight = model.output_embedding.weight
    weight = model.base.get_input_embeddings().weight if weight is None else weight
    for chunk in batch.chunks:
        inputs = chunk.inputs(preprocessor)
        shares, hidden, _ = by_loops(model, inputs)
        relevance = batch.labels.relevance[[batch.place[3:].tolist().index(one) for one in chunk.index.tolist()]]
        logits = shares / 0.05
        losses.append(logits.logsumexp(0) - logits[relevance > 0].logsumexp(0))
        told = inputs.tail.predicted
        assert preprocessor.tokenizer.decode(inputs.tail.ids[-told:]).rstrip().endswith("]")
        nlls.append(torch.nn.functional.cross_entropy(
            hidden[-told - 1 : -1] @ weight.T, torch.tensor(inputs.tail.ids[-told:]), reduction="sum"
        ))  # fmt: skip
        tokens += told
    expected = sum(nlls) / tokens + 0.5 * sum(losses) / 3
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    objective = build_objective(BOTH, model.embedding_size, model.depth)
    loss, _ = contrastive_step(lambda chunk: model(chunk.inputs(preprocessor)), objective, batch, keep_tokens=0)
    assert loss.item() == pytest.approx(expected.item(), abs=2e-5)
    assert relative(gradients(model), wanted) < 2e-4


def test_answers_and_orders(family_folder):
    """The relevant document is not always the first, and the answer names it."""
    _, preprocessor = reads_lists(family_folder("qwen3"))
    make = collator(preprocessor, predicted={"s": {"document"}})
    firsts = []
    for index in range(12):
        batch = make([example(index)])
        place = batch.labels.relevance.tolist().index(1.0)
        firsts.append(place)
        (chunk,) = batch.chunks
        told = chunk.rows[0].tail
        assert preprocessor.tokenizer.decode(told.ids[-told.predicted :]).strip() == f"{place + 1}]"
        text = preprocessor.tokenizer.decode(chunk.rows[0].ids)
        assert text.count("ID: 1 | CONTENT:") == 1 and text.count("| END ID: 1") == 1
        assert preprocessor.tokenizer.decode([told.ids[one] for one in told.signals]).strip().endswith("[")
    assert len(set(firsts)) > 1
    twice = make([example(0), example(0)])
    assert twice.n_documents == 8 and len(twice.chunks) == 2, "lists share no inputs"


def test_a_document_is_cut_to_its_block(family_folder):
    _, preprocessor = reads_lists(
        family_folder("qwen3"), lengths={"query_max_length": 60, "document_max_length": 40}
    )  # fmt: skip
    rows = preprocessor.tokenize(listed(["word " * 200, "short"]))
    own = [len(row) - row.tail.prefix for row in rows]
    assert own[0] == 40 and rows[0].cut > 0.7 and rows[1].cut == 0
    assert preprocessor.tokenizer.decode(rows[0].ids).rstrip().endswith("| END ID: 1")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), documents=st.integers(1, 5), length=st.integers(1, 6), heads=st.sampled_from([2, 4]))
def test_shares_by_loops(seed, documents, length, heads):
    torch.manual_seed(seed)
    signals, keys = torch.randn(heads, 2, 8), torch.randn(2, documents * length, 8)
    real = torch.rand(documents, length) < 0.7
    real[:, 0] = True
    found = document_shares(read_logits(signals, keys, 0.3), real)
    expected = torch.zeros(documents)
    for head in range(heads):
        for signal in range(2):
            weights = torch.zeros(documents, length)
            for document in range(documents):
                for token in range(length):
                    if real[document, token]:
                        key = keys[head // (heads // 2), document * length + token]
                        weights[document, token] = (0.3 * signals[head, signal] @ key).exp()
            expected += (weights / weights.sum()).sum(1) / (heads * 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_cost_is_linear_in_the_documents():
    """No score is computed of one document with another: (T, P + T) a document, and (L, P + N T + L)."""
    seen = []

    def counting(query, key, value, mask, dropout, scaling):
        seen.append(query.shape[0] * query.shape[2] * key.shape[2])
        return masked_attention(query, key, value, mask, dropout, scaling)

    for documents in (10, 20, 40):
        seen.clear()
        blocks = Blocks(None, 8, torch.ones(documents, 16, dtype=torch.bool), 4, 10**9, ())
        size = 8 + documents * 16 + 4
        attend_blocks(blocks, 0, *(torch.randn(1, 2, size, 8) for _ in range(3)), 0.0, None, counting)
        assert sum(seen) <= 8 * 16 + documents * 16 * (8 + 16 + 8)


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("qwen3", {**HEAD, "layer": 9}, "layer 9 of a backbone with 2"),
        ("qwen3", {**HEAD, "offset": 4096}, "knows positions below 2048"),
        ("gemma3_text", HEAD, "sliding window of 16"),
        ("mistral", HEAD, "sliding window of 16"),
    ],
)
def test_refusals(family_folder, name, head, message):
    with pytest.raises(ConfigError, match=message):
        reads_lists(family_folder(name), head=head)


def test_a_list_that_reaches_the_last_block_is_refused(family_folder):
    model, preprocessor = reads_lists(family_folder("qwen3"), head={**HEAD, "offset": 30})
    with pytest.raises(MmembedError, match="raise head.offset"):
        model(preprocessor(listed(TEXTS)))


def test_a_list_is_one_chunk(family_folder):
    _, preprocessor = reads_lists(family_folder("qwen3"))
    items = listed(TEXTS)
    rows = preprocessor.tokenize([*items, *(replace(one, place=Place(1, one.place.number)) for one in items)])
    chunks = plan_chunks(rows, 16)
    assert [sorted(chunk.index.tolist()) for chunk in chunks] == [[0, 1, 2, 3], [4, 5, 6, 7]]
