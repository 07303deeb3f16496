"""Models for others: cards that are true and parse, snippets that run, other libraries, the hub."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoTokenizer

from preprocess.errors import ConfigError
from preprocess.store import TokenStore, write_array
from tests.support.runs import made_up_stage, pretrained, words
from tests.support.stores import MEASURED, write
from train import data, pretrain
from train.config import FinetuneConfig, PretrainConfig, parse
from train.run_dir import hub
from train.run_dir.hf_folder import folder_problem, open_weights, read_stages, write_card
from train.run_dir.model_card import Model, Score, is_unedited, licence_of, model_card
from train.stages.sharing import push_best

RATE = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sharing")


@pytest.fixture(scope="module")
def store(folder, reviews_store, run_here) -> str:
    """A store with a policy of a mask rate of its own, its control, and the control of that."""
    shutil.copytree(Path(reviews_store).parent, folder / "store")
    prefix = str(folder / "store" / Path(reviews_store).name)
    for shard in TokenStore.open(prefix).shards:
        scores = np.random.default_rng(0).normal(1, 1, shard.num_tokens).astype(np.float16)
        write_array(shard, "mr", "scores", scores, MEASURED)
    for name, flags in (
        ("policy", {"strategy": "selective", "scores": "mr", "mlm_probability": RATE}),
        ("control", {"strategy": "random_matched", "match": "policy"}),
        ("further", {"strategy": "random_matched", "match": "control"}),
    ):
        run_here("preprocess/build_masks.py", *words({"tokens": prefix, "name": name, **flags}))
    return prefix


@pytest.fixture(scope="module")
def masked(folder, store, still_encoder) -> dict[str, Path]:
    """Pre-training runs, by their masks."""
    short = {"max_steps": 2, "eval_max_rows": 8}
    licensed = shutil.copytree(still_encoder, folder / "licensed" / "tiny")
    (licensed / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    runs = {name: pretrained(store, str(licensed), folder / name, mask_index=name, **short)
            for name in ("policy", "further")}
    runs["drawn"] = pretrained(store, still_encoder, folder / "drawn", mlm_probability="0.3:0.15",
                               **short)
    return runs


@pytest.fixture(scope="module")
def flags(folder, masked, labelled_files) -> dict:
    return {"task": "custom", "train_file": labelled_files["train"], "test_file":
            labelled_files["test"], "validation_file": labelled_files["test"],
            "model_name_or_path": masked["policy"] / "hf", "output_dir": folder / "tuned",
            "num_train_epochs": 1, "max_seq_length": 32, "train_batch_size": 16,
            "learning_rate": 3e-3, "seeds": "1,2", "deepspeed_config": "ds_configs/cpu.json"}


@pytest.fixture(scope="module")
def tuned(flags, run_here) -> Path:
    run_here("train/finetune.py", *words(flags))
    return flags["output_dir"]


@pytest.fixture(scope="module")
def scorer(folder, still_encoder, tiny_tokenizer, run_here) -> Path:
    write(folder / "annotated", np.random.default_rng(0).integers(5, 40, (24, 1, 6)).tolist(),
          tokenizer=tiny_tokenizer)
    (shard,) = TokenStore.open(folder / "annotated").shards
    write_array(shard, "", "importance", (np.arange(shard.num_tokens) % 3 == 0).astype(np.uint8),
                {})
    run_here("train/fit_scorer.py", *words({
        "annotations": folder / "annotated", "model_name_or_path": still_encoder,
        "num_train_epochs": 1, "max_seq_length": 32, "output_dir": folder / "scorer",
        "deepspeed_config": "ds_configs/cpu.json"}))
    return folder / "scorer"


# ------------------------------------------------------------------------------- lineage


def test_the_mask_rate_of_an_index_is_that_of_its_build(store, masked):
    policy, further, drawn = (read_stages(masked[name] / "hf")[-1]
                              for name in ("policy", "further", "drawn"))
    assert policy["identity"]["choice"]["rate"] == policy["masks"]["rate"] == RATE
    assert further["masks"]["rate"] == RATE  # two matches away from what had a rate
    assert drawn["identity"]["choice"]["rate"] == "0.3:0.15" and "masks" not in drawn
    opened = TokenStore.open(store)
    assert data.prebuilt_masking(opened, "further").number() == RATE
    assert data.drawn_masking(opened, "random", 0.2).number() == 0.2
    assert data.drawn_masking(opened, "random", data.Schedule(0.3, 0.15, 9)).number() is None
    shard = opened.shards[0]
    for path in Path(shard.prefix).parent.glob("*.control.mask.*"):
        path.rename(path.with_name(f"{path.name}.gone"))
    try:
        assert data.prebuilt_masking(opened, "further").number() is None
    finally:
        for path in Path(shard.prefix).parent.glob("*.gone"):
            path.rename(path.with_name(path.name.removesuffix(".gone")))


# ------------------------------------------------------------------------------- cards


def test_the_card_of_a_classifier(folder, tuned, store):
    rows = [json.loads(line) for line in (tuned / "results.jsonl").read_text().splitlines()]
    values = [row["test_accuracy"] for row in rows]
    for seed in (1, 2):
        card = ModelCard.load(tuned / f"seed_{seed}" / "hf" / "README.md")
        assert card.data.pipeline_tag == "text-classification"
        # Of the encoder's card, through pre-training.
        assert (card.data.library_name, card.data.license) == ("transformers", "apache-2.0")
        assert "apache-2.0. The weights come from the base model" in card.text
        assert card.data.language == "en" and card.data.tags == ["selmask"]
        assert card.data.base_model is None  # a folder of this machine is none for others
        results = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert results == {
            "accuracy": pytest.approx(sum(values) / 2, abs=1e-4),
            "f1": pytest.approx(sum(row["test_macro_f1"] for row in rows) / 2, abs=1e-4)}
        low, high = map(float, re.search(
            r"\| accuracy \| [\d.]+ \| ([\d.]+) to ([\d.]+) \| 2 \| 30 \|", card.text).groups())
        assert (low, high) == pytest.approx(
            Score("accuracy", tuple(values), 30).interval(), abs=1e-4)
        assert "| macro F1 | " in card.text
        for line in (f"# tiny (a local folder), fine-tuned on {rows[0]['task']}",
                     "| Labels | neg, pos |",
                     "60 train examples, 30 validation examples, 30 test examples",
                     "| Masks of stage 1 | selective, mask rate 0.3, scores mr, the same positions "
                     "in each epoch, 80/10/10 % \\[MASK\\]/random/kept |", "@inproceedings{gu-etal",
                     "## Limits", "## Licence", "at most 32 tokens"):
            assert line in card.text, line
        number = TokenStore.open(store).num_tokens
        assert f"reviews: 120 documents, {number:,} tokens" in card.text
        for name in ("README.md", "lineage.json"):
            content = (tuned / f"seed_{seed}" / "hf" / name).read_text()
            assert str(folder) not in content and "/tmp" not in content
        assert open_weights(str(tuned / f"seed_{seed}" / "hf")).stages  # as whole as before


def test_intervals_by_hand():
    """Of seeds, s^2 / 3 = 4.3333e-4 at Student's t 4.30265; of 400 examples, of which 334 of 404
    count as right, 3.5812e-4 at 1.95996.
    """
    low, high = Score("accuracy", (0.80, 0.82, 0.87), 400).interval()
    half = (4.30265 * 4.33333e-4 + 1.95996 * 3.58115e-4) / (4.33333e-4 + 3.58115e-4) ** 0.5
    assert half == pytest.approx(0.09122, abs=1e-5)
    assert (low, high) == pytest.approx((0.83 - half, 0.83 + half), abs=1e-6)
    low, high = Score("accuracy", (1.0, 1.0), 50).interval()
    assert 0.9 < low < 0.96 and high == 1  # seeds that agree prove little
    assert Score("accuracy", (0.2, 0.9), 50).interval() == (0, 1)
    assert Score("accuracy", (0.8,), 9).interval() is None
    assert Score("macro F1", (0.8, 0.9), 9).interval() is None


def test_the_card_of_one_seed_has_no_interval():
    stages = [made_up_stage("finetune", steps=3)]
    text = model_card(stages, "x", Model("text-classification"), [Score("accuracy", (0.8,), 50)])
    assert "| accuracy | 0.8000 | - | 1 | 50 |" in text
    assert "of one fine-tuning seed" in text and "not recorded" in text
    assert "## Scores" not in model_card(stages, "x", Model("text-classification"),
                                         [Score("accuracy", (float("nan"),), 50)])


def test_the_cards_of_the_other_models(masked, scorer):
    card = ModelCard.load(masked["drawn"] / "hf" / "README.md")
    assert card.data.pipeline_tag == "fill-mask" and not card.data.eval_results
    assert "# tiny (a local folder), pre-trained on reviews" in card.text
    assert "stage 1 | random, mask rate 0.3:0.15, drawn anew in each epoch, " in card.text
    card = ModelCard.load(scorer / "hf" / "README.md")
    assert card.data.pipeline_tag == "token-classification"
    assert "token scorer for annotated" in card.text


def test_hub_names_alone_are_base_models():
    for name, base in (("bert-base-uncased", "bert-base-uncased"), ("a/b-c", "a/b-c"),
                       ("pypi:x==1/m", None), ("tiny (a local folder)", None), ("a\nb: c", None)):
        stage = {**made_up_stage(masked_tokens=1), "about": {"base_model": name, "language": "x'"}}
        data = ModelCard(model_card([stage], "x")).data
        assert (data.base_model, data.language, data.license) == (base, None, None)


@pytest.mark.parametrize(("card", "licence"), [
    ("---\nlicense: mit\ntags: [a]\n---\n# x\n---\n", "mit"), ("# x\n---\nlicense: mit\n---\n", ""),
    ("---\nlicense: [mit, gpl]\n---\n", ""), ("---\nlicense: other\n---\n", ""),
    ("---\nlicense: unknown\n---\n", ""), ("---\nlicense: {a\n---\n", ""), ("---\nmit\n---\n", ""),
    ("---\nlicense: 'a\tb'\n---\n", ""), ("", ""), (None, ""),
])
def test_the_licence_of_a_checkpoint_is_that_of_its_card(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path / "README.md") == licence
    stage = {**made_up_stage(masked_tokens=1), "about": {"license": licence or card}}
    made = ModelCard(model_card([stage], "x"))
    assert made.data.license == (licence or None)
    assert ("license" in made.content.split("---")[1]) == bool(licence)
    assert ModelCard(model_card([stage], "x", licence="gpl-3.0")).data.license == "gpl-3.0"


@pytest.mark.parametrize("about", ["text", 3, [1], {"counts": 3, "data": 4}, {"counts": {"a": "b"}},
                                   {"pair": "yes", "base_model": None}])
def test_a_strangers_lineage_breaks_no_card(about):
    stages = [{**made_up_stage("finetune"), "about": about, "masks": about}]
    for kind in ("", "fill-mask", "text-classification", "token-classification"):
        assert ModelCard(model_card(stages, "x", Model(kind, ("<b>",)))).data.license is None


def snippet(hf: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (hf / "README.md").read_text(), re.DOTALL)
    return code


def test_snippets_run(masked, tuned, scorer, monkeypatch, capsys):
    for hf, expected in ((masked["drawn"] / "hf", "token_str"), (scorer / "hf", "'word'"),
                         (tuned / "seed_1" / "hf", "'label': ")):
        monkeypatch.chdir(hf)
        exec(snippet(hf), {})
        assert expected in capsys.readouterr().out


def test_the_snippet_of_a_task_of_pairs_runs(tuned, tmp_path, monkeypatch, capsys):
    hf = shutil.copytree(tuned / "seed_1" / "hf", tmp_path / "hf")
    lineage = json.loads((hf / "lineage.json").read_text())
    lineage["stages"][-1]["about"]["pair"] = True
    (hf / "lineage.json").write_text(json.dumps(lineage))
    write_card(hf)
    assert "text_pair" in snippet(hf)
    monkeypatch.chdir(hf)
    exec(snippet(hf), {})
    assert "'label': " in capsys.readouterr().out


# ------------------------------------------------------------------------------- other libraries


def mean_rows(hf: Path, texts: list[str]) -> np.ndarray:
    """The mean of each text's token rows, by transformers alone."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(hf), AutoModel.from_pretrained(hf).eval()
    with torch.no_grad():
        return np.stack([encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
                         .mean(0).numpy() for text in texts])


