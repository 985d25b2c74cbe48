"""The small-network KAN: fit, refine, prune, plot, read as a formula (Liu et al. 2024, arXiv:2404.19756)."""

from kansformer.kan.fitting import Dataset, create_dataset
from kansformer.kan.network import KAN, KANLayer

__all__ = ["KAN", "Dataset", "KANLayer", "create_dataset"]
