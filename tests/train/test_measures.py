"""Scores by a network, each beside its worked example and an implementation of its own."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.errors import ConfigError
from preprocess.progress import Progress
from preprocess.text.continuations import continuation_table
from tests.support.models import tiny_config
from train import engine
from train.config import ScoreConfig
from train.model import FAMILIES, PackedMaskedLM, first_slot_only, token_rows
from train.stages import measures, scoring
from train.stages.inference import IdLists, Runner, Template, one_by_one
from train.stages.measures import FLOOR, MEASURES, WordPasses, hash_windows, mask_words

MASK = 4
BERT = Template((2,), (), (3,), 0)


def value(score):
    """The gradient that a stored score means."""
    return FLOOR * 2.0 ** np.asarray(score, np.float64)


def make_runner(model, template=BERT, pad=0, **options):
    tokenizer = SimpleNamespace(pad_token_id=pad, mask_token_id=MASK)
    return Runner(model, template, tokenizer, torch.device("cpu"),
                  options.pop("batch_tokens", 64), **options)


def make_block(seed=0, lengths=(9, 1, 4, 4, 0, 12, 2, 30, 7), vocab=40):
    offsets = np.cumsum([0, *lengths])
    tokens = np.random.default_rng(seed).integers(5, vocab, offsets[-1]).astype(np.uint16)
    return tokens, offsets


def score(runner, tokens, offsets, how, limit=14):
    return scoring.score_block(tokens, offsets, runner, limit, Progress(99), how)


def windows_of(tokens, offsets, limit=14):
    return [tokens[a:b] for a, b in zip(*scoring.cut_windows(offsets, limit), strict=True)]


# --------------------------------------------------------------------------- gradient


class MeanOfEmbeddings(torch.nn.Module):
    """Weights (1, 0.5) on the mean of the embeddings against a class of logit 0."""

    config = SimpleNamespace()

    def __init__(self):
        super().__init__()
        rows = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [2.0, 1.0], [0.0, 1.0]])
        self.embedding = torch.nn.Embedding.from_pretrained(rows)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids):
        logit = self.embedding(input_ids).mean(1) @ torch.tensor([1.0, 0.5])
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(logit), logit], -1))


def test_gradient_by_hand():
    """The values of the margin, not of its probability, and a floor where there is none."""
    runner = make_runner(MeanOfEmbeddings(), Template((), (), (), 0),
                         compute=measures.gradient_size)
    tokens = np.array([1, 2, 3, 0, 0, 0], np.uint16)
    found = score(runner, tokens, np.array([0, 3, 6]), scoring.each_token)
    np.testing.assert_allclose(value(found[:3]), [1 / 3, 5 / 6, 1 / 6], rtol=4e-3)
    assert found[3:].tolist() == [0, 0, 0], "no gradient is the least score"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_autograd_on_one_sentence(family):
    """One sentence in one pass, without batch, mask or subset; the rows keep their gradient."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = tiny_config(family)
    config.num_labels = 3
    plain = AutoModelForSequenceClassification.from_config(config).eval()
    fast = AutoModelForSequenceClassification.from_config(config).eval()
    fast.load_state_dict(plain.state_dict())
    first_slot_only(fast)
    fast.requires_grad_(False)
    tokens, offsets = make_block(vocab=60)
    alone = []
    for window in windows_of(tokens, offsets):
        ids = torch.tensor([[2, *window.tolist(), 3]])
        held = []
        hook = token_rows(plain).register_forward_hook(lambda *made, to=held: to.append(made[-1]))
        logits = plain(input_ids=ids).logits[0]
        hook.remove()
        held[0].retain_grad()
        order = logits.argsort(descending=True)
        (logits[order[0]] - logits[order[1]]).backward()
        alone += (held[0].grad * held[0]).sum(-1).abs()[0, 1:-1].tolist()
    for options in ({"batch_tokens": 16}, {"batch_tokens": 4096, "min_width": 16}):
        runner = make_runner(fast, pad=config.pad_token_id, compute=measures.gradient_size,
                             **options)
        found = value(score(runner, tokens, offsets, scoring.each_token))
        np.testing.assert_allclose(found, np.maximum(alone, FLOOR), rtol=1.2e-2, atol=1e-5)
    assert np.median(alone) > 1e-4, "a step along a row that is normalized alone is nothing"
    assert all(parameter.grad is None for parameter in fast.parameters())


# --------------------------------------------------------------------------- surprise


