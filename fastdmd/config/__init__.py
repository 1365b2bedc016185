"""The configuration of a run: one complete TOML, strictly read."""

from fastdmd.config.load import PATHS, dump, load, paths_of, read_saved
from fastdmd.config.schema import Config
from fastdmd.config.toml import ConfigError

__all__ = ["PATHS", "Config", "ConfigError", "dump", "load", "paths_of", "read_saved"]
