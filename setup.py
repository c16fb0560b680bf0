"""Packaging. `ssl/ models/ eval/ configs/ pretrain.py` are reached as `gcssl.*` through links inside `gcssl/`."""

from setuptools import find_namespace_packages, setup

FAISS_GPU = "platform_system == 'Linux' and platform_machine == 'x86_64'"

ONNX = ["onnx", "onnxscript", "onnxruntime"]

setup(
    name="gcssl",
    version="0.1.0",
    package_dir={"": "."},  # editable installs put the root on the path: seen from above, a clone is no `gcssl`
    description="Self-supervised pretraining of GC ViT and other hierarchical vision transformers",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["gcssl", "gcssl.*"]),
    package_data={"gcssl.configs": ["**/*.yaml"], "gcssl": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "timm>=1.0.31",  # older GC ViTs mix the images of a batch
        "accelerate>=1.15",
        "datasets>=5.0",
        "omegaconf>=2.3",
        "safetensors>=0.5",
        "pillow>=11.3,<13",  # 13 refuses to posterize to 0 bits, which timm's RandAugment asks for
        "simplejpeg>=1.8",
        "numpy>=2.0",
        "tensorboard>=2.18",
        "tqdm>=4.66",
        f"faiss-gpu>=1.14; {FAISS_GPU}",
        "faiss-cpu>=1.14; platform_system != 'Linux' or platform_machine != 'x86_64'",
    ],
    extras_require={
        "onnx": ONNX,
        "dev": ["pytest>=8", "pytest-xdist", "psutil", "ruff>=0.8", "mypy>=1.13", "setuptools>=75", "wheel", *ONNX],
    },
)