TEXTS = ["a good film .", "bad", "the plot was too slow and the actor not funny"]


def test_sentence_transformers_loads_it(masked, tuned):
    library = pytest.importorskip("sentence_transformers")
    for hf in (masked["policy"] / "hf", tuned / "seed_1" / "hf"):
        found = library.SentenceTransformer(str(hf), device="cpu").encode(TEXTS)
        np.testing.assert_allclose(found, mean_rows(hf, TEXTS), atol=1e-5)


def test_setfit_loads_it(masked):
    library = pytest.importorskip("setfit")
    hf = masked["policy"] / "hf"
    model = library.SetFitModel.from_pretrained(str(hf), device="cpu")
    np.testing.assert_allclose(model.model_body.encode(TEXTS), mean_rows(hf, TEXTS), atol=1e-5)
    model.fit(TEXTS[:2] * 4, [1, 0] * 4, num_epochs=1)  # the head alone
    assert model.predict(TEXTS[:2]).tolist() == [1, 0]


# ------------------------------------------------------------------------------- the hub


class FakeApi:
    """The hub's client: keeps what it is sent, and looks at what lies there at that moment."""

    def __init__(self) -> None:  # no token: it is that of the login
        pass

    made: list[tuple[str, bool | None]] = []
    sent: list[tuple[str, Path, str]] = []
    error: Exception | None = None

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool):
        assert exist_ok
        if self.error:
            raise self.error
        self.made.append((repo_id, private))
        from huggingface_hub import RepoUrl

        name = repo_id if "/" in repo_id else f"me/{repo_id}"
        return RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert folder_problem(Path(folder_path)) is None  # whole
        card = (Path(folder_path) / "README.md").read_text()
        self.sent.append((repo_id, Path(folder_path), card))


