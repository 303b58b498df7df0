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
    command       the same from files to files, whole processes with their imports: python -m data_tools.mine_negatives
                  that has computed nothing before, its vectors in folders of `mmembed encode`
                  peer   a process that reads the same texts, calls mine_hard_negatives with cached vectors, and writes
                         JSON lines (benchmarks.mining_peer), as it comes and with use_faiss=True
    curve         top_k over a file of up to 2 million documents that is mapped, never loaded

Peak memory is of anonymous pages, above what the process holds with its vectors loaded, in a fresh process a contender;
a mapped file's pages are the system's to take back; of `command` it is that of the whole process. Goals: faster than
FAISS flat, 3 times mine_hard_negatives, 1 GB; in the curve at least .8 of the speed of the smallest corpus, and memory
within 128 MB of its.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._common import (
    DATA,
    Row,
    alternate,
    best_setting,
    compare,
    environment,
    parser,
    peak_mb_of,
    set_up,
    show,
    told,
)

SIZE, K, NEGATIVES, DEPTH, PERCENT = 256, 10, 8, 50, 5.0
ROWS = ("search", "semantic", "mine", "command", "curve")
MINING = ("mine", "command")  # a row each setting of the peer
SETTINGS: dict[str, tuple[Any, ...]] = {
    "search": ((4096, 1024), (1024, 1024), (4096, 8192)),
    "semantic": (512, 2048, 8192),
    "mine": (False, True),  # use_faiss
    "command": (False, True),
}
GOALS = {"search": 1.0, "semantic": 1.0, "mine": 3.0, "command": 3.0}
PEERS = {
    "search": "FAISS IndexFlatIP",
    "semantic": "semantic_search",
    "mine": "mine_hard_negatives",
    "command": "process of mine_hard_negatives",
}
IMPORTS = {
    "ours": "import data_tools.mining.audit, data_tools.mining.collection, data_tools.mining.steps",
    "peer": "import benchmarks.mining_peer",
}
PEER_OPTIONS = {
    "num_negatives": NEGATIVES,
    "range_max": DEPTH,
    "relative_margin": PERCENT / 100,
    "size": SIZE,
}
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
    core = choose_openblas()  # processes below this one inherit it
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="mining-", dir=arguments.folder) as folder:
        for documents in arguments.documents if set(arguments.only) - {"curve"} else []:
            write(Path(folder), arguments.queries, documents)
            for row in ROWS[:-1]:
                if row in arguments.only and (row == "search" or documents == arguments.documents[0]):
                    rows += map(told, measure(row, Path(folder), arguments.rounds, threads))
        if "curve" in arguments.only:
            rows += map(told, curve(Path(folder), arguments.queries, sorted(arguments.curve), threads))
    for one in rows:
        one.details |= {"threads": threads, "openblas": core, **environment()}
    show(rows, arguments.json)


def choose_openblas() -> str:
    """The kernels of FAISS's own OpenBLAS, at their best: a processor that it does not know gets those of 2004
    (Prescott), a third of the speed, whatever vectors the processor has. Returns their name."""
    from mmembed.inference.cpu import cpu_capabilities

    found, cpu = openblas_core(), cpu_capabilities()
    better = "SkylakeX" if cpu.get("avx512_f") else "Haswell" if cpu.get("avx2") else found
    if found == "Prescott":
        os.environ["OPENBLAS_CORETYPE"] = better  # read when FAISS is loaded, in this process or one below it
        found = openblas_core()
    return found


def openblas_core() -> str:
    """The kernels that the last OpenBLAS loaded with FAISS takes: its own."""
    command = [sys.executable, "-c", "import faiss"]
    said = subprocess.run(command, env={**os.environ, "OPENBLAS_VERBOSE": "2"}, capture_output=True, text=True)
    cores = [line.removeprefix("Core: ") for line in said.stderr.splitlines() if line.startswith("Core: ")]
    return cores[-1] if cores else "unknown"


# Rows -----------------------------------------------------------------------------------------------------------------


