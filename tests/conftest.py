"""Fixtures that tests of several packages share."""

import os

os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # servers of tests are on loopback

pytest_plugins = [
    "tests.fixtures.browser", "tests.fixtures.buckets", "tests.fixtures.command", "tests.fixtures.gpu",
    "tests.fixtures.hub", "tests.fixtures.jobs", "tests.fixtures.letters", "tests.fixtures.made_up_run",
]  # fmt: skip
