"""The `datasets` library works in a folder of its own."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))  # read when it is first imported