@pytest.fixture
def api(monkeypatch) -> type[FakeApi]:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    FakeApi.made, FakeApi.sent, FakeApi.error = [], [], None
    return FakeApi


def test_pretraining_pushes_at_the_end(folder, store, still_encoder, tmp_path, api, monkeypatch,
                                       no_process_group):
    typed = {"tokens": store, "model_name_or_path": still_encoder, "output_dir": tmp_path / "run",
             "max_steps": 2, "max_seq_length": 32, "train_batch_size": 8, "eval_max_rows": 8,
             "save_steps": 1, "deepspeed_config": "ds_configs/cpu.json", "push_to_hub": "films"}
    pretrain.main(words({**typed, "dry_run": True}))
    assert not api.made and not api.sent
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train", lambda *args: (_ for _ in ()).throw(ConfigError("ended")))
        with pytest.raises(ConfigError, match="ended"):
            pretrain.main(words(typed))
    assert not api.made and not api.sent
    shutil.copytree(folder / "policy" / "hf", tmp_path / "run" / "hf", dirs_exist_ok=True)
    monkeypatch.setattr(pretrain, "run", lambda config: None)  # it is finished
    pretrain.main(words(typed))
    ((repo, private),), ((name, sent, card),) = api.made, api.sent
    assert (repo, private, name, sent) == ("films", None, "me/films", tmp_path / "run" / "hf")
    assert 'pipeline("fill-mask", model="me/films")' in card  # as others have to write it


