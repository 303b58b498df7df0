"""How fast and how small the search of mining is, against FAISS flat and sentence-transformers.

    python -m benchmarks.mining --json                       # everything; 10 minutes on two cores, 2.2 GB of disk
    python -m benchmarks.mining --only search mine --documents 50000
    python -m benchmarks.mining --only curve --curve 125000 500000 2000000

Vectors are random, of 256 float32 numbers and unit length; a query is a document with noise, its positive. All
contenders have the same threads and the same vectors in memory, and give the same top 10 before anything is timed.

    search        top_k of 20,000 queries among 50,000 and 200,000 documents
                  peer   FAISS IndexFlatIP, filled beforehand, with the fastest of its block sizes
                  limit  the product of queries and documents alone, in bfloat16 where there are units for it
    semantic      the same against sentence_transformers.util.semantic_search, with the fastest of its chunks
    mine          8 negatives a query, 5 percent below the positive, among the best 50, as a data set of texts
                  peer   sentence_transformers.util.mine_hard_negatives with cached vectors, a row as it comes and one
                         with use_faiss=True
    curve         top_k over a file of up to 2 million documents that is mapped, never loaded

Peak memory is of anonymous pages, above what the process holds with its vectors loaded, in a fresh process a contender;
a mapped file's pages are the system's to take back. Goals: faster than FAISS flat, 3 times mine_hard_negatives, 1 GB
above the vectors; in the curve at least .8 of the speed of the smallest corpus, and memory within 128 MB of its.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._common import Row, best_setting, compare, environment, parser, peak_mb_of, set_up, show

SIZE, K, NEGATIVES, DEPTH, PERCENT = 256, 10, 8, 50, 5.0
ROWS = ("search", "semantic", "mine", "curve")
SETTINGS: dict[str, tuple[Any, ...]] = {
    "search": ((4096, 1024), (1024, 1024), (4096, 8192)),
    "semantic": (512, 2048, 8192),
    "mine": (False, True),  # use_faiss
}
GOALS = {"search": 1.0, "semantic": 1.0, "mine": 3.0}
PEERS = {"search": "FAISS IndexFlatIP", "semantic": "semantic_search", "mine": "mine_hard_negatives"}
MOST_MB = 1024
FLAT_MB = 128
LINEAR = 0.8


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--queries", type=int, default=20000)
    options.add_argument("--documents", type=int, nargs="+", default=[50000, 200000])
    options.add_argument("--curve", type=int, nargs="+", default=[125000, 250000, 500000, 1000000, 2000000])
    options.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows (default all)")
    options.add_argument("--folder", type=Path, help="for the vectors (default: a temporary one)")
    options.add_argument(
        "--peak-of", nargs=3, metavar=("CONTENDER", "ROW", "SETTING"), help="used by the benchmark itself"
    )
    arguments = options.parse_args()
    threads = set_up(arguments.threads)
    if arguments.peak_of:
        contender, row, setting = arguments.peak_of
        print(peak_of(contender, row, int(setting), arguments.folder, threads))
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="mining-", dir=arguments.folder) as folder:
        for documents in arguments.documents if set(arguments.only) - {"curve"} else []:
            write(Path(folder), arguments.queries, documents)
            for row in ROWS[:-1]:
                if row in arguments.only and (row == "search" or documents == arguments.documents[0]):
                    rows += measure(row, Path(folder), arguments.rounds, threads)
        if "curve" in arguments.only:
            rows += curve(Path(folder), arguments.queries, sorted(arguments.curve), threads)
    for one in rows:
        one.details |= {"threads": threads, **environment()}
    show(rows, arguments.json)


# Rows -----------------------------------------------------------------------------------------------------------------


def measure(row: str, folder: Path, rounds: int, threads: int) -> list[Row]:
    """Against the peer with the fastest of its settings; `mine` against each."""
    given = load(folder)
    contenders = contenders_of(row, given, threads)
    settings = SETTINGS[row]
    check(row, contenders["ours"](0), contenders["peer"](0))
    places = [settings.index(best_setting(lambda one: contenders["peer"](settings.index(one)), settings))]
    places = list(range(len(settings))) if row == "mine" else places
    shared = ["--threads", str(threads), "--folder", str(folder)]
    queries, documents = len(given["queries"]), len(given["documents"])
    found = []
    for place in places:
        peaks = {
            name: peak_mb_of("benchmarks.mining", [*shared, "--peak-of", name, row, str(place)])
            for name in ("ours", "peer")
        }
        one = compare(
            f"{row}{'_faiss' if row == 'mine' and settings[place] else ''}_{queries}x{documents}x{SIZE}",
            "queries/s",
            queries,
            {name: partial(run, place) for name, run in contenders.items()},
            rounds,
            peer_name=f"{PEERS[row]}, {'use_faiss=' if row == 'mine' else ''}{settings[place]}",
            goal_to_peer=GOALS[row],
            peak_mb=peaks,
        )
        one.meets = one.meets and peaks["ours"] <= MOST_MB
        found.append(one)
    return found


def curve(folder: Path, queries: int, sizes: list[int], threads: int) -> list[Row]:
    """Time and memory as the corpus grows: the unit is pairs of a query and a document a second."""
    write(folder, queries, sizes[-1])
    rows: list[Row] = []
    for size in sizes:
        speeds = []
        for _ in range(1 if size > sizes[0] else 2):  # the first also warms up
            start = time.perf_counter()
            search_file(folder, size)
            speeds.append(queries * size / (time.perf_counter() - start) / 1e6)
        shared = ["--threads", str(threads), "--folder", str(folder)]
        peak = peak_mb_of("benchmarks.mining", [*shared, "--peak-of", "ours", "curve", str(size)])
        speed = round(speeds[-1], 1)
        first = rows[0] if rows else None
        ratio = round(speed / first.ours, 3) if first and first.ours else 1.0
        flat = first is None or peak - (first.peak_mb_ours or 0) <= FLAT_MB
        rows.append(
            Row(
                f"curve_{queries}x{size}x{SIZE}",
                "million pairs/s",
                speed,
                limit=first.ours if first else speed,
                ratio_to_limit=ratio,
                goal_to_limit=LINEAR,
                peak_mb_ours=peak,
                meets=ratio >= LINEAR and flat and peak <= MOST_MB,
                details={"seconds": round(queries * size / speed / 1e6, 2)},
            )
        )
    return rows


def check(row: str, ours: Any, peer: Any) -> None:
    """Raises SystemExit unless both found the same: scores to 2e-6, and rows but for ties within that."""
    import numpy as np

    if row == "mine":
        same = np.mean([left == right for left, right in zip(ours, peer, strict=True)])
        if len(ours) == len(peer) and same >= 0.999:
            return
        raise SystemExit(f"mine: {same:.2%} of the records are the same; the timing would mean nothing")
    difference = float(np.abs(ours.scores - peer.scores).max())
    same = float((ours.indices == peer.indices).mean())
    if difference > 2e-6 or same < 0.999:
        raise SystemExit(f"{row}: scores differ by {difference:.2g}, {same:.2%} of the rows are the same")


# Contenders -----------------------------------------------------------------------------------------------------------


def contenders_of(row: str, given: dict[str, Any], threads: int) -> dict[str, Callable[[int], Any]]:
    """Each takes the number of a setting of the peer."""
    from mmembed.search import top_k

    def ours(setting: int) -> Any:
        return top_k(given["queries"], given["documents"], K, similarity="dot")

    if row == "search":
        return {"ours": ours, "peer": faiss_flat(given, threads), "limit": product(given)}
    if row == "semantic":
        return {"ours": ours, "peer": semantic_search(given)}
    return {"ours": mined(given), "peer": mine_hard_negatives(given)}


def faiss_flat(given: dict[str, Any], threads: int) -> Callable[[int], Any]:
    import faiss

    from mmembed.search import Hits

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(SIZE)
    index.add(given["documents"])

    def run(setting: int) -> Hits:
        faiss.cvar.distance_compute_blas_query_bs, faiss.cvar.distance_compute_blas_database_bs = SETTINGS["search"][
            setting
        ]
        return Hits(*index.search(given["queries"], K))

    return run


def product(given: dict[str, Any]) -> Callable[[int], None]:
    import torch

    from mmembed.search.exact import BLOCK_BYTES, CORPUS_ROWS, has_units

    narrow = has_units(torch.device("cpu"))
    queries, documents = (torch.from_numpy(given[name]) for name in ("queries", "documents"))
    if narrow:
        queries, documents = queries.bfloat16(), documents.bfloat16()
    step = BLOCK_BYTES // (CORPUS_ROWS * queries.element_size())
    scores = torch.empty(CORPUS_ROWS, step, dtype=queries.dtype)

    def run(setting: int) -> None:
        for block in documents.split(CORPUS_ROWS):
            for part in queries.split(step):
                torch.mm(block, part.T, out=scores.view(-1)[: len(block) * len(part)].view(len(block), len(part)))

    return run


def semantic_search(given: dict[str, Any]) -> Callable[[int], Any]:
    import numpy as np
    import torch

    import mmembed.backbones.torchvision_shim  # noqa: F401  (before sentence-transformers)
    from mmembed.search import Hits

    from sentence_transformers import util  # isort: skip

    queries, documents = (torch.from_numpy(given[name]) for name in ("queries", "documents"))

    def run(setting: int) -> Hits:
        chunk = SETTINGS["semantic"][setting]
        found = util.semantic_search(queries, documents, chunk, top_k=K, score_function=util.dot_score)
        scores = np.array([[hit["score"] for hit in row] for row in found], np.float32)
        return Hits(scores, np.array([[hit["corpus_id"] for hit in row] for row in found]))

    return run


def mined(given: dict[str, Any]) -> Callable[[int], Any]:
    """As a data set of texts, as the peer's."""
    import numpy as np
    from datasets import Dataset

    from mmembed.mining import MINERS, mine
    from mmembed.mining.retrieval import retrieve

    texts, asked = texts_of(given)
    rules = [MINERS.build({"type": "percent_of_positive", "percent": PERCENT})]

    def run(setting: int) -> Dataset:
        positives = np.arange(len(asked))[:, None]
        candidates = retrieve(given["queries"], given["documents"], positives, DEPTH, similarity="dot")
        rows = mine(candidates, rules, NEGATIVES)
        rows = rows[(rows >= 0).all(axis=1)] if (rows < 0).any() else rows
        columns = {
            f"negative_{place + 1}": [texts[row] for row in rows[:, place].tolist()] for place in range(NEGATIVES)
        }
        return Dataset.from_dict({"anchor": asked, "positive": texts[: len(asked)], **columns})

    return run


