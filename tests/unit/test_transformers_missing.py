"""TransformersKV where what it is about is not installed."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tiercache.errors import ConfigError
from tiercache_connectors.transformers_kv import TransformersKV


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_what_is_not_installed_is_said_with_the_extra_that_has_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("torch", "transformers"):  # found missing in this order, wherever this runs
        monkeypatch.setitem(sys.modules, each, None)
        if each == name:
            break
    else:
        pytest.fail("no such package")
    nothing: Any = object()
    with pytest.raises(ConfigError, match=r"is not installed .*: pip install 'tiercache\[transformers\]'"):
        TransformersKV(nothing, nothing)
