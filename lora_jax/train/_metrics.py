"""Figures of predictions, by scikit-learn and SciPy. What is undefined, as for constant predictions, is 0.

The two are imported where they are used, because that takes seconds that few commands need.
"""

from typing import Any

import numpy as np


def classification_metrics(predictions: np.ndarray, labels: np.ndarray, classes: int = 2) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation coefficient.

    F1 is that of class 1 where there are two classes, as for MRPC and QQP, and the mean over the classes where more.

    Args:
      predictions: int [rows].
      labels: int [rows].
      classes: how many there are, whether or not all occur.

    Example:
      >>> classification_metrics(np.array([1, 1, 0, 1]), np.array([1, 0, 0, 1]))
      {'accuracy': 0.75, 'f1': 0.8, 'matthews_correlation': 0.577...}
    """
    import sklearn.metrics

    average = "binary" if classes == 2 else "macro"
    constant = _constant(predictions) or _constant(labels)
    f1_score: Any = sklearn.metrics.f1_score  # its stub knows no number for zero_division
    return {
        "accuracy": float(np.mean(predictions == labels)),
        "f1": float(f1_score(labels, predictions, average=average, zero_division=0)),
        "matthews_correlation": 0.0 if constant else float(sklearn.metrics.matthews_corrcoef(labels, predictions)),
    }


def regression_metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation of float [rows] with float [rows].

    Example:
      >>> regression_metrics(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
      {'pearson': 0.981..., 'spearman': 1.0}
    """
    import scipy.stats

    x, y = predictions.astype(np.float64), labels.astype(np.float64)
    if _constant(x) or _constant(y):
        return {"pearson": 0.0, "spearman": 0.0}
    pearson: Any = scipy.stats.pearsonr(x, y)  # its stub knows not that the two results are named
    spearman: Any = scipy.stats.spearmanr(x, y)
    return {"pearson": float(pearson.statistic), "spearman": float(spearman.statistic)}


def _constant(x: np.ndarray) -> bool:
    """So nearly that a correlation would be one of rounding errors."""
    return bool(np.std(x) <= 1e-12 * np.abs(np.mean(x)))