def mine_hard_negatives(given: dict[str, Any]) -> Callable[[int], Any]:
    import hashlib

    import numpy as np
    from datasets import Dataset
    from tokenizers import Tokenizer, models

    import mmembed.backbones.torchvision_shim  # noqa: F401  (before sentence-transformers)

    from sentence_transformers import SentenceTransformer, util  # isort: skip
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding  # isort: skip

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    model = SentenceTransformer(
        modules=[StaticEmbedding(words, embedding_dim=SIZE)], device="cpu", similarity_fn_name="dot"
    )
    texts, asked = texts_of(given)
    data = Dataset.from_dict({"anchor": asked, "positive": texts[: len(asked)]})
    cache = given["folder"] / "cache"
    cache.mkdir(exist_ok=True)
    for name, listed, vectors in (("query", asked, given["queries"]), ("corpus", texts, given["documents"])):
        key = repr((model.model_card_data.base_model or "", None, None, listed)).encode()
        np.save(cache / f"{name}_embeddings_{hashlib.sha256(key, usedforsecurity=False).hexdigest()}.npy", vectors)

    def run(setting: int) -> Dataset:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            found = util.mine_hard_negatives(
                data, model, corpus=texts, num_negatives=NEGATIVES, range_max=DEPTH, relative_margin=PERCENT / 100,
                sampling_strategy="top", output_format="n-tuple", cache_folder=str(cache),
                use_faiss=SETTINGS["mine"][setting], verbose=True,
            )  # fmt: skip
        if said.getvalue().count("[Cache] Loaded") != 2:
            raise SystemExit("mine_hard_negatives did not take the cached vectors")
        return found

    return run


