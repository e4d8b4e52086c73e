"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny random policy."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))