def measure(row: str, folder: Path, rounds: int, threads: int) -> list[Row]:
    """Against the peer with the fastest of its settings; rows of mining against each."""
    given = load(folder)
    contenders = contenders_of(row, given, threads)
    settings = SETTINGS[row]
    check(row, contenders["ours"](0), contenders["peer"](0))
    places = list(range(len(settings)))
    if row not in MINING:
        places = [settings.index(best_setting(lambda one: contenders["peer"](settings.index(one)), settings))]
    imported = imports(rounds, threads) if row == "command" else {}
    shared = ["--threads", str(threads), "--folder", str(folder)]
    queries, documents = len(given["queries"]), len(given["documents"])
    found = []
    for place in places:
        peaks = {
            name: peak_mb_of("benchmarks.mining", [*shared, "--peak-of", name, row, str(place)])
            for name in ("ours", "peer")
        }
        one = compare(
            f"{row}{'_faiss' if row in MINING and settings[place] else ''}_{queries}x{documents}x{SIZE}",
            "queries/s",
            queries,
            {name: partial(run, place) for name, run in contenders.items()},
            rounds,
            peer_name=f"{PEERS[row]}, {'use_faiss=' if row in MINING else ''}{settings[place]}",
            goal_to_peer=GOALS[row],
            peak_mb=peaks,
            warm_up=row != "command",  # `check` ran it
        )
        one.meets = one.meets and peaks["ours"] <= MOST_MB
        if row == "command" and one.ours and one.peer:
            ours, peer = (queries / speed - imported[name] for name, speed in (("ours", one.ours), ("peer", one.peer)))
            one.details |= {"import_seconds": imported, "ratio_without_imports": round(peer / ours, 3)}
        found.append(one)
    return found


def imports(rounds: int, threads: int) -> dict[str, float]:
    """Seconds that a process takes of which nothing is left but its imports."""
    runs = {name: partial(process, ["-c", code], threads) for name, code in IMPORTS.items()}
    return {name: round(statistics.median(times), 2) for name, times in alternate(runs, rounds, warm_up=False).items()}


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

    if row in MINING:
        ours, peer = (read_mined(one) if isinstance(one, Path) else one for one in (ours, peer))
        same = np.mean([left == right for left, right in zip(ours, peer, strict=False)])
        if len(ours) == len(peer) and same >= 0.999:
            return
        found = f"{len(ours)} records and {len(peer)}, {same:.2%} of the records are the same"
        raise SystemExit(f"{row}: {found}; the timing would mean nothing")
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
    if row == "command":
        return commands(given, threads)
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
    from benchmarks import mining_peer

    texts, asked = texts_of(given)
    keep_vectors(given)

    def run(setting: int) -> Any:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            found = mining_peer.mined(
                asked, texts[: len(asked)], texts, given["folder"] / "cache", use_faiss=SETTINGS["mine"][setting],
                verbose=True, **PEER_OPTIONS,
            )  # fmt: skip
        took_the_vectors(said.getvalue())
        return found

    return run


def keep_vectors(given: dict[str, Any]) -> None:
    """Where the peer finds them."""
    from benchmarks import mining_peer

    texts, asked = texts_of(given)
    mining_peer.keep(given["folder"] / "cache", "query", asked, given["queries"])
    mining_peer.keep(given["folder"] / "cache", "corpus", texts, given["documents"])


def took_the_vectors(said: str) -> None:
    if said.count("[Cache] Loaded") != 2:
        raise SystemExit("mine_hard_negatives did not take the cached vectors")


def commands(given: dict[str, Any], threads: int) -> dict[str, Callable[[int], Path]]:
    """Processes that give the file of their records. Each begins without anything that another one computed."""
    folder = given["folder"]
    write_sources(given)
    keep_vectors(given)
    output, lines = folder / "mined", folder / "peer.jsonl"

    def ours(setting: int) -> Path:
        for old in (output, folder / "mmembed-cache"):
            shutil.rmtree(old, ignore_errors=True)
        process(["-m", "data_tools.mine_negatives", "--config", str(folder / "mining.yaml")], threads, folder)
        return output / "records.jsonl"

    def peer(setting: int) -> Path:
        use_faiss = str(SETTINGS["command"][setting])
        took_the_vectors(process(["-m", "benchmarks.mining_peer", str(folder), str(lines), use_faiss], threads, folder))
        return lines

    return {"ours": ours, "peer": peer}


