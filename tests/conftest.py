"""Fixtures that tests of several packages share."""

pytest_plugins = [
    "tests.fixtures.buckets", "tests.fixtures.command", "tests.fixtures.gpu", "tests.fixtures.letters",
    "tests.fixtures.made_up_run",
]  # fmt: skip
