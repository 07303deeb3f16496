"""Token stores written by hand."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from preprocess.store import (
    StoreWriter,
)

# What the JSON of scores keeps of the measure that made them.
MEASURED = {"measure": {"name": "scorer", "boundary": True, "unit": "log-odds",
                        "reads_labels": True}}


class FakeTokenizer:
    """What a store needs of a tokenizer; the largest vocabulary allowed unless told otherwise."""

    name_or_path = "fake"
    cls_token_id, sep_token_id, pad_token_id, mask_token_id, unk_token_id = 2, 3, 0, 4, None
    all_special_ids = [0, 2, 3, 4]

    def __init__(self, size: int = 65536) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        return {"first": 0, "last": self.size - 1}

    def save_pretrained(self, folder: str) -> None:
        os.makedirs(folder)
        Path(folder, "tokenizer.json").write_text(str(self.size))


def write(prefix, documents, shard=None, tokenizer=None, **options) -> None:
    with StoreWriter(str(prefix), tokenizer or FakeTokenizer(), options, shard) as writer:
        for document in documents:
            writer.add_document(document)


def read(shard) -> list[list[list[int]]]:
    documents = []
    for first, last in zip(shard.document_offsets[:-1], shard.document_offsets[1:], strict=True):
        offsets = shard.sequence_offsets[first : last + 1]
        spans = zip(offsets[:-1], offsets[1:], strict=True)
        documents.append([shard.tokens[a:b].tolist() for a, b in spans])
    return documents


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def foreign(prefix, sequences, documents, code=8) -> None:
    """Write a Megatron-Core store byte by byte, as other programs do."""
    lengths = [len(s) for s in sequences]
    dtype = {8: "H", 4: "i"}[code]
    size = struct.calcsize(dtype)
    starts = [size * sum(lengths[:i]) for i in range(len(lengths))]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(starts)}q", *starts)
    index += struct.pack(f"<{len(documents)}q", *documents)
    Path(f"{prefix}.idx").write_bytes(index)
    flat = [i for s in sequences for i in s]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(flat)}{dtype}", *flat))
