"""Texts are split by document, always the same way, and found without their package's code."""

import importlib.metadata
import sys

import pytest

from qjax import texts
from qjax.texts import load_text, plain_text


@pytest.mark.demo
def test_wiki_is_prose_split_by_document():
    documents = texts.wiki()
    evaluation, calibration = load_text("wiki"), load_text("wiki", "calibration")
    assert len(documents) == 106
    assert evaluation.startswith("Anarchism is a political philosophy")
    assert calibration.startswith("Autism is a neurodevelopmental disorder")
    assert len(evaluation) + len(calibration) == sum(map(len, documents)) + 2 * (106 - 2)
    for markup in ("{{", "<ref", "'''", "\n==", "\n*"):
        assert markup not in evaluation
    assert "gensim" not in sys.modules


@pytest.mark.demo
def test_wiki_splits_share_no_paragraph_of_length():
    paragraphs = [
        {p for p in load_text("wiki", split).split("\n\n") if len(p) > 200}
        for split in ("evaluation", "calibration")
    ]
    assert not paragraphs[0] & paragraphs[1]


def test_pydoc_is_split_by_module():
    evaluation, calibration = load_text("pydoc"), load_text("pydoc", "calibration")
    assert len(evaluation) > 50_000
    assert len(calibration) > 200_000
    assert "Abstract Base Classes (ABCs) according to PEP 3119." in evaluation


@pytest.mark.parametrize("split", ["evaluation", "calibration"])
def test_a_file_is_returned_whole(tmp_path, split):
    path = tmp_path / "t.txt"
    path.write_text("Ein Satz.\n\nNoch einer: ü.", encoding="utf-8")
    assert load_text(path, split) == "Ein Satz.\n\nNoch einer: ü."


def test_what_is_no_text_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text 'nope'.*\['pydoc', 'wiki'\]"):
        load_text("nope")
    path = tmp_path / "t.txt"
    path.write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=r"t\.txt: not UTF-8 text .* at byte 1"):
        load_text(path)
    path.write_bytes(b" \n")
    with pytest.raises(ValueError, match="holds no text"):
        load_text(path)
    with pytest.raises(ValueError, match=r"`split` must be .* got 'test'"):
        load_text("pydoc", "test")


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    texts.wiki.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"`pip install --no-deps gensim==4\.4\.0`"):
        load_text("wiki")


def test_nested_markup_goes_as_a_whole():
    markup = """{{Infobox|a={{b|c}}
|d}}
The '''cat''' ({{lang|la|felis}}) is<ref name="x">A {{cite}}.</ref> a [[mammal|beast]].<ref/>
[[File:Cat.jpg|thumb|A [[cat]] at [[home]]]]
{| class="wikitable"
| a || {| inner |}
|}
=== Food ===
* mice
It eats [http://x.org mice].<!-- and
more -->"""
    expected = "The cat () is a beast.\n\nFood\n\nIt eats mice."
    assert plain_text(markup) == expected
