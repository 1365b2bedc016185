"""Video sparse attention (VSA, arXiv 2505.13389): contract, definition, registered stages, backends."""

from fastdmd_kernels.vsa.api import topk_for, video_sparse_attention
from fastdmd_kernels.vsa.reference import vsa_reference

__all__ = ["topk_for", "video_sparse_attention", "vsa_reference"]
