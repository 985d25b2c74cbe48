"""Look into a trained language model's KAN layers: `python -m kansformer.inspect MODEL_DIR --text FILE`."""

from kansformer.inspect.edges import EdgeStatistics, edge_curves, measure
from kansformer.inspect.page import report

__all__ = ["EdgeStatistics", "edge_curves", "measure", "report"]
