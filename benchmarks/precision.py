"""What does a number format move? Mean scores of one plan in float32 and in another precision.

    python benchmarks/precision.py                             EfficientNet-Lite0
    python benchmarks/precision.py --model inception_v3 --weights FILE.pth

The same plan twice; for every method and similarity the largest difference of a stage's mean score, and the largest of
any single score. A faster precision counts while every mean score stays within .01. Writes
results/benchmarks/precision_MODEL/.
"""

from __future__ import annotations

import measuring
import pandas as pd

from sanity.command import Clock
from sanity.plan import Plan
from sanity.run import prepare, run

METHODS = ("gradient", "smoothgrad", "gradient_x_input", "guided_backprop", "integrated_gradients")


def main() -> None:
    parser = measuring.parser(__doc__, "efficientnet_lite0", "pretrained", images=4, samples=5, stages=6)
    parser.add_argument("--precision", default="bfloat16")
    options = parser.parse_args()
    clock = Clock()
    classifier, pictures = measuring.network(options.model, options.weights, options.images)
    found = {}
    for precision in ("float32", options.precision):
        plan = Plan(methods=METHODS, samples=options.samples, stages=options.stages, precision=precision)
        stages = prepare(plan, classifier, pictures)
        with measuring.progress() as advance:
            steps = run(plan, classifier, pictures, stages, batch_size=4, on_progress=advance)
            scores = pd.DataFrame([score._asdict() for step in steps for score in step.scores])
        found[precision] = scores[scores.stage_index > 0]
    index = ["method", "similarity", "stage"]
    means = [frame.groupby(index, sort=False)["value"].mean() for frame in found.values()]
    moved = (means[1] - means[0]).abs().groupby(["method", "similarity"], sort=False).max()
    cells = [frame.set_index([*index, "image"])["value"] for frame in found.values()]
    single = (cells[1] - cells[0]).abs().groupby(["method", "similarity"], sort=False).max()
    table = pd.concat([moved, single], axis=1, keys=["largest of a mean", "largest of one score"]).reset_index()
    worst = float(moved.max())
    words = [
        f"{classifier.name}, {len(pictures)} photographs, {len(stages)} stages cascading, {options.samples} samples: "
        f"{options.precision} against float32.",
        f"Largest difference of a mean score: {worst:.4f}; goal: at most .01.",
    ]
    name = f"precision_{classifier.name}" + ("" if options.precision == "bfloat16" else f"_{options.precision}")
    measuring.publish(name, {"differences": table}, words, clock, options=measuring.chosen(options))


if __name__ == "__main__":
    main()
