"""Multi-modal segmentation on top of the stock nnU-Net v2 pipeline."""

__version__ = "0.1.0"
