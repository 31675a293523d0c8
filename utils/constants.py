"""Numbers that several rooms share, written once."""

IGNORE_INDEX = 255  # label of pixels that no loss and no metric of classification looks at
BACKGROUND = 0  # label and training index of the background class

# Per-channel statistics of ImageNet for RGB images scaled to [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
