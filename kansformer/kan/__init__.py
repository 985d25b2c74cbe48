"""The small-network KAN: fit, refine, prune, plot, read as a formula (Liu et al. 2024, arXiv:2404.19756)."""

from kansformer.kan.data import Dataset, create_dataset
from kansformer.kan.network import KAN, KANLayer

__all__ = ["KAN", "Dataset", "KANClassifier", "KANLayer", "KANRegressor", "create_dataset"]


def __getattr__(name: str) -> object:
    if name in ("KANClassifier", "KANRegressor"):  # scikit-learn is an extra, imported where it is used
        from kansformer.kan import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
