"""The build step that pyproject.toml cannot express; name, version and dependencies are stated there.

`ds_configs/` and `launch/` are top-level folders of a checkout. A wheel carries copies of them inside the package, in
`alignvlm/_resources/`, where `alignvlm.resources` finds them.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("ds_configs", "launch")


class BuildWithResources(build_py):
    """Copies the top-level folders into the built package; an editable install reads them in the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in FOLDERS:
                self.copy_tree(folder, str(Path(self.build_lib, "alignvlm", "_resources", folder)))


setup(cmdclass={"build_py": BuildWithResources})
