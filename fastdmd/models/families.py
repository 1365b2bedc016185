"""The network families, by `model.family`."""

from fastdmd.models.family import AnyFamily
from fastdmd.models.sdxl.family import SDXLFamily
from fastdmd.models.wan.family import WanFamily

FAMILIES: dict[str, AnyFamily] = {"wan2.1": WanFamily(), "sdxl": SDXLFamily()}