def test_fine_tuning_pushes_the_seed_that_validation_chooses(tuned, flags, api, run_here, capsys):
    path = tuned / "results.jsonl"
    before = path.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    rows[1]["validation_accuracy"] = rows[0]["validation_accuracy"] + 0.01
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_here("train/finetune.py", *words({**flags, "push_to_hub": "me/films", "hub_private": True}))
    path.write_text(before)
    ((repo, private),), ((_, sent, card),) = api.made, api.sent
    assert (repo, private) == ("me/films", True) and sent == tuned / "seed_2" / "hf"
    assert 'model="me/films"' in card and "| accuracy |" in card
    said = capsys.readouterr().out
    assert "of 2 seeds, 2 is pushed" in said and "pushed" in said.splitlines()[-1]
    last = {**flags, "epoch": "last", "push_to_hub": "me/films"}
    push_best(parse(FinetuneConfig, words(last)), dict.fromkeys((1, 2), {"validation_accuracy": 0}))
    assert "of 2 seeds, 1 is pushed: the first one" in capsys.readouterr().out
    f1 = {**flags, "metric": "macro_f1", "push_to_hub": "me/films"}
    push_best(parse(FinetuneConfig, words(f1)), {
        seed: {"validation_accuracy": 1 / seed, "validation_macro_f1": seed / 2}
        for seed in (1, 2)})
    assert "2 is pushed: its validation macro F1 is the best" in capsys.readouterr().out
    run_here("train/finetune.py", *words(flags))  # the card is that of the folder again
    assert 'model="."' in (tuned / "seed_2" / "hf" / "README.md").read_text()


