"""The estimators against scikit-learn's own checks, and against what they are for."""

import numpy as np
import pytest
import sympy
from sklearn.datasets import load_diabetes, load_iris, make_friedman1
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from kansformer.kan import KANClassifier, KANRegressor

# Small and few steps: the checks fit some hundred networks.
SMALL = {"hidden": 3, "grid_size": 2, "steps": 3}


@pytest.mark.filterwarnings("ignore:.*lie outside the grids:UserWarning")
@pytest.mark.filterwarnings("ignore:.*constant:UserWarning")
@parametrize_with_checks([KANRegressor(**SMALL), KANClassifier(**SMALL)])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_a_regressor_beats_a_line_and_keeps_the_shape_of_its_targets():
    X, y = make_friedman1(300, n_features=5, noise=0.1, random_state=0)
    model = KANRegressor(hidden=4, steps=10).fit(X[:200], y[:200])
    line = LinearRegression().fit(X[:200], y[:200])
    assert model.score(X[200:], y[200:]) > 0.95 > line.score(X[200:], y[200:])
    assert model.predict(X[:200]).shape == (200,)
    two = KANRegressor(**SMALL).fit(X, np.stack([y, 1000 * y], 1)).predict(X)
    assert two.shape == (300, 2)
    np.testing.assert_allclose(two[:, 1].mean(), 1000 * y.mean(), rtol=0.05)


@pytest.mark.filterwarnings("ignore:.*lie outside the grids:UserWarning")
@pytest.mark.parametrize("steps", [2, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_the_default_penalty_keeps_noise_out(steps):
    """On diabetes, 5 folds, mean R2 is at most 0.05 below ridge regression's; without the penalty it is 0.1 below."""
    X, y = load_diabetes(return_X_y=True)
    folds = KFold(5, shuffle=True, random_state=0)
    score = lambda model: cross_val_score(model, X, y, cv=folds).mean()  # noqa: E731
    least = score(Ridge()) - 0.05
    assert score(KANRegressor(steps=steps)) > least
    assert score(KANRegressor(steps=2, lamb=0)) < least - 0.05


def test_a_classifier_in_a_grid_search():
    X, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    search = GridSearchCV(KANClassifier(steps=3, lamb=1e-3), {"hidden": np.arange(1, 3)}, cv=2)
    with pytest.warns(UserWarning, match="rows lie outside"):
        search.fit(X, names)
    assert search.best_score_ > 0.9
    probability = search.predict_proba(X)
    np.testing.assert_allclose(probability.sum(1), 1)
    assert (search.classes_[probability.argmax(1)] == search.predict(X)).all()
    with pytest.raises(ValueError, match="hidden is None"):
        KANRegressor(hidden=None).fit(X, y)
    with pytest.raises(ValueError, match="at least two classes"):
        KANClassifier().fit(X, np.zeros(150))


def test_formulas_are_in_the_units_of_the_data():
    X = np.random.default_rng(0).uniform(1, 3, (200, 2))
    y = np.stack([10 * X[:, 0] ** 2 + 5 * X[:, 1], 1e3 * np.sin(2 * X[:, 1]) - 40 * X[:, 0]], 1)
    model = KANRegressor(hidden=[], steps=5, lamb=0).fit(X, y)
    with pytest.raises(ValueError, match="are splines, which have no formula"):
        model.symbolic_formula()
    model.network_.auto_symbolic(verbose=False)
    expected = model.predict(X)
    for simplify in (True, False):
        formulas = model.symbolic_formula(simplify=simplify)
        found = [sympy.lambdify(sympy.symbols("x_1 x_2"), formula)(*X.T) for formula in formulas]
        np.testing.assert_allclose(np.stack(found, 1), expected, rtol=1e-9, atol=1e-6)
    x, z = sympy.symbols("u v")
    first, second = model.symbolic_formula(["u", z], digits=4)
    assert abs(float(first.subs(x, 2).subs(z, 2)) - 50) < 0.01
    assert abs(float(second.subs(x, 2).subs(z, 2)) - (1e3 * np.sin(4) - 80)) < 0.2
    with pytest.raises(ValueError, match="names must be 2 names"):
        model.symbolic_formula(["u"])
    model.feature_names_in_ = np.array(["age", "body mass"], dtype=object)  # as a fit to a data frame sets them
    names = {symbol.name for formula in model.symbolic_formula() for symbol in formula.free_symbols}
    assert names == {"age", "body mass"}


def test_scales_of_inputs_and_targets_do_not_matter():
    X, y = make_friedman1(150, n_features=5, random_state=0)
    one = KANRegressor(**SMALL).fit(X, y).predict(X)
    other = KANRegressor(**SMALL).fit(X * 1e6 - 5, y * 1e-4 + 7).predict(X * 1e6 - 5)
    np.testing.assert_allclose((other - 7) * 1e4, one, rtol=1e-3, atol=1e-2)
