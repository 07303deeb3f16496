"""Stores of other programs feed us, and ours feed them.

What needs an engine is skipped without it: `pip install -e '.[engines]' -c constraints.txt`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from preprocess import tokenize_corpus
from preprocess.errors import ConfigError
from preprocess.store import TokenStore
from tests.support.runs import logged, pretrained
from tests.support.stores import foreign
from train.run_dir import metrics

TASKS = 3


@pytest.fixture(scope="module")
def datatrove_stores(tmp_path_factory, reviews_file, tiny_encoder) -> list[str]:
    """What datatrove's tokenizer writes of the reviews as JSONL: one `.bin` a task."""
    pytest.importorskip("datatrove")
    pytest.importorskip("orjson")
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    folder = tmp_path_factory.mktemp("datatrove")
    lines = Path(reviews_file).read_text().splitlines()
    for task in range(TASKS):
        with open(folder / f"{task}.jsonl", "w") as stream:
            for text in lines[40 * task : 40 * (task + 1)]:
                stream.write(json.dumps({"text": text}) + "\n")
    LocalPipelineExecutor(
        [
            JsonlReader(str(folder), glob_pattern="*.jsonl"),
            MegatronDocumentTokenizer(
                str(folder / "store"), tokenizer_name_or_path=f"{tiny_encoder}/tokenizer.json",
                eos_token="[SEP]",
            ),
        ],
        tasks=TASKS, workers=1, logging_dir=str(folder / "logs"),
    ).run()
    made = sorted(str(path) for path in (folder / "store").glob("*.bin"))
    assert len(made) == TASKS
    return made


def adopt(sources: list[str], tokenizer: str, prefix: Path, *more: str) -> None:
    tokenize_corpus.main(["--adopt", "--input", *sources, "--tokenizer", tokenizer,
                          "--output", str(prefix), *more])


def test_a_store_of_datatrove_is_adopted_and_trains(
    datatrove_stores, tmp_path, reviews_file, tiny_encoder, still_encoder
):
    adopt(datatrove_stores, tiny_encoder, tmp_path / "s")
    store = TokenStore.open(tmp_path / "s", verify=True)
    assert len(store.shards) == TASKS and store.num_documents == 120
    assert store.info["counts"]["special_ids_stripped"] == 120  # its end of a document
    # The same texts through our own tokenizer: the same ids, a sequence a document.
    tokenize_corpus.main(["--input", reviews_file, "--tokenizer", tiny_encoder, "--num_workers",
                          "1", "--no-split_sentences", "--output", str(tmp_path / "ours")])
    (ours,) = TokenStore.open(tmp_path / "ours").shards
    assert np.concatenate([shard.tokens for shard in store.shards]).tolist() == ours.tokens.tolist()
    ends = [s.sequence_offsets[1:] + s.token_start for s in store.shards]
    assert np.concatenate(ends).tolist() == ours.sequence_offsets[1:].tolist()
    run_dir = pretrained(str(tmp_path / "s"), still_encoder, tmp_path / "run", max_steps=3)
    assert len(logged(run_dir, metrics.TRAIN_LOSS)) == 3


def test_adopting_shards_one_by_one(datatrove_stores, tmp_path, tiny_encoder):
    adopt(datatrove_stores, tiny_encoder, tmp_path / "a" / "s")
    for i in (2, 0, 1):
        assert not (tmp_path / "b" / "s.json").exists()
        adopt(datatrove_stores, tiny_encoder, tmp_path / "b" / "s", "--shard_index", str(i))
    stores = [TokenStore.open(tmp_path / name / "s", verify=True) for name in "ab"]
    assert stores[0].fingerprint == stores[1].fingerprint
    with pytest.raises(ConfigError, match="--num_shards 2: .* there are 3"):
        adopt(datatrove_stores, tiny_encoder, tmp_path / "c", "--num_shards", "2")


def test_several_stores_become_shards_in_their_order(tmp_path, tiny_encoder):
    """Of any program; one of them has nothing to give."""
    foreign(tmp_path / "x1", [[2, 30, 31, 3]], [0, 1], code=4)
    foreign(tmp_path / "x0", [[40], [41, 42]], [0, 2])
    foreign(tmp_path / "x2", [], [0])
    adopt(sorted(map(str, tmp_path.glob("x*.bin"))), tiny_encoder, tmp_path / "s")
    store = TokenStore.open(tmp_path / "s", verify=True)
    assert [shard.tokens.tolist() for shard in store.shards] == [[40, 41, 42], [30, 31], []]
    assert store.shards[0].document_offsets[:].tolist() == [0, 2]
    with pytest.raises(ConfigError, match="a complete store; replace it with --overwrite"):
        adopt([str(tmp_path / "x0")], tiny_encoder, tmp_path / "s")


def test_megatron_reads_a_store_of_ours(reviews_store):
    """Sequences, documents and dtype of a store that the command made."""
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    opened = indexed.IndexedDataset(reviews_store)
    (shard,) = TokenStore.open(reviews_store).shards
    bounds = shard.sequence_offsets[:].tolist()
    assert len(opened) == shard.num_sequences > shard.num_documents
    for i, (first, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        assert opened[i].tolist() == shard.tokens[first:end].tolist()
    assert opened.document_indices.tolist() == shard.document_offsets[:].tolist()
    assert opened[0].dtype == np.uint16
