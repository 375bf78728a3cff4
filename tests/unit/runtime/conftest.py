"""What Ray remembers of the environment doesn't outlive a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _rays_tokens() -> Iterator[None]:
    """Ends after `monkeypatch` has put the environment back, since it begins before."""
    yield
    from rlaif_ray.runtime.local_ray import tokens_reloaded

    tokens_reloaded()
