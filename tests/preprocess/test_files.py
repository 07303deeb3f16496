"""The readers of JSON and YAML: one sentence for everything that can be wrong with a file."""

from __future__ import annotations

import pytest

from preprocess.errors import ConfigError, DataError
from preprocess.files import parse_json, parse_yaml, read_json, read_yaml


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": "\xff\xfe"}', "not valid JSON.*utf-8"),
        (b"[" * 100_000, "not valid JSON .nested too deeply"),
        (b'{"a": 1, "a": 2}', "key 'a' appears twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[1]", "must hold one JSON object, not list"),
        (b'{"b": 1}', "no 'a' in it"),
    ],
)
def test_a_broken_json_is_named_with_its_remedy(tmp_path, content, match):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.json: .*{match}.*; make it again"):
        read_json(path, keys=["a"])
    with pytest.raises(ConfigError, match=f"^--flag x: .*{match}.*; correct it"):
        read_json(path, "correct it", keys=["a"], error=ConfigError, name="--flag x")


def test_plain_json_is_read(tmp_path):
    (tmp_path / "x.json").write_bytes(b'[1, {"a": null}]')
    assert read_json(tmp_path / "x.json", expected=list) == [1, {"a": None}]
    assert parse_json(b'{"a": 1, "a": NaN}')["a"] != 1  # a line of a user's corpus may be odd


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"a: [", "not valid YAML"),
        (b"a: \xff\xfe", "not valid YAML"),
        (b"[" * 5_000, "not valid YAML"),
        (b"a: 1\nb: {c: 1, c: 2}", "key 'c' appears twice"),
        (b"a: &a {again: *a}", "more than 10,000 entries; write fewer, without aliases"),
        (b"a: !!python/name:os.mkdir", "not valid YAML"),
        (b"a: 2026-99-99", "not valid YAML"),
        (b"- 1", "must hold keys and values, not list"),
    ],
)
def test_a_broken_yaml_is_named_with_its_remedy(tmp_path, content, match):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"(?s)x\.yaml: .*{match}.*; correct it"):
        read_yaml(tmp_path / "x.yaml", "correct it")


def test_plain_yaml_is_read(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &one [1, yes]\nb: *one\n1: x\n'1': y\n")
    assert read_yaml(tmp_path / "x.yaml", "") == {"a": [1, True], "b": [1, True], 1: "x", "1": "y"}
    (tmp_path / "x.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "x.yaml", "") == {} and parse_yaml("text") == "text"
