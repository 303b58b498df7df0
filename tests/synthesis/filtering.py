"""What tests of filters share: small records, and the real ones of this repository."""

import json
from pathlib import Path

from mmembed.data.format_base import FORMATS

DATA = Path("data")


def pair(name, query, *documents, **more):
    own = [dict(zip(("content", "relevance"), one, strict=True)) for one in documents]
    return {"id": name, "query": query, "documents": own, **more}


def records(name, split="train", most=None, **options):
    """Records of a BEIR folder of data/, as a pipeline reads them."""
    found = []
    for record in FORMATS.build({"type": "beir", "split": split, **options}).read(DATA / name):
        record.pop("where")
        for document in record["documents"]:
            title = document.pop("title", None)
            if title:
                document["content"] = f"{title} {document['content']}"
        found.append(record)
        if len(found) == most:
            break
    return found


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
