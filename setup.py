"""Package map: the top-level folders of the repository are sub-packages of `storyadapter`.

Nothing generic such as `kernels` or `export` is installed as a top-level name. Everything else about the
distribution stands in pyproject.toml.
"""

from setuptools import find_packages, setup

# import name -> folder
MAPPED = {
    "storyadapter.kernels": "kernels",
    "storyadapter.export": "export",
    "storyadapter.engine": "engine",
    "storyadapter.bench": "bench",
}

# users get the trained demo model, not its training
TRAINING = ("storyadapter.demo.training", "storyadapter.demo.training.*")

packages = find_packages(include=["storyadapter", "storyadapter.*"], exclude=TRAINING)
for name, folder in MAPPED.items():
    packages += [name] + [f"{name}.{sub}" for sub in find_packages(folder)]

setup(packages=packages, package_dir={"storyadapter": "storyadapter", **MAPPED})
