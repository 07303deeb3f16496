"""Mask a padded batch of ids, as a training loop without a token store has it.

The rules are those of `STRATEGIES`; a row of the batch is one sequence, window and document.

Letters: `B` rows, `S` slots of a row, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from preprocess.errors import ConfigError
from preprocess.masking.candidates import Sequences, find_candidates
from preprocess.masking.corruption import STANDARD, Corruption, corrupt
from preprocess.masking.strategies import BASELINE, STRATEGIES
from preprocess.text.continuations import continuation_table, find_continuations

LARGEST = float(np.finfo(np.float16).max)
IGNORED = -100  # the label of a position without a loss, in transformers and torch


class MaskedBatch(NamedTuple):
    """input_ids: what the model reads, `(B, S)` int64. labels: original ids at masked positions,
    -100 elsewhere, `(B, S)` int64."""

    input_ids: np.ndarray
    labels: np.ndarray


class BatchMasker:
    """Mask padded batches by one strategy: `masker(input_ids, step=0)`.

    Args:
        tokenizer: the fast tokenizer of transformers that made the ids. Its special tokens, padding
            among them, are never masked.
        strategy: a name in `STRATEGIES`.
        rate: mask rate, in (0, 1].
        seed: of all draws.
        corruption: what the masked tokens become.
        whole_words: mask whole words by the score of their best token; for strategies of scores.
        policy: of a control that follows another strategy: its name.
        options: fields of `Sequences` that the strategy reads: `centre`, `temperature`.
    Raises:
        ConfigError: an unknown strategy or option, or a missing policy; a tokenizer without a mask
            token, or without word boundaries where they are needed.
    """

    def __init__(
        self, tokenizer: Any, strategy: str = BASELINE, *, rate: float = 0.15, seed: int = 42,
        corruption: Corruption = STANDARD, whole_words: bool = False, policy: str | None = None,
        **options: float,
    ) -> None:
        for name in (strategy, policy):
            if name is not None and name not in STRATEGIES:
                raise ConfigError(f"strategy {name!r}: known are {', '.join(STRATEGIES)}")
        record = STRATEGIES[strategy]
        if (policy is None) == ("policy" in record.needs):
            raise ConfigError(
                f"strategy {strategy}: follows another one; name it with policy=..."
                if policy is None else f"strategy {strategy}: follows no policy; leave it out")
        if tokenizer.mask_token_id is None:
            raise ConfigError("the tokenizer has no mask token; take one of a masked language "
                              "model")
        self.policy = None if policy is None else STRATEGIES[policy]
        known = {*record.options, *(self.policy.options if self.policy else ())}
        for name in options.keys() - known:
            raise ConfigError(f"strategy {strategy}: reads no {name}; "
                              + (f"known are {', '.join(sorted(known))}" if known else
                                 "leave it out"))
        self.tokenizer, self.name, self.strategy = tokenizer, strategy, record
        self.rate, self.seed, self.corruption, self.options = rate, seed, corruption, options
        self.vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
        words = whole_words or "words" in record.needs
        self.words = continuation_table(tokenizer) if words else None
        needs = record.needs | (self.policy.needs if self.policy else frozenset())
        self._reads = {"scores": bool(needs & {"scores", "means"}), "match": "match" in needs,
                       "octaves": "frequency" in needs}

    def __call__(
        self, input_ids: Any, step: int, *, scores: Any = None, match: Any = None,
        octaves: np.ndarray | None = None,
    ) -> MaskedBatch:
        """Choose and corrupt the masked positions of a batch.

        Args:
            input_ids: padded ids with special tokens, `(B, S)` integers; a tensor on the CPU will
                do.
            step: number of the batch; each number draws anew, and equal ones draw the same.
            scores: importance of each token, larger is more important, minus infinity is never
                masked, `(B, S)` float, rounded to float16 as in a store; for a strategy of scores,
                and for `typemean` the mean of the token's type.
            match: of a control: where the batch is masked that it is matched to (its
                `labels != -100`), `(B, S)` bool.
            octaves: of `frequency_matched`: floor(log2) of how often each id occurs in the corpus,
                `(V,)` uint8.
        Raises:
            ConfigError: an array that the strategy needs is missing, or one is given that it does
                not read.
            ValueError: a wrong shape, an id outside the vocabulary, a score that is not a number or
                beyond float16, or a rate outside (0, 1].
        """
        ids = np.asarray(input_ids)
        given = {"scores": scores, "match": match, "octaves": octaves}
        for name, needed in self._reads.items():
            if needed != (given[name] is not None):
                raise ConfigError(f"strategy {self.name}: "
                                  + (f"needs {name}" if needed else f"reads no {name}"))
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(f"input_ids are {ids.dtype} {ids.shape}: must be integers (B, S)")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"input_ids go from {ids.min()} to {ids.max()}: must be in "
                             f"[0, {self.vocab_size - 1}], the ids of the tokenizer")
        arrays = {name: np.asarray(array) for name, array in given.items() if array is not None}
        for name, array in arrays.items():
            shape = (self.vocab_size,) if name == "octaves" else ids.shape
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}: must be {shape}")
        if scores is not None:
            large = np.abs(arrays["scores"], dtype=np.float64)
            if (np.isfinite(large) & (large > LARGEST)).any():
                raise ValueError(f"scores reach {large[np.isfinite(large)].max():g}: at most "
                                 f"{LARGEST:g}, the largest float16; divide them")
        chosen = self._choose(ids, step, **arrays)
        flat = ids.astype(np.int64).ravel()
        labels = np.full_like(flat, IGNORED)
        labels[chosen] = flat[chosen]
        flat[chosen] = corrupt(
            flat[chosen], chosen, seed=self.seed, epoch=step,
            mask_id=self.tokenizer.mask_token_id, vocab_size=self.vocab_size,
            all_special_ids=self.tokenizer.all_special_ids, corruption=self.corruption,
        )
        return MaskedBatch(flat.reshape(ids.shape), labels.reshape(ids.shape))

    def _choose(
        self, ids: np.ndarray, step: int, scores: np.ndarray | None = None,
        match: np.ndarray | None = None, octaves: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the masked flat positions, ascending, int64."""
        (num_rows, slots), tokens = ids.shape, ids.ravel()
        offsets, rows = np.arange(num_rows + 1) * slots, np.arange(num_rows)
        words = self.words
        return self.strategy.choose(Sequences(
            offsets=offsets, positions=np.arange(ids.size),
            candidates=find_candidates(tokens, self.tokenizer.all_special_ids),
            rate=self.rate, seed=self.seed, epoch=step, windows=rows, documents=rows,
            scores=None if scores is None else scores.astype(np.float16).ravel(),
            continues_word=None if words is None else find_continuations(tokens, offsets, words),
            matched=None if match is None else np.flatnonzero(match),
            matched_counts=None if match is None else np.count_nonzero(match, axis=1),
            octaves=None if octaves is None else octaves[tokens],
            policy=None if self.policy is None else self.policy.choose, **self.options,
        ))
