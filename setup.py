from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="nnunet-multimodal",
    version="0.1.0",
    description="Multi-modal segmentation as trainers and commands on top of the stock nnU-Net v2 pipeline",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["nnunet_multimodal", "nnunet_multimodal.*"]),
    # extension/ is no package: nnU-Net imports the one module in it by path (design.md, "How the plugin attaches").
    package_data={
        "nnunet_multimodal": ["py.typed", "extension/*.py", "evaluation/*.jinja", "demo/*.jinja", "relabel/*.jinja"]
    },
    install_requires=[
        "nnunetv2>=2.8,<2.9",  # the range whose trainer and predictor hooks this code was checked against
        "torch!=2.9.*",  # nnU-Net excludes it: slow and memory-hungry 3D convolutions under AMP (pytorch#166122)
        "numpy",
        "scipy",
        "nibabel",
        "safetensors",
        "connected-components-3d",  # left and right organs, piece by piece (data/side_checks.py)
        "scikit-image",  # pieces of an image found without labels (data/structures.py)
        "matplotlib",
        "monai>=1.4",  # areas of surface pieces in nnunet_multimodal evaluate --surface area
        "jinja2",
        "tqdm",
    ],
    extras_require={
        # text encoders for nnunet_multimodal embed; transformers is BiomedCLIP's tokenizer and text tower
        "text": ["open_clip_torch>=3.0,<4", "transformers"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "open_clip_torch>=3.0,<4"],
    },
    entry_points={"console_scripts": ["nnunet_multimodal = nnunet_multimodal.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
