"""`alignvlm`, and `python -m alignvlm`: the command line as a process of its own."""

from typing import NoReturn

from alignvlm import cli
from alignvlm.system.leaving import leave


def main() -> NoReturn:
    """Run the command of this process, and end it."""
    leave(cli.main())


if __name__ == "__main__":
    main()
