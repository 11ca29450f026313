"""Settings from the environment: their order, and errors that name the key."""

from __future__ import annotations

from typing import Any

import pytest

from triform.errors import ConfigurationError
from triform.runtime import RuntimeOptions
from triform.settings import Settings


@pytest.mark.parametrize(
    ("environ", "explicit", "expected"),
    [
        ({}, {}, Settings()),
        ({"PATH": "/bin", "HOME": "/"}, {}, Settings()),
        ({"TRIFORM_REPOSITORY": "models", "TRIFORM_THREADS": "2"}, {}, Settings(repository="models", threads=2)),
        ({"TRIFORM_REPOSITORY": "models"}, {"repository": "others"}, Settings(repository="others")),
        ({"TRIFORM_REPOSITORY": "models"}, {"repository": None}, Settings(repository="models")),
        ({}, {"default_model": "m"}, Settings(default_model="m")),
        ({"TRIFORM_GPU_MEM_LIMIT": "4294967296"}, {}, Settings(gpu_mem_limit=4 << 30)),
        ({"TRIFORM_REQUIRED_PROVIDERS": "A, B,"}, {}, Settings(required_providers=("A", "B"))),
        ({"TRIFORM_REQUIRED_PROVIDERS": ""}, {}, Settings()),
    ],
)
def test_explicit_then_environment_then_default(environ: dict[str, str], explicit: dict[str, Any], expected: Settings) -> None:
    assert Settings.from_env(environ, **explicit) == expected


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("TRIFORM_THREADS", "two"),
        ("TRIFORM_THREADS", "1.5"),
        ("TRIFORM_THREADS", "NaN"),
        ("TRIFORM_THREADS", ""),
        ("TRIFORM_THREADS", "0"),
        ("TRIFORM_THREADS", "-1"),
        ("TRIFORM_GPU_MEM_LIMIT", "0"),
        ("TRIFORM_PROVIDER", "gpu"),
        ("TRIFORM_TYPO", "there are TRIFORM_REPOSITORY, TRIFORM_CACHE"),
    ],
)
def test_a_bad_value_stops_the_start_and_names_its_key(key: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{key}: ") as error:
        Settings.from_env({key: text})
    assert text in str(error.value)


def test_a_bad_explicit_value_is_named_as_it_was_given() -> None:
    with pytest.raises(ConfigurationError, match=r"^provider: expected .*, got 'gpu'"):
        Settings.from_env({"TRIFORM_PROVIDER": "cpu"}, provider="gpu")


def test_the_runtime_gets_its_share() -> None:
    settings = Settings(provider="cuda", required_providers=("CUDAExecutionProvider",), threads=3, gpu_mem_limit=1 << 30)
    assert settings.runtime() == RuntimeOptions(
        provider="cuda", required_providers=("CUDAExecutionProvider",), threads=3, gpu_mem_limit=1 << 30
    )
