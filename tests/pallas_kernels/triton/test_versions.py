"""Versions that do not work together are named, with what to do."""

from __future__ import annotations

import importlib.metadata

import pytest

from pallas_kernels.triton import versions

GOOD = dict(versions.TESTED)


def test_what_was_tested_is_accepted():
    assert versions.missing(GOOD.__getitem__) is None


@pytest.mark.parametrize("name", versions.NEEDED)
def test_one_too_old_is_named_with_the_least_that_works(name):
    wanted = ".".join(map(str, versions.NEEDED[name]))
    message = versions.missing((GOOD | {name: "0.1"}).__getitem__)
    assert message is not None
    assert message.startswith(f"{name} 0.1 is too old: {wanted} or newer")


@pytest.mark.parametrize("name", ["jax-triton", "triton"])
def test_a_missing_one_is_to_be_installed(name):
    def installed(asked):
        if asked == name:
            raise importlib.metadata.PackageNotFoundError(asked)
        return GOOD[asked]

    message = versions.missing(installed)
    assert message is not None
    assert message.startswith(f"`pip install '{name}>=")


def test_a_call_without_them_says_so(monkeypatch):
    monkeypatch.setattr(versions, "missing", lambda: "`pip install 'triton>=3.7'`")
    versions._triton_call.cache_clear()
    with pytest.raises(RuntimeError, match="pip install 'triton"):
        versions._triton_call()
