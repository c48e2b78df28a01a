"""Tests of qjax/ptq/store.py: what a killed run left behind."""

import pytest

from qjax.ptq.store import Store, StoreError


def test_a_run_that_was_killed_while_it_began_begins_again(tmp_path):
    (tmp_path / "run.part").write_bytes(b'{"finge')
    Store(tmp_path, "a")
    Store(tmp_path, "a")
    with pytest.raises(StoreError, match="other parameters, data or policy"):
        Store(tmp_path, "b")


@pytest.mark.parametrize("text", ["", "[]", '{"fingerprint'])
def test_what_is_no_run_is_named_with_a_remedy(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(StoreError, match=r"run\.json: is damaged .* delete this one"):
        Store(tmp_path, "a")
    (tmp_path / "run.json").rename(tmp_path / "thesis.txt")
    with pytest.raises(StoreError, match=r"is not empty, and no run to resume\. Choose another"):
        Store(tmp_path, "a")
