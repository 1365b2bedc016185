"""fastdmd: few-step distillation of video and image diffusion models."""

__version__ = "0.1.0"
