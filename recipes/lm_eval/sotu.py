"""Data of the task files beside this one, made of the held-out text that comes with hf_dms."""

import json
import random
import re
from pathlib import Path

import datasets

TEXT = Path(__file__).parent.parent / "data" / "sotu_heldout.jsonl"


def passages(**_) -> dict[str, datasets.Dataset]:
    """Passages of four sentences, 200 of them, evenly spaced."""
    texts = [" ".join(sentences) for sentences in _passages()]
    return {"test": datasets.Dataset.from_list([{"text": text} for text in texts[:: max(len(texts) // 200, 1)][:200]])}


def next_sentences(**_) -> dict[str, datasets.Dataset]:
    """Three sentences, the one that follows, and three from elsewhere: 400 of them."""
    found, chance, rows = _passages()[:400], random.Random(0), []
    for passage in found:
        others = [other[3] for other in chance.sample(found, 4) if other is not passage][:3]
        order = chance.sample(range(4), 4)
        choices = [passage[3], *others]
        rows.append({"context": " ".join(passage[:3]), "choices": [choices[i] for i in order], "label": order.index(0)})
    return {"test": datasets.Dataset.from_list(rows)}


def _passages() -> list[list[str]]:
    """Every four sentences in a row, none of them twice."""
    documents = [json.loads(line)["text"] for line in TEXT.read_text(encoding="utf-8").splitlines()]
    sentences = [re.split(r"(?<=[.;?!]) ", document) for document in documents]
    return [row[i : i + 4] for row in sentences for i in range(0, len(row) - 3, 4)]
