"""What tests of actors share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlaif_ray.runtime.supervision import Watch


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Ends with the test, also where it fails: it would go on watching in the process of the tests that follow."""
    watch = Watch()
    yield watch
    watch.stop()
