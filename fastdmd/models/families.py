"""The network families, by `model.family`."""

from typing import Any

from fastdmd.models.family import Family
from fastdmd.models.sdxl.family import SDXLFamily
from fastdmd.models.wan.family import WanFamily

FAMILIES: dict[str, Family[Any, Any]] = {"wan2.1": WanFamily(), "sdxl": SDXLFamily()}