# Data -----------------------------------------------------------------------------------------------------------------


def write(folder: Path, queries: int, documents: int) -> None:
    """queries.npy and documents.npy; the first documents are the queries' positives."""
    import numpy as np

    random = np.random.default_rng(0)
    mapped = np.lib.format.open_memmap(folder / "documents.npy", "w+", np.float32, (documents, SIZE))
    for start in range(0, documents, 65536):
        mapped[start : start + 65536] = unit(random.standard_normal((min(65536, documents - start), SIZE), np.float32))
    mapped.flush()
    noise = random.standard_normal((queries, SIZE), np.float32)
    np.save(folder / "queries.npy", unit(mapped[:queries] + np.float32(0.08) * noise))


def unit(vectors: Any) -> Any:
    import numpy as np

    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def load(folder: Path) -> dict[str, Any]:
    import numpy as np

    return {name: np.load(folder / f"{name}.npy") for name in ("queries", "documents")} | {"folder": folder}


def texts_of(given: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Of documents and queries: all different; the vectors are there already."""
    texts = [f"document {place} of a corpus of vectors" for place in range(len(given["documents"]))]
    return texts, [f"query {place}" for place in range(len(given["queries"]))]


def search_file(folder: Path, size: int) -> object:
    import numpy as np

    from mmembed.search import open_vectors, top_k

    return top_k(np.load(folder / "queries.npy"), open_vectors(folder / "documents.npy")[:size], K, similarity="dot")


# Memory ---------------------------------------------------------------------------------------------------------------


def peak_of(contender: str, row: str, setting: int, folder: Path, threads: int) -> int:
    """MB of anonymous pages that a run takes above those of its vectors."""
    import numpy as np

    from mmembed.search import top_k

    small = np.ones((256, SIZE), np.float32)
    top_k(small, small, 2, similarity="dot")  # kernels and pools are there
    if row == "curve":
        with sampled() as peak:
            search_file(folder, setting)
    else:
        run = contenders_of(row, load(folder), threads)[contender]
        with sampled() as peak:
            run(setting)
    return round(peak[0] / 1024)


@contextlib.contextmanager
def sampled() -> Iterator[list[int]]:
    """kB of anonymous pages above those at the start, at most, looked at every 5 ms."""
    start, peak, stop = anonymous(), [0], threading.Event()

    def look() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], anonymous() - start)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


if __name__ == "__main__":
    main()
