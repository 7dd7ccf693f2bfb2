"""Exit codes, messages and bars that all command lines share."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from generators.commandline import Interrupted, progress, run
from generators.errors import ConfigError


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """`run` sets up logging for a whole program; the tests want theirs back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def _raises(error: BaseException) -> None:
    raise error


def test_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: print("result")) == 0
    assert capsys.readouterr() == ("result\n", "")


def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    message = "x [bold] " + "long " * 60 + "end"
    assert run(lambda: _raises(ConfigError(message))) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


@pytest.mark.parametrize("error", [Interrupted("3 of 5 files done"), KeyboardInterrupt()])
def test_interrupted(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: _raises(error)) == 3
    assert "run the same command again" in capsys.readouterr().err


def test_terminate_signal_is_an_interruption() -> None:
    """SIGTERM ends with code 3, and the handler of the caller is back afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    assert run(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 3
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An error of the system about a named file names it; one about no file keeps its traceback."""
    assert run(lambda: (tmp_path / "nowhere" / "file").write_text("")) == 2
    printed, said = capsys.readouterr()
    assert (
        printed == ""
        and said.startswith(f"error: {tmp_path / 'nowhere' / 'file'}: No such file")
        and said.count("\n") == 1
    )
    with pytest.raises(OSError, match="no file"):
        run(lambda: _raises(OSError("no file")))


def test_our_own_faults_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda: print(1 // 0))


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """The bar goes to stderr and counts what it was told; it can be handed on as a callback."""
    with progress("collecting", 4) as bar:
        bar.advance()
        bar(2.0)
        bar.describe("collected")
    out, err = capsys.readouterr()
    assert out == ""
    assert "collected" in err
    assert "3/4" in err
