"""PyTorch's norm modules, computed by the op `fastdmd_kernels.norm`, with the same parameters and names."""

from torch import Tensor, nn

from fastdmd_kernels.norm import group_norm, layer_norm, rms_norm


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.eps, self.weight, self.bias)


class GroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.eps, self.weight, self.bias)


def replace_group_norms(net: nn.Module) -> None:
    """Put ours in the place of PyTorch's, which are new: their weights are not copied."""
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.GroupNorm:
                setattr(parent, name, GroupNorm(child.num_groups, child.num_channels, child.eps))
