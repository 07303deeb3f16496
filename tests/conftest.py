"""Marks, and small models and corpora that the tests of several rooms share."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    # Triton's kernels then run on the CPU, in its interpreter. Read where a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent

# Words of a small film-review language: what the tests read and write.
WORDS = (
    "the a film movie story plot actor director scene script music ending hero love war "
    "is was has feels seems good great fine warm funny bad dull weak slow boring and but with "
    "very quite too never not of in it this that one two end ##s ##ed ##ing ##ly un ##like . , !"
).split()
GOOD = ("good", "great", "fine", "warm", "funny")
BAD = ("bad", "dull", "weak", "slow", "boring")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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


def review(generator, mood: tuple[str, ...]) -> str:
    """One sentence of the small language."""
    plain = [word for word in WORDS if word.isalpha() and word not in GOOD + BAD]
    words = list(generator.choice(plain, size=int(generator.integers(3, 9))))
    words.insert(int(generator.integers(len(words) + 1)), str(generator.choice(mood)))
    return " ".join(words) + " ."


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


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_environment() -> dict[str, str]:
    """What a command started by a test sees."""
    # A test that trains in this process leaves its rank and port in the environment.
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    return environment | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def run(*command: str, ranks: int = 0, check: bool = True) -> subprocess.CompletedProcess:
    """Run a command of ours: with `python`, or under `deepspeed` on `ranks` ranks."""
    launcher = [sys.executable]
    if ranks:
        launcher = [
            sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks),
            "--master_port", str(free_port()),
        ]
    done = subprocess.run(
        [*launcher, *map(str, command)], cwd=ROOT, env=launch_environment(), text=True,
        capture_output=True, timeout=600,
    )
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done


@pytest.fixture(scope="session")
def run_command_line() -> Callable[..., subprocess.CompletedProcess]:
    """`run`, for tests."""
    return run


def run_in_this_process(script: str | Path, *flags: str) -> None:
    """Run the `main` of a command of ours here: as typed, without the seconds of its imports."""
    import importlib

    name = ".".join(Path(script).resolve().relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        # A second process group in one process is beyond DeepSpeed: keep the first.
        for user in ("engine", "finetune", "fit_scorer"):
            patch.setattr(f"train.{user}.finish", lambda: None)
        module.main([str(flag) for flag in flags])


@pytest.fixture(scope="session")
def run_here() -> Callable[..., None]:
    """`run_in_this_process`, for tests."""
    return run_in_this_process
