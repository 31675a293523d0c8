"""Names and numbers of the networks that can be built; imports no torch, so that parsing is quick.

Sources: depths He et al., CVPR 2016, table 1; dilations Chen et al., arXiv 1706.05587, section 3.
"""

# Backbone -> blocks of mod2..mod5, and whether they are bottlenecks.
STRUCTURES: dict[str, tuple[tuple[int, int, int, int], bool]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}

# Output stride -> (stride, dilation) of mod2..mod5. A dilated module does not stride.
STRIDES_AND_DILATIONS = {
    16: ((1, 1), (2, 1), (2, 1), (1, 2)),
    8: ((1, 1), (2, 1), (1, 2), (1, 4)),
}

# Output stride -> dilations of the head's three 3x3 convolutions.
DILATIONS = {16: (6, 12, 18), 8: (12, 24, 36)}

# What `modules.norm.get_norm` builds.
NORMS = ("iabn_sync", "iabn", "abn_sync", "abn", "std")
