"""The configuration of a run: one complete TOML, strictly read."""

from fastdmd.config.load import dump, load, resolved
from fastdmd.config.schema import Config
from fastdmd.config.toml import ConfigError

__all__ = ["Config", "ConfigError", "dump", "load", "resolved"]
