"""The package `train-large`: a small core and the plugins that fairseq, Tensor2Tensor and torch-xla load."""

from pathlib import Path

from setuptools import find_packages, setup

# Only the core is installed as a package. fairseq_plugins/ is a folder that
# `fairseq-train --user-dir` takes by its path, as any fairseq user dir is.
setup(
    name="train-large",
    version="0.1.0",
    description="Train large, then compress: budgeted training, pruning and quantizing of Transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.7",
    packages=find_packages(include=["train_large", "train_large.*"]),
    package_data={"train_large.report": ["*.j2"]},
    install_requires=["numpy"],
    extras_require={
        # fairseq-fixed is fairseq 0.12 with the few lines that Python 3.11 asks for; see docs/dependencies.md.
        "fairseq": [
            'fairseq-fixed==0.12.3.1; python_version >= "3.11"',
            'fairseq==0.12.2; python_version < "3.11"',
            "torch>=2.6",
            "omegaconf",
            "tokenizers",
            "psutil",
        ],
        # Beside it tensorflow (1.15, for Python 3.7) or tensorflow or tensorflow-cpu (2.12, for Python 3.11).
        "t2t": ["tensor2tensor==1.15.7", "sacrebleu", "sacremoses"],
        # Beside the extra fairseq, and with torch==2.9.0; on a TPU VM torch-xla[tpu], which brings libtpu.
        "xla": ["torch-xla==2.9.0", "psutil"],
        # The packed file, and running it.
        "pack": ["torch>=2.6", "safetensors", "zstandard", "tokenizers"],
        "hf": ["transformers>=5", "safetensors", "tokenizers", "onnx", "onnxscript", "onnxruntime"],
        "report": ["matplotlib", "rich", "jinja2", "scipy"],
        # The workflow of user_dir_examples/study.
        "study": ["snakemake", "omegaconf", "scipy"],
        "dev": ["pytest", "pytest-xdist", "hypothesis", "tensorboardX", "ruff", "mypy", "pre-commit"],
    },
    entry_points={"console_scripts": ["train-large = train_large.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
