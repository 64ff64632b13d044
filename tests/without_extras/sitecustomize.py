"""Where this is on the path, programs run as in an installation without the extras, which takes seconds less to import.

TorchMetrics, a part of Lightning, imports Transformers and Matplotlib wherever they are installed.
"""

import importlib.metadata
import sys

EXTRAS = ("transformers", "matplotlib", "accelerate")

version = importlib.metadata.version


def version_without_extras(name: str) -> str:
    if name in EXTRAS:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)


importlib.metadata.version = version_without_extras
sys.modules.update(dict.fromkeys(EXTRAS))  # None: importing it is a ModuleNotFoundError
