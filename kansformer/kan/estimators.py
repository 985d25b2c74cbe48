"""KANs as scikit-learn estimators: `fit`, `predict`, pipelines, grid search, cross-validation.

Args:
    hidden: nodes of the hidden layers, one number or one for each ([sums, products] for product nodes).
    grid_size, spline_order, base_activation: of `KAN`.
    steps: L-BFGS steps of 20 iterations, or Adam batches.
    optimizer, lr, batch_size, lamb, lamb_entropy: of `KAN.fit`. `lamb` is 0.03, not 0: data have noise, and without the
        penalty a network of this size fits it. Samples of a smooth function without noise are fitted closer with 0.
    random_state: seed of the parameters and batches: an int, a numpy RandomState, or None.

Attributes:
    network_: the fitted `KAN` (float64), on standardised inputs (and a regressor's targets): its own outputs, plots and
        formulas are in these units, `KANRegressor.symbolic_formula` in the data's.
    history_: what `KAN.fit` returned.
    mean_, scale_: of the inputs.  n_features_in_, feature_names_in_: as in scikit-learn.
"""

from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError('the estimators need scikit-learn: pip install "kansformer[science]"') from error

from kansformer.kan.data import Dataset
from kansformer.kan.fitting import warn_outside
from kansformer.kan.formula import _sympy, finished
from kansformer.kan.network import KAN


class _KANEstimator(BaseEstimator):
    """What both estimators share: parameters, standardised inputs, the network."""

    def __init__(
        self,
        hidden=5,
        grid_size=5,
        spline_order=3,
        base_activation="silu",
        steps=20,
        optimizer="lbfgs",
        lr=1e-2,
        batch_size=None,
        lamb=0.03,
        lamb_entropy=2.0,
        random_state=0,
    ):
        self.hidden = hidden
        self.grid_size = grid_size
        self.spline_order = spline_order
        self.base_activation = base_activation
        self.steps = steps
        self.optimizer = optimizer
        self.lr = lr
        self.batch_size = batch_size
        self.lamb = lamb
        self.lamb_entropy = lamb_entropy
        self.random_state = random_state

    def _fit_network(self, X: np.ndarray, labels: np.ndarray, outputs: int, loss=None) -> None:
        from sklearn.utils import check_random_state

        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.mean_, scale = X.mean(0), X.std(0)
        self.scale_ = np.where(scale > 1e-12 * np.abs(self.mean_), scale, 1.0)
        hidden = [self.hidden] if isinstance(self.hidden, Integral) else self.hidden
        if not np.iterable(hidden):
            raise ValueError(f"hidden is {hidden!r}: it must be a number of nodes, or a list, one a layer")
        self.network_ = KAN(
            [X.shape[1], *hidden, outputs],
            grid_size=self.grid_size,
            spline_order=self.spline_order,
            base_activation=self.base_activation,
            seed=seed,
            dtype=torch.float64,
        )
        self.history_ = self.network_.fit(
            Dataset(self._standardise(X), torch.from_numpy(labels)),
            optimizer=self.optimizer,
            steps=self.steps,
            lr=self.lr,
            batch_size=self.batch_size,
            lamb=self.lamb,
            lamb_entropy=self.lamb_entropy,
            loss=loss,
            seed=seed,
            progress=False,
        )
        self.n_iter_ = max(1, len(self.history_["train_loss"]))

    def _standardise(self, X: np.ndarray) -> Tensor:
        return torch.from_numpy((X - self.mean_) / self.scale_)

    @torch.no_grad()
    def _outputs(self, X) -> np.ndarray:
        check_is_fitted(self)
        x = self._standardise(validate_data(self, X, reset=False, dtype=np.float64))
        warn_outside(self.network_, x, "rows")
        return self.network_(x).numpy()


class KANRegressor(RegressorMixin, _KANEstimator):
    """A KAN that regresses one or several targets, standardised inside (mean squared error).

    Parameters and attributes stand at the head of this module; also `target_mean_` and `target_scale_`.
    """

    def fit(self, X, y):
        """X (N, I), y (N,) or (N, O): self."""
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        y = y.astype(np.float64)
        self._flat = y.ndim == 1
        y = y.reshape(len(y), -1)
        self.target_mean_, scale = y.mean(0), y.std(0)
        self.target_scale_ = np.where(scale > 1e-12 * np.abs(self.target_mean_), scale, 1.0)
        self._fit_network(X, (y - self.target_mean_) / self.target_scale_, y.shape[1])
        return self

    def predict(self, X):
        """X (N, I): (N,) or (N, O), as y was."""
        y = self._outputs(X) * self.target_scale_ + self.target_mean_
        return y[:, 0] if self._flat else y

    def symbolic_formula(self, names=None, digits=None, simplify=True, timeout=10.0):
        """What `predict` computes as sympy formulas, one for each target, in the units of the data.

            y = target_mean_ + target_scale_ * f((x - mean_) / scale_),    f the formula of `network_`

        Every live edge must be symbolic first: `regressor.network_.auto_symbolic()`.

        Args:
            names: of the inputs, all of them, or sympy expressions. None: `feature_names_in_`, or x_1, x_2, ...
            digits, simplify, timeout: of `KAN.symbolic_formula`. Rounding comes last, to decimals of constants in the
                data's units: inputs with large means need more of them than standardised ones.
        Raises:
            ValueError, ImportError: as `KAN.symbolic_formula`.
        """
        check_is_fitted(self)
        sp = _sympy()
        if names is None:
            names = getattr(self, "feature_names_in_", [f"x_{column + 1}" for column in range(self.n_features_in_)])
        if isinstance(names, str) or len(names) != self.n_features_in_:
            raise ValueError(f"names must be {self.n_features_in_} names or expressions, got {names!r}")
        inputs = [
            ((sp.Symbol(name) if isinstance(name, str) else sp.sympify(name)) - mean) / scale
            for name, mean, scale in zip(names, self.mean_.tolist(), self.scale_.tolist())
        ]
        outputs = self.network_.symbolic_formula(inputs, simplify=False)
        units = zip(outputs, self.target_scale_.tolist(), self.target_mean_.tolist())
        return finished([scale * output + mean for output, scale, mean in units], digits, simplify, timeout)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class KANClassifier(ClassifierMixin, _KANEstimator):
    """A KAN that classifies, with one output per class (cross-entropy).

    Parameters and attributes stand at the head of this module; also `classes_`, the columns of `predict_proba`.
    """

    def fit(self, X, y):
        """X (N, I), y (N,) of any label type: self."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"KANClassifier needs samples of at least two classes, got one class: {self.classes_[0]!r}"
            )
        self._fit_network(X, labels.astype(np.int64), len(self.classes_), F.cross_entropy)
        return self

    def predict_proba(self, X):
        """X (N, I): (N, classes), rows sum to one."""
        return torch.from_numpy(self._outputs(X)).softmax(1).numpy()

    def predict(self, X):
        """X (N, I): (N,) labels."""
        scores = self._outputs(X)
        return self.classes_[scores.argmax(1)]
