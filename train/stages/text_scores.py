"""Scores of single texts, as `score_tokens.py` gives them to the same texts in a store.

Letters: `T` tokens of a text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from preprocess.errors import ConfigError, DataError
from preprocess.progress import Progress
from preprocess.text.continuations import continuation_table
from preprocess.text.encode import BLOCK_CHARACTERS, cut_sentences, prepare_backend
from train.config import ROW
from train.model import (
    FAMILIES,
    check_agreement,
    check_row_length,
    load_config,
    load_tokenizer,
)
from train.stages.inference import check_trained, special_template
from train.stages.measures import MEASURES, NETWORKS, NUM_PASSES, WordPasses, bind, open_runner
from train.stages.scoring import score_block

MAX_SEQ_LENGTH = 256  # of a window where nothing is given, as of `score_tokens.py`


class TextScores(NamedTuple):
    """The tokens of a text, without special ones, and their scores.

    ids: `(T,)` int64. spans: first character and end of each token, `(T, 2)` int64.
    scores: larger is more important, in the unit of the measure, `(T,)` float16.
    """

    ids: np.ndarray
    spans: np.ndarray
    scores: np.ndarray


class TextScorer:
    """Score the tokens of texts by a network: `scorer(["A moving film."])`.

    Args:
        name: `hf/` folder or hub name of what the measure needs: a token scorer, a classifier, or
            a masked language model.
        measure: a name in `NETWORKS`' measures: scorer, gradient, surprise, excess.
        reference: masked language model, for excess.
        max_seq_length: largest window in tokens, special ones included; longer sentences are cut.
            None: 256, or the positions of the model if it has fewer.
        language: of the sentences, which are scored one by one; None scores complete texts.
        device: "cpu", "cuda", ...; a GPU if there is one.
    Raises:
        ConfigError, DataError: not such a model.
    """

    def __init__(
        self, name: str, *, measure: str = "scorer", reference: str = "",
        max_seq_length: int | None = None, language: str | None = "en",
        device: str | None = None,
    ) -> None:
        known = [key for key, one in MEASURES.items() if set(one.needs) & set(NETWORKS)]
        if measure not in known:
            raise ConfigError(f"measure {measure!r}: known are {', '.join(known)}")
        needs = MEASURES[measure].needs
        if bool(reference) != ("reference" in needs):
            raise ConfigError(f"measure {measure}: "
                              + ("reads no reference" if reference else "needs a reference"))
        network = NETWORKS[needs[0]]
        names = [name, *filter(None, [reference])]
        self.tokenizer = load_tokenizer(name)
        configs = [load_config(one) for one in names]
        width = min(MAX_SEQ_LENGTH, *(FAMILIES[one.model_type].num_positions(one)
                                      for one in configs)) if max_seq_length is None else (
            max_seq_length)
        if not ROW.holds(width):
            raise ConfigError(f"max_seq_length {width}: must be {ROW.words}")
        for one, config in zip(names, configs, strict=True):
            check_trained(config, network.suffixes, one, network.remedy)
            tokenizer = load_tokenizer(one)
            check_agreement(config, tokenizer, one)
            check_row_length(config, width)
            if tokenizer.get_vocab() != self.tokenizer.get_vocab():
                raise ConfigError(f"reference {one}: of another vocabulary than {name}; give one "
                                  "of the same")
        passes = (WordPasses(NUM_PASSES, False, continuation_table(self.tokenizer))
                  if "mlm" in needs else None)
        template = special_template(self.tokenizer, pair=False)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._runner = open_runner(measure, names, template, self.tokenizer, where, None, None)
        self._score, self._limit = bind(measure, passes), width - template.num_special
        self._backend, self._language = prepare_backend(self.tokenizer), language

    def __call__(self, texts: list[str]) -> list[TextScores]:
        """Score the tokens of each text; special tokens written in a text are text.

        Raises:
            DataError: a text of more than 524,288 characters.
        """
        for text in texts:
            if len(text) > BLOCK_CHARACTERS:
                raise DataError(f"a text of {len(text):,} characters: at most "
                                f"{BLOCK_CHARACTERS:,} at once; make a store of it with "
                                "tokenize_corpus.py, and score that with score_tokens.py")
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        ids = [np.array(encoding.ids, np.int64) for encoding in encodings]
        lengths: list[int] = []
        for text, encoding in zip(texts, encodings, strict=True):
            if encoding.ids:
                lengths += (cut_sentences(text, encoding.offsets, self._language)
                            if self._language else [len(encoding.ids)])
        with Progress(sum(lengths), "token", label="score", part=True) as progress:
            found = score_block(
                np.concatenate([np.empty(0, np.int64), *ids]), np.cumsum([0, *lengths]),
                self._runner, self._limit, progress, self._score)
        ends = np.cumsum([len(one) for one in ids])
        return [
            TextScores(own, np.array(encoding.offsets, np.int64).reshape(-1, 2), scores)
            for own, encoding, scores in zip(
                ids, encodings, np.split(found, ends[:-1]) if texts else [], strict=True)
        ]
