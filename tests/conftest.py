"""Marks, and small models and corpora that the tests of several rooms share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.support.language import BAD, GOOD, WORDS, review
from tests.support.launch import run, run_in_this_process


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU from all tests, and from the processes they start, but under `-m gpu`.

    So every machine runs the same tests on its CPU. Torch looks for GPUs when it is first asked.
    """
    marks = config.getoption("markexpr")
    if "gpu" not in marks or "not gpu" in marks:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not torch.cuda.is_available():
        # Triton's kernels then run on the CPU, in its interpreter. Read where a kernel is defined.
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none, or it is hidden."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU and `pytest -m gpu`"))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A WordPiece tokenizer over `WORDS` (bert-style special tokens)."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocab = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory, tiny_tokenizer) -> str:
    """A folder with a BERT of two layers of 32, with MLM head and pooler, and its tokenizer."""
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=64, pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    BertForPreTraining(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def still_encoder(tmp_path_factory, tiny_encoder) -> str:
    """`tiny_encoder` without dropout, so that runs can be compared."""
    folder = tmp_path_factory.mktemp("still") / "tiny"
    shutil.copytree(tiny_encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def reviews_file(tmp_path_factory) -> str:
    """Unlabelled reviews, one document a line, several sentences each."""
    import numpy as np

    generator = np.random.default_rng(0)
    lines = [
        " ".join(review(generator, GOOD if i % 2 else BAD) for _ in range(1 + i % 6))
        for i in range(120)
    ]
    path = tmp_path_factory.mktemp("text") / "reviews.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def labelled_files(tmp_path_factory) -> dict[str, str]:
    """train.csv and test.csv with columns text,label."""
    import csv

    import numpy as np

    generator = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("task")
    files = {}
    for name, count in (("train", 60), ("test", 30)):
        files[name] = str(folder / f"{name}.csv")
        with open(files[name], "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for i in range(count):
                mood, label = ((GOOD, "pos"), (BAD, "neg"))[i % 2]
                writer.writerow([review(generator, mood), label])
    return files


@pytest.fixture(scope="session")
def reviews_store(tmp_path_factory, tiny_encoder, reviews_file) -> str:
    """Prefix of a token store of `reviews_file`."""
    from preprocess import tokenize_corpus

    prefix = str(tmp_path_factory.mktemp("store") / "reviews")
    tokenize_corpus.main(
        ["--input", reviews_file, "--tokenizer", tiny_encoder, "--output", prefix]
    )
    return prefix


@pytest.fixture(autouse=True)
def usual_log_level(monkeypatch):
    """Undo `--log_level`, which a command leaves in the environment for what it starts."""
    monkeypatch.setenv("SELMASK_LOG_LEVEL", "")


@pytest.fixture(autouse=True)
def one_process_group(monkeypatch):
    """Let a command that ends in this process leave the group of later tests alone.

    A second process group in one process is beyond DeepSpeed.
    """
    from preprocess import errors

    monkeypatch.setattr(errors, "_process_group", lambda: None)


@pytest.fixture
def no_process_group(monkeypatch):
    """Run commands in this process, without a process group."""
    from train import engine

    monkeypatch.setattr(engine, "start", lambda: torch.device("cpu"))
    monkeypatch.setattr(engine, "finish", lambda: None)


@pytest.fixture(scope="session")
def run_command_line() -> Callable[..., subprocess.CompletedProcess]:
    """`run`, for tests."""
    return run


@pytest.fixture(scope="session")
def run_here() -> Callable[..., None]:
    """`run_in_this_process`, for tests."""
    return run_in_this_process