def process(arguments: list[str], threads: int, folder: Path | None = None) -> str:
    """Runs python to its end; returns what it said. Raises SystemExit where it fails."""
    cache = {} if folder is None else {"MMEMBED_CACHE": str(folder / "mmembed-cache")}
    environment = {**os.environ, **cache, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=DATA.parent, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


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


def write_sources(given: dict[str, Any]) -> None:
    """Texts and vectors as files, for both commands, and their settings."""
    folder = given["folder"]
    texts, asked = texts_of(given)
    names = {"queries": [f"q{row}" for row in range(len(asked))], "documents": [f"d{row}" for row in range(len(texts))]}
    records = [
        {"query": query, "documents": [{"content": text, "id": name}], "id": own}
        for query, text, name, own in zip(asked, texts, names["documents"], names["queries"], strict=False)
    ]
    write_lines(folder / "records.jsonl", records)
    lines = [{"id": name, "text": text} for name, text in zip(names["documents"], texts, strict=True)]
    write_lines(folder / "corpus.jsonl", lines)
    for side, listed in (("queries", asked), ("documents", texts)):
        encoded = folder / f"{side}.enc"
        encoded.mkdir(exist_ok=True)
        (encoded / "vectors.npy").unlink(missing_ok=True)
        (encoded / "vectors.npy").symlink_to(folder / f"{side}.npy")
        items = [{"id": name, "text": text} for name, text in zip(names[side], listed, strict=True)]
        write_lines(encoded / "items.jsonl", items)
        (encoded / "encoding.json").write_text(json.dumps({"model": "random", "size": SIZE, "count": len(listed)}))
    config = {
        "output": str(folder / "mined"),
        "root": str(folder),
        "sources": [{"path": "records.jsonl", "corpus": ["corpus.jsonl"]}],
        "retriever": {"type": "vectors", "queries": f"{folder}/queries.enc", "corpus": f"{folder}/documents.enc"},
        "search": {"depth": DEPTH, "similarity": "dot"},
        "rules": [{"type": "percent_of_positive", "percent": PERCENT}],
        "negatives": NEGATIVES,
    }
    (folder / "mining.yaml").write_text(json.dumps(config))  # JSON is YAML
    (folder / "peer.json").write_text(json.dumps(PEER_OPTIONS))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_mined(path: Path) -> list[list[str]]:
    """Query, positive and negatives of each record, of either file."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if "documents" not in rows[0]:
        return [list(row.values()) for row in rows]
    return [[row["query"], *(document["content"] for document in row["documents"])] for row in rows]


def search_file(folder: Path, size: int) -> object:
    import numpy as np

    from mmembed.search import open_vectors, top_k

    return top_k(np.load(folder / "queries.npy"), open_vectors(folder / "documents.npy")[:size], K, similarity="dot")


# Memory ---------------------------------------------------------------------------------------------------------------


def peak_of(contender: str, row: str, setting: int, folder: Path, threads: int) -> int:
    """MB of anonymous pages that a run takes above those of its vectors; of `command`, that its process has."""
    import numpy as np

    from mmembed.search import top_k

    small = np.ones((256, SIZE), np.float32)
    top_k(small, small, 2, similarity="dot")  # kernels and pools are there
    if row == "command":
        run = commands(load(folder), threads)[contender]
        with sampled(of_children) as peak:
            run(setting)
    elif row == "curve":
        with sampled() as peak:
            search_file(folder, setting)
    else:
        run = contenders_of(row, load(folder), threads)[contender]
        with sampled() as peak:
            run(setting)
    return round(peak[0] / 1024)


@contextlib.contextmanager
def sampled(held: Callable[[], int] | None = None) -> Iterator[list[int]]:
    """kB of anonymous pages above those at the start, at most, looked at every 5 ms.

    Args:
        held: what is looked at; None: `anonymous` of this process.
    """
    held = held or anonymous
    start, peak, stop = held(), [0], threading.Event()

    def look() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], held() - start)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def anonymous(process: str = "self") -> int:
    """0 of a process that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(next((line for line in status.splitlines() if line.startswith("RssAnon")), "RssAnon: 0").split()[1])


def of_children() -> int:
    """Of all processes that this one has started."""
    lists = [task.joinpath("children").read_text().split() for task in Path("/proc/self/task").iterdir()]
    return sum(anonymous(child) for children in lists for child in children)


if __name__ == "__main__":
    main()
