"""Clusters the records of a source and writes them with the numbers of their nearest clusters as labels (MLCD).

    python -m data_tools.cluster --source data/banking77 --format labelled --clusters 200 --labels 8 \\
        --model mmembed-nano --output clustered.jsonl

What `mlcd` trains on (arXiv 2407.17331: LAION-400M in a million clusters, 8 labels a picture, by the vectors of CLIP).
Vectors are those of any embedder, of the queries or of the positives; k-means runs on the unit sphere's points with
squared Euclidean distances, so that the nearest centre need not be that of the largest cosine. The output is canonical
JSONL (paths of pictures absolute): a record's own labels give way. Costs: the vectors of all records in memory, the
encoding, and 4 x records x clusters x dimensions operations an iteration.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmembed.arguments import Parser
from mmembed.content import Document, Example
from mmembed.errors import MmembedError
from mmembed.staging import put_in_place, staging

if TYPE_CHECKING:
    from mmembed.media import MediaStore


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", required=True, help="file or folder of records")
    parser.add_argument("--format", default="jsonl", help="its record format (default jsonl)")
    parser.add_argument(
        "--options", default="{}", metavar="JSON", help='of the format, for example \'{"split": "dev"}\''
    )
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    parser.add_argument("--model", default="mmembed-nano", help="embedder (default the packaged nano)")
    parser.add_argument(
        "--side", choices=("query", "positive"), default="query", help="what is encoded (default query)"
    )
    parser.add_argument("--clusters", type=int, required=True, help="how many")
    parser.add_argument("--labels", type=int, default=8, help="nearest clusters a record (default 8)")
    parser.add_argument("--iterations", type=int, default=20, help="of k-means (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the first centres (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    chosen = parser.parse_args(arguments)
    try:
        print(cluster(**vars(chosen)))
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def cluster(
    source: str,
    format: str,
    options: str,
    output: Path,
    model: str,
    side: str,
    clusters: int,
    labels: int,
    iterations: int,
    seed: int,
    overwrite: bool,
) -> str:
    """Writes the file; returns a line about it. Raises MmembedError where a number cannot be or nothing can be read."""
    if not 1 <= labels < clusters:
        raise MmembedError(f"--labels {labels} of --clusters {clusters}: give 1 or more labels, and more clusters")
    if output.exists() and not overwrite:
        raise MmembedError(f"{output}: exists already; choose another file, or --overwrite")
    import torch

    from mmembed.clustering import kmeans, nearest
    from mmembed.data.records import write_records
    from mmembed.inference.embedder import Embedder

    examples, media = read(source, format, options)
    if len(examples) < clusters:
        raise MmembedError(f"{source}: {len(examples)} records cannot make {clusters} clusters; lower --clusters")
    embedder = Embedder.from_pretrained(model, media=media)
    if side == "query":
        instructions = [one.instruction for one in examples]
        encoded = embedder.encode([one.query for one in examples], role="query", instruction=instructions)
    else:
        encoded = embedder.encode([best(one.documents).content for one in examples])
    vectors = torch.nn.functional.normalize(torch.from_numpy(encoded), dim=-1)  # (M, E)
    centres = kmeans(vectors, clusters, torch.Generator().manual_seed(seed), iterations)
    numbers, distances = nearest(vectors, centres, labels)  # (M, labels) each
    labelled = [
        dataclasses.replace(one, labels=tuple((str(number),) for number in row), source="")
        for one, row in zip(examples, numbers.tolist(), strict=True)
    ]
    with staging(output) as staged:
        write_records(staged, labelled)
        put_in_place(staged, output)
    used, distance = len(numbers[:, 0].unique()), distances[:, 0].mean()
    return (
        f"{output}: {len(labelled):,} records, {used:,} clusters, mean squared distance to the nearest {distance:.3f}"
    )


def read(source: str, format: str, options: str) -> tuple[list[Example], MediaStore]:
    """The records of a source, and what opens their pictures.

    Raises:
        MmembedError: as the dataset does, or where `options` are no JSON mapping.
    """
    from mmembed.config.blocks import DataConfig, SourceConfig
    from mmembed.data.dataset import RecordDataset, media_store

    try:
        parsed = json.loads(options)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise MmembedError(f'--options {options!r}: give a JSON mapping, for example \'{{"split": "dev"}}\'')
    config = SourceConfig(path=source, format=format, options=parsed)
    media = media_store(DataConfig(train=(config,)))
    records = RecordDataset(config, media)
    return [records[index] for index in range(len(records))], media


def best(documents: Sequence[Document]) -> Document:
    """The most relevant one, of equals the first."""
    return max(documents, key=lambda document: document.relevance)


if __name__ == "__main__":
    sys.exit(main())
