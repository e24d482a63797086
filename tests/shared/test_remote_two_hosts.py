"""Two hosts with nothing in common but one bucket: the second loads what the first wrote, after a kill -9."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.remote_hosts.show import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("share", [False, True], ids=["embedded", "shared"])
def test_the_second_host_loads_what_the_first_wrote(tmp_path: Path, share: bool) -> None:
    rows = {row["what"]: row for row in run(tmp_path, share=share, rounds=1)}
    for row in rows.values():
        assert row["wrong"] == row["corruptions"] == 0
        assert row["bytes_max"] <= row["cap_bytes"]
        assert row["remote_hits"] == row["right"]
    assert rows["within the cap"]["right"] == 120
    assert 120 <= rows["two at once"]["right"] < 480
    assert 60 <= rows["twice the cap"]["right"] < 240
    assert rows["killed in mid-upload"]["right"] >= rows["killed in mid-upload"]["uploaded"] >= 10