def test_a_card_with_a_licence_of_its_own_is_kept(tuned, flags, api, run_here, capsys):
    """The card itself asks for one, to be written before the model is shared."""
    cards = [tuned / f"seed_{seed}" / "hf" / "README.md" for seed in (1, 2)]
    before = cards[0].read_text()
    cards[0].write_text(before.replace("license: apache-2.0", "license: mit"))
    push = {**flags, "epoch": "best", "push_to_hub": "me/films", "seeds": "1"}
    run_here("train/finetune.py", *words(push))
    ((_, sent, card),) = api.sent
    assert sent == cards[0].parent and "license: mit" in card and "| accuracy |" in card
    assert f"{cards[0]}: stays as it was edited" in capsys.readouterr().out
    cards[0].write_text(before)
    cards[1].unlink()
    run_here("train/finetune.py", *words(flags))
    assert "stays as" not in capsys.readouterr().out
    for typed, license in (({"license": "mit"}, "mit"), ({}, "apache-2.0")):  # it is finished
        run_here("train/finetune.py", *words({**flags, **typed}))
        assert all(ModelCard.load(card).data.license == license for card in cards)
    assert cards[0].read_text() == before and "| accuracy |" in cards[1].read_text()


def test_what_is_an_edited_card():
    card = model_card([made_up_stage("finetune")], "x").encode()
    assert is_unedited(card) and is_unedited(card.replace(b"\n", b"\r\n"))
    for edited in (b"", b"mine", b"x" + card, card + b"x",
                   card.replace(b"tags:", b"license: mit\ntags:"),
                   card.rpartition(b"\n<!--")[0], b"\xff" + card):
        assert not is_unedited(edited)


def test_a_push_that_fails_loses_nothing(tuned, flags, api, run_here, capsys):
    api.error = OSError("no network\nand much more")
    run_here("train/finetune.py", *words({**flags, "push_to_hub": "films", "hub_private": True}))
    said = capsys.readouterr().out.splitlines()[-1]
    hf = tuned / "seed_1" / "hf"
    best = hf if f"{hf}:" in said else tuned / "seed_2" / "hf"
    assert said == (f"warning: --push_to_hub films: not pushed (no network); the model is whole in "
                    f"{best}: to push it later, type hf upload films {best} . --private")
    assert folder_problem(best) is None
    assert 'model="films"' in (best / "README.md").read_text()


def test_the_client_itself_says_that_it_is_offline(masked, monkeypatch, capsys):
    """Through huggingface_hub as it is, with nobody at the other end."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub.push(masked["policy"] / "hf", "me/films", False, lambda repo: None)
    assert "warning: --push_to_hub me/films: not pushed (" in capsys.readouterr().out


def test_who_is_not_logged_in_hears_it_at_the_start(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    hub.announce("")
    assert capsys.readouterr().out == ""
    hub.announce("me/films")
    assert "nobody is logged in" in capsys.readouterr().out
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    hub.announce("me/films")
    said = capsys.readouterr().out
    assert "at the end the model is pushed to me/films" in said and "hf_x" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push_to_hub", "a/b/c"], "--push_to_hub a/b/c: must be NAME or USER/NAME"),
        (["--push_to_hub", "a b"], "--push_to_hub a b: must be NAME or USER/NAME"),
        (["--license", "My own"], "--license My own: must be an identifier of the hub"),
        (["--license", "unknown"], "--license unknown: must be an identifier"),
        (["--hub_private"], "--hub_private goes with --push_to_hub REPO"),
    ],
)
def test_wrong_names_are_refused_at_once(words, message):
    tuning = ["--output_dir", "r", "--task", "mr", "--model_name_or_path", "m"]
    training = ["--output_dir", "r", "--tokens", "p", "--model_config", "bert-tiny"]
    for config, needed in ((FinetuneConfig, tuning), (PretrainConfig, training)):
        parse(config, [*needed, "--push_to_hub", "me/films", "--hub_private"])
        with pytest.raises(ConfigError, match=message):
            parse(config, [*needed, *words])
    with pytest.raises(ConfigError, match="--push_to_hub me/films names one repository, and --al"):
        parse(FinetuneConfig, [*tuning, "--push_to_hub", "me/films", "--also", "output_dir=r2"])