def masked_lm(family="bert", seed=0):
    from transformers import AutoModelForMaskedLM

    torch.manual_seed(seed)
    return PackedMaskedLM(AutoModelForMaskedLM.from_config(tiny_config(family)).eval(), {}, False)


def surprise_runner(*models, **options):
    pad = models[0].hf.config.pad_token_id
    return make_runner(torch.nn.ModuleList(models), pad=pad,
                       **{**measures.NETWORKS["mlm"].run, **options})


@pytest.fixture(scope="module")
def words(tiny_tokenizer):
    """The word table, and which ids continue a word."""
    table = continuation_table(tiny_tokenizer)
    names = tiny_tokenizer.convert_ids_to_tokens(range(len(tiny_tokenizer)))
    return table, {i for i, name in enumerate(names) if name.startswith("##")}


def pieces_of(window, continuing):
    """Number of the word and of the piece of each token, counted by hand."""
    found = []
    for i, token in enumerate(window.tolist()):
        inside = i > 0 and token in continuing
        word, piece = found[-1] if i else (-1, 0)
        found.append((word, piece + 1) if inside else (word + 1, 0))
    return found


def predict(model, window, masked, place):
    """-ln P at one place, by transformers, with some places masked."""
    ids = [2, *(MASK if i in masked else int(t) for i, t in enumerate(window)), 3]
    with torch.no_grad():
        logits = model.hf(input_ids=torch.tensor([ids])).logits[0, place + 1]
    return -logits.log_softmax(-1)[int(window[place])].item()


def exact(model, window, continuing, whole_words):
    """Full pseudo-likelihood: one token, or one word, at a time."""
    where, result = pieces_of(window, continuing), []
    for i, (word, piece) in enumerate(where):
        masked = {j for j, (w, p) in enumerate(where) if w == word and (whole_words or p >= piece)}
        result.append(predict(model, window, masked, i))
    return result


def by_passes(model, window, continuing, whole_words, num_passes, first):
    """The twin for any number of passes."""
    where, result = pieces_of(window, continuing), []
    for i, (word, piece) in enumerate(where):
        masked = {j for j, (w, p) in enumerate(where)
                  if (w - word) % num_passes == 0 and (whole_words or p >= piece)}
        result.append(predict(model, window, masked, i))
    return result


def split_words_block(words, seed=1, num_sentences=12, longest=14):
    """Sentences in which every third token continues a word."""
    generator = np.random.default_rng(seed)
    continuing = np.array(sorted(words[1]))
    lengths = generator.integers(1, longest, num_sentences)
    offsets = np.cumsum([0, *lengths])
    tokens = generator.integers(5, 40, offsets[-1])
    tokens = np.where(generator.random(offsets[-1]) < 0.33,
                      generator.choice(continuing, offsets[-1]), tokens)
    return tokens.astype(np.uint16), offsets


def test_passes_by_hand():
    """Five words, three passes; a word of three pieces is asked for piece by piece."""
    def masked_of(ids, continues, **options):
        window = IdLists.of([ids])
        made = mask_words(window, np.array(continues, bool), np.array([0]), mask_id=MASK, **options)
        inputs = [made.inputs[i] for i in range(len(made.inputs))]
        targets = [made.targets[s : s + n].tolist() for s, n in
                   zip(made.inputs.starts, made.inputs.lengths, strict=True)]
        return inputs, targets

    inputs, targets = masked_of([10, 11, 12, 13, 14], [0] * 5, num_passes=3, whole_words=False)
    assert inputs == [[4, 11, 12, 4, 14], [10, 4, 12, 13, 4], [10, 11, 4, 13, 14]]
    assert targets == [[10, -1, -1, 13, -1], [-1, 11, -1, -1, 14], [-1, -1, 12, -1, -1]]
    inputs, targets = masked_of([10, 11, 12, 13], [0, 1, 1, 0], num_passes=2, whole_words=False)
    assert inputs == [[4, 4, 4, 13], [10, 4, 4, 13], [10, 11, 4, 13], [10, 11, 12, 4]]
    assert targets == [[10, -1, -1, -1], [-1, 11, -1, -1], [-1, -1, 12, -1], [-1, -1, -1, 13]]
    inputs, targets = masked_of([10, 11, 12, 13], [0, 1, 1, 0], num_passes=2, whole_words=True)
    assert inputs == [[4, 4, 4, 13], [10, 11, 12, 4]]
    assert targets == [[10, 11, 12, -1], [-1, -1, -1, 13]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=6),
       st.integers(2, 9), st.booleans(), st.integers(0, 99))
