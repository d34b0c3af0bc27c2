"""Passwords and tokens in URLs, wherever in a text they stand."""

from __future__ import annotations

import pytest

from data_pipeline.masking import is_masked, mask


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://user:pw@host:5000/x", "http://user:***@host:5000/x"),
        ("see https://user:p%40w@host, or s3://key:a+b/c@bucket/x", "see https://user:***@host, or s3://key:***@bucket/x"),
        ("postgresql+psycopg2://user:p@w/o:r#d?@host/db", "postgresql+psycopg2://user:***@host/db"),
        ("redis://:pw@host", "redis://:***@host"),
        ("'http://u:p'w\"x@host'", "'http://u:***@host'"),
        ("https://token@host/x", "https://***@host/x"),
        ("postgresql://user@host/db", "postgresql://user@host/db"),
        ("http://host/x?token=abc&page=2", "http://host/x?token=***&page=2"),
        ("https://b/x?X-Amz-Credential=a&X-Amz-Signature=b&n=1", "https://b/x?X-Amz-Credential=***&X-Amz-Signature=***&n=1"),
        ("url: /api?Api_Key=abc (Caused by x)", "url: /api?Api_Key=*** (Caused by x)"),
        ("postgresql:///db?host=h&password=pw", "postgresql:///db?host=h&password=***"),
        ("http://host:5000/users/a@b", "http://host:5000/users/a@b"),
        ("http://host:5000/a and someone@host", "http://host:5000/a and someone@host"),
        ("http://host/a?b=c#d", "http://host/a?b=c#d"),
        ("sqlite:////data/runs/mlflow.db", "sqlite:////data/runs/mlflow.db"),
        ("postgresql:/user:pw@host", "postgresql:/user:***@host"),
        ("'user:pw@host:5000'", "'user:***@host:5000'"),
        ("sbatch --signal=B:USR1@300 '--signal=B:USR1@90' x", "sbatch --signal=B:USR1@300 '--signal=B:USR1@90' x"),
        ("'user:pw@10.0.0.1:5000'", "'user:***@10.0.0.1:5000'"),
        ("data/a:b@c 0.tar:key@7 git@host:path mailto:me@host", "data/a:b@c 0.tar:key@7 git@host:path mailto:me@host"),
    ],
)  # fmt: skip
def test_urls(text: str, masked: str) -> None:
    assert mask(text) == masked
    assert mask(masked) == masked
    assert is_masked(masked) == (text != masked)


def test_known_secrets_are_found_outside_of_urls() -> None:
    assert (
        mask("login of u with long-one failed, a b", "long", "long-one", "a", "") == "login of u with *** failed, a b"
    )
