"""aya_min: the Aya Expanse post-training recipe in pure PyTorch."""

__version__ = "0.1.0"
