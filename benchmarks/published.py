"""Numbers printed in, or read off, Adebayo et al. 2018 and the notebooks released with it; one table of cells."""

from __future__ import annotations

import pandas as pd

COLUMNS = ["data", "model", "order", "stage", "similarity", "method", "published"]
STAGES = ("softmax_linear", "fc1", "hidden2", "hidden1")
CASCADE = {
    "gradient": (0.601, 0.396, 0.106, 0.082),
    "smoothgrad": (0.536, 0.330, 0.180, 0.213),
    "guided_backprop": (0.888, 0.773, 0.628, 0.444),
    "gradcam": (0.556, 0.344, 0.290, 0.299),
    "guided_gradcam": (0.555, 0.359, 0.329, 0.282),
    "integrated_gradients": (0.994, 0.993, 0.993, 0.992),
    "gradient_x_input": (0.993, 0.993, 0.993, 0.992),
    "integrated_gradients_smoothgrad": (0.577, 0.429, 0.379, 0.361),
}
"""CNN on MNIST, cascading, absolute rank correlation, mean of 10 images, printed by the notebook [std .03 to .23]."""
PERMUTED = {
    "gradient": (0.16, 0.09),
    "smoothgrad": (0.24, 0.10),
    "guided_backprop": (0.57, 0.12),
    "gradcam": (0.03, 0.01),
    "guided_gradcam": (0.57, 0.12),
    "integrated_gradients": (0.99, 0.14),
    "integrated_gradients_smoothgrad": (0.46, 0.12),
    "gradient_x_input": (0.99, 0.13),
}
"""CNN on MNIST, true against permuted labels: (absolute, signed) rank correlation, read off a figure, +-.02."""
INCEPTION = {
    ("gradient", "one bird"): {"Logits": 0.58, "Conv2d_4a_3x3": 0.31, "Conv2d_1a_3x3": -0.03},
    ("guided_backprop", "one bird"): {
        "Logits": 0.95, "Mixed_6e": 0.95, "Mixed_6d": 0.91, "Mixed_6c": 0.74, "Mixed_5d": 0.57, "Mixed_5b": 0.37,
        "Conv2d_1a_3x3": 0.0,
    },
    ("guided_backprop", "8 images"): {
        "Logits": 0.99, "Mixed_6e": 0.95, "Mixed_6d": 0.92, "Mixed_6c": 0.86, "Mixed_6b": 0.72, "Mixed_5d": 0.65,
        "Mixed_5b": 0.40, "Conv2d_4a_3x3": 0.28, "Conv2d_1a_3x3": 0.12,
    },
}  # fmt: skip
"""Inception v3 on ImageNet, cascading, absolute rank correlation, read off figures, +-.02."""
RANGES = {
    ("ssim_released", "guided_backprop"): (1.0, 0.90),
    ("ssim_released", "gradient"): (0.82, 0.72),
    ("ssim_released", "integrated_gradients"): (0.92, 0.87),
    ("ssim_released", "gradient_x_input"): (0.84, 0.82),
    ("hog_released", "guided_backprop"): (1.0, 0.2),
    ("hog_released", "gradient"): (0.38, -0.09),
}
"""Where the same network's curves of other similarities begin, at the logits, and end, read off figures; HOG of Guided
Backprop is about 1 down to Mixed_6d and about .2 from there on."""
ENDS = ("Logits", "Conv2d_1a_3x3")
VERDICTS = {
    "gradient": "pass",
    "gradcam": "pass",
    "smoothgrad": "as gradient",
    "guided_backprop": "fail",
    "guided_gradcam": "fail",
    "integrated_gradients": "fail",
    "gradient_x_input": "fail",
}
"""Of the paper's text; the last two for their high similarity, their signed rank correlation being about 0."""


def cells() -> pd.DataFrame:
    """Every published cell of the small networks: COLUMNS."""
    rows = [
        ("cascading", stage, "spearman_abs", method, value)
        for method, values in CASCADE.items()
        for stage, value in zip(STAGES, values, strict=True)
    ]
    rows += [
        ("data", "permuted labels", similarity, method, value)
        for method, values in PERMUTED.items()
        for similarity, value in zip(("spearman_abs", "spearman"), values, strict=True)
    ]
    return pd.DataFrame([("mnist", "cnn", *row) for row in rows], columns=COLUMNS)


def inception() -> pd.DataFrame:
    """Published points of Inception's curves: similarity, method, pictures, stage, published."""
    rows = [
        ("spearman_abs", *key, stage, value) for key, points in INCEPTION.items() for stage, value in points.items()
    ]
    for (similarity, method), ends in RANGES.items():
        rows += [(similarity, method, "figure", stage, value) for stage, value in zip(ENDS, ends, strict=True)]
    return pd.DataFrame(rows, columns=["similarity", "method", "pictures", "stage", "published"])
