"""What lies beside the populations goes when nobody needs it any more, and not before."""

from __future__ import annotations

from pathlib import Path

from collect import beside


def test_sweeping_takes_what_nobody_needs_and_leaves_the_rest(tmp_path: Path) -> None:
    place = tmp_path / "unfinished"
    done, open_, foreign = (place / name for name in ("done.json", "open.json", ".x@elsewhere@1.tmp"))
    beside.sweep(place, stored=lambda name: True)  # there is no folder yet
    place.mkdir()
    for path in (done, open_, foreign):
        path.touch()
    beside.sweep(place, stored=lambda name: name == "done")
    assert set(place.iterdir()) == {open_, foreign}
    beside.discard(open_)
    foreign.unlink()
    beside.sweep(place, stored=lambda name: True)
    assert not list(tmp_path.iterdir())
