"""The objectives, by the name in [method]."""

from fastdmd.methods.dcm import DCM
from fastdmd.methods.dmd import DMD
from fastdmd.methods.flow import Flow
from fastdmd.methods.lcm import LCM
from fastdmd.methods.method import How, Method, MethodConfig
from fastdmd.methods.sid import SiD

__all__ = ["METHODS", "How", "Method", "MethodConfig"]

METHODS = {"dmd": DMD, "sid": SiD, "dcm": DCM, "lcm": LCM, "flow": Flow}
