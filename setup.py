"""Packages qmimic_d2. Environments for `make demo` and `make test` are tools/setup_environment.py's job."""

import os
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = os.path.dirname(os.path.abspath(__file__))

# What an exported detector needs beside its runtime. An installed Detectron2 project has the rest already.
INSTALL_REQUIRES = ["numpy", "Pillow>=7.1", "rich"]

EXTRAS_REQUIRE = {
    # Detectron2 is not among these: under its own name it is not on the package index, and an installed one,
    # however it was built, is used as it is. docs/install.md says how to get it.
    "train": [
        "torch>=2.1",
        "torchvision>=0.16",
        "opencv-python",
        "pycocotools",
        "fvcore",
        "iopath",
        "portalocker>=2.3",  # the lock of a training's OUTPUT_DIR
        "yacs",
        "scipy",  # reads WIDER FACE's ground truth, MATLAB files
        "scikit-learn",  # its 1,797 embedded digits are the images of the Digits configs
        "tensorboard",
        # Detectron2's model_zoo imports pkg_resources, which setuptools announced to drop from 81 on.
        "setuptools<81",
    ],
    "inference": ["onnxruntime", "opencv-python"],  # OpenCV reads videos
    "dev": ["pytest", "pytest-cov", "pytest-xdist", "ruff"],
    "export": ["onnx", "onnxruntime"],
    "report": ["matplotlib", "jinja2"],
    "wandb": ["wandb"],
    "mlflow": ["mlflow"],
}

# What the package reads at run time besides its own code, wherever it stands below qmimic_d2/.
DATA_SUFFIXES = (
    *("c", "css", "csv", "html", "j2", "jinja", "js", "json", "md", "mjs", "npz", "onnx", "svg", "txt", "yaml"),
)


class BuildWithConfigs(build_py):
    """
    Copies configs/ and train_net.py into the built package, so that a wheel finds what a checkout has beside it.
    An editable install needs no copy, and none is ever left in the source tree.
    """

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return
        target = os.path.join(self.build_lib, "qmimic_d2", "configs")
        shutil.rmtree(target, ignore_errors=True)  # an earlier build may hold configs that are gone
        shutil.copytree(os.path.join(ROOT, "configs"), target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        shutil.copy(os.path.join(ROOT, "train_net.py"), os.path.join(self.build_lib, "qmimic_d2"))


def readme():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        return file.read()


setup(
    name="qmimic_d2",
    version="0.1.0",
    description="Quantization Mimic for Detectron2: very tiny object detectors that imitate a quantized teacher",
    long_description=readme(),
    long_description_content_type="text/markdown",
    author="The qmimic_d2 authors",
    license="Apache-2.0",
    packages=find_packages(include=["qmimic_d2", "qmimic_d2.*"]),
    package_data={"qmimic_d2": [f"**/*.{suffix}" for suffix in DATA_SUFFIXES]},
    python_requires=">=3.9,<3.14",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    cmdclass={"build_py": BuildWithConfigs},
    zip_safe=False,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