def test_every_token_is_asked_once(windows, num_passes, whole_words, seed):
    lists = IdLists.of([range(5, 5 + len(window)) for window in windows])
    continues = np.concatenate([[False, *window[1:]] for window in windows])
    first = np.random.default_rng(seed).integers(0, 99, len(windows))
    made = mask_words(lists, continues, first, num_passes, whole_words, MASK)
    asked = made.targets >= 0
    assert sorted(made.places[asked]) == list(range(len(continues)))
    assert (made.targets[asked] == lists.flat[made.places[asked]]).all()
    assert (made.inputs.flat[asked] == MASK).all(), "what is asked for is not seen"
    seen = made.inputs.flat != MASK
    assert (made.inputs.flat[seen] == lists.flat[made.places[seen]]).all()
    assert (np.add.reduceat(asked, made.inputs.starts) > 0).all(), "no pass for nothing"


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_surprise_is_the_exact_pseudo_likelihood_of_short_sentences(words, family, whole_words):
    model = masked_lm(family)
    tokens, offsets = split_words_block(words)
    alone = [x for w in windows_of(tokens, offsets) for x in exact(model, w, words[1], whole_words)]
    how = measures.bind("surprise", WordPasses(14, whole_words, words[0]))
    for options in ({"batch_tokens": 16}, {"batch_tokens": 4096, "min_width": 18}):
        found = score(surprise_runner(model, **options), tokens, offsets, how)
        np.testing.assert_allclose(found.astype(float), alone, rtol=1e-3, atol=1e-3)
    assert np.std(alone) > 0.3


@pytest.mark.parametrize("whole_words", [False, True])
def test_surprise_equals_its_twin(words, whole_words):
    model = masked_lm()
    tokens, offsets = split_words_block(words, longest=40)
    how = measures.bind("surprise", WordPasses(3, whole_words, words[0]))
    windows = windows_of(tokens, offsets)
    first = hash_windows(IdLists.of(windows))
    alone = [x for w, f in zip(windows, first, strict=True)
             for x in by_passes(model, w, words[1], whole_words, 3, f)]
    found = score(surprise_runner(model), tokens, offsets, how)
    np.testing.assert_allclose(found.astype(float), alone, rtol=1e-3, atol=1e-3)
    longest = max(windows, key=len)
    assert not np.allclose(by_passes(model, longest, words[1], whole_words, 3, 0),
                           exact(model, longest, words[1], whole_words), rtol=1e-3)


