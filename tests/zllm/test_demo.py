"""The demo: a real server and client, right answers end well, a wrong one does not."""

from __future__ import annotations

import pytest

from zllm import demo


def test_right_answers_end_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    shown = capsys.readouterr().out
    assert len(demo.QUESTIONS) >= 5
    for question, answer in demo.QUESTIONS:
        assert question in shown
        assert answer in shown.replace("\n", "") or answer in shown
    assert "listening on" in shown


def test_a_wrong_answer_ends_with_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = (("What is 12 + 7?", "12 + 7 = 20"), demo.QUESTIONS[1])
    monkeypatch.setattr(demo, "QUESTIONS", questions)
    assert demo.main() == 1
    assert "1 of 2 answers are wrong" in capsys.readouterr().out
