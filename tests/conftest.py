"""What every test starts from: no settings of the user's, and examples that are the same at every run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", derandomize=True, print_blob=True, **QUIET)
settings.register_profile("nightly", max_examples=5000, print_blob=True, **QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

KEPT = {"TIERCACHE_DATA"}


@pytest.fixture(autouse=True, scope="session")
def no_settings_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither a settings file nor the default cache directory of whoever runs the suite is touched."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("TIERCACHE_") and name not in KEPT]:
            patch.delenv(name)
        patch.setenv("TIERCACHE_CONFIG", "")
        # Every test has its caches to itself and can look inside them; those of shared directories say share=True.
        patch.setenv("TIERCACHE_SHARE", "false")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache-home")))
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Nightly tests run only when they are asked for."""
    if "nightly" in config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.skip(reason="only in make nightly"))