def test_surprise_does_not_depend_on_batches_or_precision(words):
    model = masked_lm()
    tokens, offsets = split_words_block(words, num_sentences=60, longest=30)
    how = measures.bind("surprise", WordPasses(7, False, words[0]))
    plain = score(surprise_runner(model, cut=one_by_one), tokens, offsets, how).astype(float)
    whole = score(surprise_runner(model, batch_tokens=8192), tokens, offsets, how).astype(float)
    np.testing.assert_allclose(whole, plain, rtol=1e-3, atol=1e-3)
    for dtype, far in ((torch.float16, 2e-2), (torch.bfloat16, 2e-1)):
        half = score(surprise_runner(model, half=dtype), tokens, offsets, how).astype(float)
        np.testing.assert_allclose(half, plain, rtol=far, atol=far)
        assert not np.array_equal(half, plain), "it was another precision"
    again = score(surprise_runner(model), tokens, offsets, how).astype(float)
    np.testing.assert_allclose(again, plain, rtol=1e-3, atol=1e-3)
    # A sentence has the same score wherever it stands.
    start, end = offsets[20], offsets[41]
    part = score(surprise_runner(model), tokens[start:end], offsets[20:42] - start, how)
    np.testing.assert_allclose(part.astype(float), plain[start:end], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_score(words, lengths):
    how = measures.bind("surprise", WordPasses(7, False, words[0]))
    tokens, offsets = make_block(lengths=lengths)
    assert score(surprise_runner(masked_lm()), tokens, offsets, how).shape == (0,)


def test_ranks_share_the_passes_of_one_sentence(words, monkeypatch):
    """Tokens of one window come from several ranks."""
    model = masked_lm()
    tokens, offsets = split_words_block(words, num_sentences=3)
    how = measures.bind("surprise", WordPasses(7, False, words[0]))
    whole = score(surprise_runner(model, cut=one_by_one), tokens, offsets, how)
    parts = []
    for rank in (0, 1, 2, 0):  # the first one again, now that all shares are there
        monkeypatch.setattr(engine, "ranks", lambda rank=rank: engine.Ranks(rank, 3, rank))
        monkeypatch.setattr(engine, "gather_objects", lambda mine: parts.append(mine) or parts)
        together = score(surprise_runner(model, cut=one_by_one), tokens, offsets, how)
    assert np.array_equal(together, whole)
    assert all(np.unpackbits(bits, count=len(tokens)).sum() < len(tokens) for bits, _ in parts)


@pytest.mark.slow
def test_seven_passes_rank_as_the_exact_score(words):
    """200 sentences of a language whose next word depends on the last one, and a model of it."""
    from scipy.stats import spearmanr

    generator = np.random.default_rng(0)
    plain = np.array([i for i in range(5, 40) if i not in words[1]])
    after = np.array([generator.choice(plain, 4, replace=False) for _ in range(40)])
    likely = np.array([0.6, 0.25, 0.1, 0.05])

    def sentences(count, length):
        rows = [generator.choice(plain, count)]
        for _ in range(length - 1):
            rows.append(after[rows[-1], generator.choice(4, count, p=likely)])
        return np.stack(rows, 1)

    model = masked_lm()
    model.hf.train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(600):
        text = torch.from_numpy(sentences(64, 24))
        masked = torch.rand(text.shape) < 0.15
        ids = torch.nn.functional.pad(text.masked_fill(masked, MASK), (1, 0), value=2)
        ids = torch.nn.functional.pad(ids, (0, 1), value=3)
        logits = model.hf(input_ids=ids).logits[:, 1:-1]
        loss = torch.nn.functional.cross_entropy(logits[masked], text[masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.hf.eval()
    tokens = sentences(200, 24).astype(np.uint16).reshape(-1)
    offsets = np.arange(0, len(tokens) + 1, 24)

    def found(num_passes):
        how = measures.bind("surprise", WordPasses(num_passes, False, words[0]))
        return score(surprise_runner(model, batch_tokens=8192), tokens, offsets, how, limit=24)

    exact_score = found(24)
    assert exact_score.mean(dtype=np.float64) < 0.7 * np.log(len(plain)), "it reads the context"
    rank = {k: spearmanr(found(k), exact_score).statistic for k in (2, 7)}
    print(f"loss {loss.item():.2f}, rank correlation with the exact score {rank}")
    assert rank[7] > 0.99 and rank[7] > rank[2]


def test_excess_is_a_difference(words):
    """Model 2.3 and reference 1.0 make 1.3; here, with real losses."""
    model, reference = masked_lm(), masked_lm(seed=1)
    tokens, offsets = split_words_block(words)
    how = measures.bind("excess", WordPasses(7, False, words[0]))
    losses = [score(surprise_runner(one), tokens, offsets, how).astype(float)
              for one in (model, reference)]
    found = score(surprise_runner(model, reference), tokens, offsets, how).astype(float)
    np.testing.assert_allclose(found, losses[0] - losses[1], atol=6e-3)
    assert found.min() < 0 < found.max()


# --------------------------------------------------------------------------- records and flags


def test_the_flag_lists_the_networks():
    import typing

    allowed = typing.get_args(typing.get_type_hints(ScoreConfig)["measure"])
    by_network = [name for name, one in MEASURES.items() if one.needs and
                  one.needs[0] in measures.NETWORKS]
    assert sorted(allowed) == sorted(by_network)
    assert {name for name in by_network if MEASURES[name].boundary} == {"scorer", "excess"}


@pytest.mark.parametrize(("flags", "message"), [
    ({"num_passes": 1, "measure": "surprise"}, "--num_passes 1: must be 2 or more"),
    ({"num_passes": 5}, "--num_passes 5: has no use with --measure scorer.*surprise or excess"),
    ({"whole_words": True, "measure": "gradient"}, "--whole_words True: has no use"),
    ({"measure": "excess"}, "--measure excess needs --reference MODEL"),
    ({"reference": "R", "measure": "surprise"}, "--reference R: has no use.*--measure excess"),
    ({"measure": "gradient", "dtype": "fp16"}, "--dtype fp16: .*fp32; leave --dtype out"),
    ({"measure": "gradient", "dtype": "bf16"}, "--dtype bf16: .*fp32; leave --dtype out"),
])
def test_flags_that_do_not_fit_together(flags, message):
    with pytest.raises(ConfigError, match=message):
        ScoreConfig(model_name_or_path="M", tokens="P", name="n", **flags)
