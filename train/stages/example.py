"""One held-out text as the model fills its masks in: for people who watch a run.

The text, its masks and its corruption are the same in every evaluation, and in every run over the
same held-out documents, so that only the predictions change.
"""

from __future__ import annotations

import itertools
import os
import string
from typing import Any

import numpy as np
import torch

from train.data import PackedBatch, PackedData

NUM_ROWS = 32  # of the held-out rows, among which the longest text is taken
NUM_TOKENS = 100  # shown at most

# Text of a corpus is text: no character of it may mean something in Markdown or HTML.
_ESCAPED = {ord(mark): f"&#{ord(mark)};" for mark in string.punctuation}


def escape(text: str) -> str:
    """Write any text so that Markdown, tables and HTML show it as it is, on one line."""
    plain = "".join(mark if mark.isprintable() else " " for mark in text)
    return plain.translate(_ESCAPED)


def spell(ids: list[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text before it, with the space that it brings along.

    # un ##like ##ly . -> "un" "like" "ly" "."
    """
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        # The last letter may have been half a letter, shown as another.
        texts.append(now[len(os.path.commonprefix([before, now])):])
        before = now
    return texts


class HeldOutExample:
    """A text of the held-out rows: its batch, and its Markdown table at any step.

    Args:
        held: the held-out rows under the masks to show, as of the only rank: every rank computes
            the same, because under ZeRO-3 all must take part.
        tokenizer: of the store.
    """

    def __init__(self, held: PackedData, tokenizer: Any) -> None:
        table, size = held.table, held.micro_batch_size
        num_rows = min(NUM_ROWS, table.num_rows)
        piece = int(table.piece_lengths[:table.row_offsets[num_rows]].argmax())
        row = int(np.searchsorted(table.row_offsets, piece, side="right")) - 1
        batches = itertools.islice(held.in_order(num_rows), row // size, None)
        self._batch: PackedBatch = next(batches)
        self._tokenizer = tokenizer
        # The slots to show, and which of the batch's masked positions lie in them:
        # slots 5 6 7 of the batch, masked positions 2 6 9 -> the mask at 1 of the text is number 1
        batch, slots = self._batch, self._batch.input_ids.shape[1]
        documents = batch.document_ids[row % size].numpy()
        shown = documents[documents >= 0].min() + piece - int(table.row_offsets[row])
        first, last = np.flatnonzero(documents == shown)[[0, -1]] + row % size * slots
        first, last = first + 1, min(last, first + 1 + NUM_TOKENS)  # without [CLS] and [SEP]
        corrupted = batch.input_ids.flatten()[first:last].clone()
        positions = batch.masked_positions
        self._numbers = torch.nonzero((positions >= first) & (positions < last)).flatten()
        self._places = (positions[self._numbers] - first).tolist()
        self._seen = corrupted.tolist()
        corrupted[self._places] = batch.masked_labels[self._numbers]
        self._original = corrupted.tolist()

    @torch.no_grad()
    def predict(self, engine: Any, device: torch.device) -> list[int]:
        """The model's best guess at each mask of the text; collective."""
        engine.eval()
        guesses = engine(**self._batch.inputs(device), predict=True).cpu()
        engine.train()
        return guesses[self._numbers].tolist()

    def table(self, guesses: list[int]) -> str:
        """The text as written, as the model sees it, and as it fills it in, in Markdown."""
        texts = spell(self._original, self._tokenizer)
        rows = [[escape(text) for text in texts] for _ in range(3)]
        num_right = 0
        for place, guess in zip(self._places, guesses, strict=True):
            truth = self._original[place]
            space = " " if texts[place].startswith(" ") else ""
            for row, token in zip(rows, (truth, self._seen[place], guess), strict=True):
                # The token as it reads at its place, in bold brackets; a wrong one has a sign.
                word = spell([*self._original[:place], token], self._tokenizer)[-1].strip()
                wrong = " &#8800;" if row is rows[2] and token != truth else ""
                row[place] = f"{space}**&#91;{escape(word)}{wrong}&#93;**"
            num_right += guess == truth
        share = f"{num_right} of {len(guesses)} right; the others are marked &#8800;"
        heads = ("original", "masked", f"prediction ({share})")
        lines = [f"| {head} | {''.join(row).strip()} |"
                 for head, row in zip(heads, rows, strict=True)]
        return "\n".join(["| | one held-out text |", "|---|---|", *lines])
