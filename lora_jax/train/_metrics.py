"""Metrics of predictions by scikit-learn and SciPy. A metric that is undefined, as for constant predictions, is 0.

The two packages are imported in functions, because the import takes seconds and few commands need it.
"""

from typing import Any

import numpy as np


def classification_metrics(predictions: np.ndarray, labels: np.ndarray, classes: int = 2) -> dict[str, float]:
    """Compute accuracy, F1 and Matthews' correlation coefficient.

    F1 is the F1 of class 1 for two classes, as for MRPC and QQP, and the mean over the classes for more.

    Args:
        predictions: Int [examples].
        labels: Int [examples].
        classes: The number of classes, whether or not all occur.

    Example:
        >>> classification_metrics(np.array([1, 1, 0, 1]), np.array([1, 0, 0, 1]))
        {'accuracy': 0.75, 'f1': 0.8, 'matthews_correlation': 0.577...}
    """
    import sklearn.metrics

    average = "binary" if classes == 2 else "macro"
    constant = _constant(predictions) or _constant(labels)
    f1_score: Any = sklearn.metrics.f1_score  # its stub lacks numbers for zero_division
    return {
        "accuracy": float(np.mean(predictions == labels)),
        "f1": float(f1_score(labels, predictions, average=average, zero_division=0)),
        "matthews_correlation": 0.0 if constant else float(sklearn.metrics.matthews_corrcoef(labels, predictions)),
    }


def regression_metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute Pearson's and Spearman's correlation of predictions, float [examples], with labels, float [examples].

    Example:
        >>> regression_metrics(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
        {'pearson': 0.981..., 'spearman': 1.0}
    """
    import scipy.stats

    x, y = predictions.astype(np.float64), labels.astype(np.float64)
    if _constant(x) or _constant(y):
        return {"pearson": 0.0, "spearman": 0.0}
    pearson: Any = scipy.stats.pearsonr(x, y)  # its stub lacks the names of the two results
    spearman: Any = scipy.stats.spearmanr(x, y)
    return {"pearson": float(pearson.statistic), "spearman": float(spearman.statistic)}


def _constant(x: np.ndarray) -> bool:
    """Return whether all values are equal up to rounding errors, which would correlate by chance."""
    return bool(np.std(x) <= 1e-12 * np.abs(np.mean(x)))
