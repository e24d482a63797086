"""The command line of tests.kv_matrix: wrong words are told, with the right ones."""

from __future__ import annotations

import pytest

from tests.kv_matrix.__main__ import main


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--kinds", "nope"], "argument --kinds: 'nope': there are MHA, GQA, MQA, MFA, MLA"),
        (["--kinds", "MHA,nope,"], "'nope', '': there are"),
        (["--tp", "two"], "argument --tp: 'two' is no positive whole number"),
        (["--pp", "1,0"], "argument --pp: '0' is no positive whole number"),
        (["--blocks", "-16"], "argument --blocks"),
        (["--tokens", "1.5"], "argument --tokens: '1.5' is no positive"),
    ],
)
def test_wrong_words_are_told(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert told in capsys.readouterr().err


def test_right_words_are_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--kinds", "MQA", "--tp", "1", "--pp", "1", "--blocks", "16", "--tokens", "32", "--json"]) == 0
    assert "mismatch 0" in capsys.readouterr().out
