import io

import pytest

from fxlrd import progress
from fxlrd.pipeline import Pipeline
from fxlrd.progress import TYPICAL, Steps, alone, one_bar, quiet


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_share_done_is_that_of_the_steps_and_never_falls():
    drawn = []
    show = Steps(["capture", "calibrate", "refit"], lambda label, share: drawn.append((label, share)))
    alone(show, "capture", lambda: None)
    assert list(show(iter("abc"), "calibrate")) == ["a", "b", "c"]
    assert list(show("ab", "something else")) == ["a", "b"]
    assert list(show("ab", "refit")) == list(show("ab", "refit"))
    shares = [share for _, share in drawn]
    total = TYPICAL["capture"] + TYPICAL["calibrate"] + TYPICAL["refit"]
    assert shares == sorted(shares)
    assert ("capture", TYPICAL["capture"] / total) in drawn
    assert drawn[-1] == ("refit", 1.0)
    before = (TYPICAL["capture"] + TYPICAL["calibrate"]) / total
    assert {share for label, share in drawn if label == "something else"} == {before}


def test_a_step_that_does_not_happen_is_passed_over():
    drawn = []
    show = Steps(Pipeline.preset("auto").labels, lambda label, share: drawn.append((label, share)))
    list(show("a", "allocate"))
    list(show("a", "recalibrate"))
    assert drawn[-1] == ("recalibrate", 1.0)


def test_one_bar_shows_every_step_on_a_terminal_and_leaves_nothing(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "_tqdm", lambda **options: _bar(terminal, **options))
    with one_bar(["capture", "refit"]) as show:
        list(show(range(3), "capture"))
        list(show(range(3), "refit"))
    lines = terminal.getvalue().split("\r")
    assert any(line.startswith("capture:   0%") for line in lines)
    assert any(line.startswith("refit:") and "<" in line for line in lines)
    assert [line.strip() for line in lines[-2:]] == ["", ""]


def _bar(terminal, **options):
    from tqdm import tqdm

    return tqdm(file=terminal, leave=False, mininterval=0, **options)


@pytest.mark.parametrize("shown", [True, False])
def test_where_no_terminal_is_nothing_is_shown(shown, capsys):
    with one_bar(["capture"], shown) as show:
        assert show is quiet
    assert capsys.readouterr().err == ""
