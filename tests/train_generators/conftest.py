"""The data that most of these tests train on."""

from __future__ import annotations

import pytest

from collect.data import ImageSet, load


@pytest.fixture(scope="session")
def images() -> ImageSet:
    """The embedded digits."""
    return load("digits")
