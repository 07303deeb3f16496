"""Learn a vocabulary from text, to pre-train with fresh weights.

    python preprocess/train_tokenizer.py --input corpus.txt --vocab_size 8000 --output data/vocab

Writes BERT's WordPiece, or RoBERTa's byte-level BPE, to a folder that `AutoTokenizer` loads. A
checkpoint that is trained further keeps its own tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from preprocess.corpus import describe_first, read_documents
from preprocess.errors import ConfigError, DataError, run_command
from preprocess.files import temporary_path
from preprocess.flags import USUAL, Parser
from preprocess.progress import Progress, say
from preprocess.store import MAX_VOCAB

# In the order of their ids.
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def build_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group(USUAL).add_argument
    add("--input", nargs="+", required=True, metavar="F", help="files, hub:NAME or pypi:...")
    add("--text_column", default="text", metavar="C", help="column with the text")
    add("--max_documents", type=int, metavar="N",
        help="learn from the first N documents only (default: all)")
    add("--vocab_size", type=int, required=True, metavar="N",
        help=f"number of ids, at most {MAX_VOCAB:,}")
    add("--output", required=True, metavar="DIR", help="folder to write; must not exist")
    add("--kind", choices=sorted(KINDS), default="wordpiece", help="kind of subwords")
    add("--lowercase", action=argparse.BooleanOptionalAction, default=None,
        help="lower-case the text and remove accents (wordpiece only, and the default there; "
        "--no-lowercase keeps both)")
    parser.add_argument("--dry_run", action="store_true",
                        help="check everything, print the plan, and exit")
    return parser


def train_wordpiece(read: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool) -> Any:
    """Return a `BertTokenizerFast` learnt from the documents of two calls of `read`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]

    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The library numbers "##x" in the order of a randomly seeded hash map, and breaks ties between
    # pairs by number. Given the characters first, the same text gives the same vocabulary.
    characters, inside = _count_characters(learner, read(), min(1000, vocab_size // 4))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=BERT_SPECIAL + ["##" + c for c in inside],
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=False,
    )
    learner.train_from_iterator(read(), trainer)
    return BertTokenizerFast(vocab=_by_id(learner), do_lower_case=lowercase)


def _count_characters(
    learner: Any, documents: Iterable[str], limit: int
) -> tuple[list[str], list[str]]:
    """Return the most frequent characters, and those of them that occur inside words."""
    words: Counter[str] = Counter()
    for document in documents:
        normal = learner.normalizer.normalize_str(document)
        words.update(word for word, _ in learner.pre_tokenizer.pre_tokenize_str(normal))
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    kept = sorted(counts, key=lambda c: (-counts[c], c))[:limit]
    inside = {character for word in words for character in word[1:]}
    return sorted(kept), sorted(inside.intersection(kept))


def train_bpe(read: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool) -> Any:
    """Return a `RobertaTokenizerFast` learnt from the documents of `read`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import RobertaTokenizerFast

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=ROBERTA_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that no text is unknown
        show_progress=False,
    )
    learner.train_from_iterator(read(), trainer)
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return RobertaTokenizerFast(vocab=_by_id(learner), merges=merges)


KINDS = {"wordpiece": train_wordpiece, "bpe": train_bpe}


def _by_id(learner: Any) -> dict[str, int]:
    return dict(sorted(learner.get_vocab().items(), key=lambda item: item[1]))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the tokenizer's folder."""
    args = build_parser().parse_args(argv)
    if not 10 <= args.vocab_size <= MAX_VOCAB:
        raise ConfigError(
            f"--vocab_size {args.vocab_size}: 10 to {MAX_VOCAB:,}; token stores keep 16-bit ids"
        )
    if args.kind == "bpe" and args.lowercase:
        raise ConfigError("--lowercase: only --kind wordpiece has it; RoBERTa's BPE keeps case")
    output = Path(args.output)
    if output.exists():
        raise DataError(f"{output}: exists; give another --output or remove it")
    if args.dry_run:
        for line in describe_first(args.input, args.text_column):
            say(line)
        say(f"{output}: {args.kind} of at most {args.vocab_size:,} ids, to be learnt")
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the same vocabulary on any number of cores

    def read() -> Iterator[str]:
        documents = read_documents(
            args.input, args.text_column, max_documents=args.max_documents)
        with Progress(None, "document", label="read") as bar:
            for document in documents:
                yield document
                bar.update()

    tokenizer = KINDS[args.kind](read, args.vocab_size, args.lowercase is not False)
    if len(tokenizer) > args.vocab_size:
        raise ConfigError(
            f"--vocab_size {args.vocab_size}: single characters alone need {len(tokenizer)} here"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(output)
    try:
        tokenizer.save_pretrained(str(temporary))
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    note = "" if len(tokenizer) == args.vocab_size else ", all that this text yields"
    say(f"{output}: {args.kind}, {len(tokenizer):,} ids{note}")


if __name__ == "__main__":
    run_command(main)
