"""What a run's manifest says, in words: what was run, what to beware of, how to run it again and how to cite it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from sanity.parts import images_in
from sanity.report.looks import plural
from sanity.summary import BLIND, MARGIN, RULE_VERSION

Pairs = list[tuple[str, str]]
Header = Mapping[str, Any]


def trained(header: Header) -> bool:
    """Whether the network was a trained one."""
    plan = header.get("plan") or {}
    return bool(header.get("trained", plan.get("weights") != "random"))


def facts(header: Header, scores: pd.DataFrame) -> Pairs:
    """What was run: names and words, those that the header knows."""
    plan = header.get("plan") or {}
    stages = len(header.get("stages") or ()) or int(scores["stage_index"].nunique() - 1)
    known = {
        "Network": _join(header.get("model"), header.get("weights"), "" if trained(header) else "untrained"),
        "Pictures": _join(plan.get("images"), plural(images_in(scores), "picture"), _flag(plan, "squash")),
        "Explained class": plan.get("target"),
        "Explainers": ", ".join(scores["method"].unique()),
        "Sampling": _some(plan, "samples", "mask_steps"),
        "Randomization": _join(
            *scores["order"].unique(), plural(stages, "stage"), plan.get("reinit"), plan.get("against")
        ),
        "BatchNorm statistics": plan.get("batchnorm"),
        "Seeds": ", ".join(map(str, scores["seed"].unique())),
        "Similarities": ", ".join(scores["similarity"].unique()),
        "Precision": plan.get("precision"),
    }
    return _told(known)


def provenance(header: Header) -> Pairs:
    """Where the numbers come from: checksums, versions, machine and time, those that the header knows."""
    known = {
        "Protocol": header.get("protocol_version"),
        "Weights SHA-256": header.get("weights_sha256"),
        "Pictures SHA-256": header.get("images_sha256"),
        "Made with": _join(_versions(header), header.get("machine"), header.get("device")),
        "When": _join(header.get("started"), f"{header['seconds']:.0f} s" if "seconds" in header else ""),
    }
    return _told(known)


def _told(known: Mapping[str, object]) -> Pairs:
    return [(name, str(words)) for name, words in known.items() if words]


def _join(*words: object) -> str:
    return ", ".join(str(word) for word in words if word)


def _flag(plan: Mapping[str, Any], name: str) -> str:
    return name if plan.get(name) else ""


def _some(plan: Mapping[str, Any], *keys: str) -> str:
    return _join(*(f"{key.replace('_', ' ')} {plan[key]}" for key in keys if plan.get(key) is not None))


def _versions(header: Header) -> str:
    packages = header.get("packages") or {}
    own = {"saliency-sanity": header.get("saliency_sanity"), "Python": header.get("python")}
    return _join(*(f"{k} {v}" for k, v in {**own, "torch": packages.get("torch")}.items() if v))


def notes(header: Header, scores: pd.DataFrame) -> list[str]:
    """What a reader of the numbers must know: an untrained network, parameters left trained, scores that are NaN."""
    found = []
    if not trained(header):
        found.append("The network is untrained: these numbers say nothing of a trained one.")
    if names := header.get("untouched_parameters") or []:
        found.append(f"{plural(len(names), 'parameter')} in no stage, still trained at the end: {listed(names)}.")
    if unchanged := header.get("unchanged_parameters") or {}:
        names = sorted({name for group in unchanged.values() for name in group})
        found.append(f"{plural(len(names), 'parameter')} left as before by re-initialisation: {listed(names)}.")
    # The rows of a large run are an excerpt; its header has counted them all.
    counts = scores["status"].value_counts().to_dict() if "images" not in scores.attrs else header["counts"]
    if bad := {status: count for status, count in counts.items() if status != "ok"}:
        words = ", ".join(f"{count} for a {status}" for status, count in bad.items())
        found.append(f"{sum(bad.values())} of {sum(counts.values())} scores are NaN: {words}.")
    for one in header.get("failures") or []:
        where = f"{one['order']}, seed {one['seed']}, {listed(one['images'])}"
        found.append(f"Failed {one['attempts']} times and left out: {where}: {one['reason']}.")
    if skipped := header.get("skipped_images") or {}:
        found.append(f"{plural(len(skipped), 'picture')} could not be read: {listed(list(skipped))}.")
    return found


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def rerun(header: Header) -> str:
    """Shell command that runs the same plan again; "" if the header holds none."""
    return " \\\n  ".join(_words(header)) if header.get("plan") else ""


def _words(header: Header) -> Iterator[str]:
    stages = header["plan"].get("stages")
    mapped = isinstance(stages, Mapping)
    if mapped:
        yield f"cat > stages.yaml <<'END'\n{json.dumps(stages, indent=1)}\nEND\npython -m sanity.run"
    else:
        yield "python -m sanity.run"
    for name, value in header["plan"].items():
        if name == "stages" and mapped:
            value = "stages.yaml"
        elif name == "stages" and isinstance(value, list):
            value = ",".join(value)
        # Presets never set these two; "null" would read as a file's name.
        if value is not False and not (value is None and name in ("against", "limit")):
            yield f"--{name.replace('_', '-')}{'' if value is True else ' ' + _quoted(value)}"
    yield f"--device {'cpu' if header.get('device', 'cpu') == 'cpu' else 'cuda'}"
    if "batch_size" in header:
        yield f"--batch-size {header['batch_size']}"


def _quoted(value: object) -> str:
    values = value if isinstance(value, list) else [value]
    return " ".join(shlex.quote("null" if v is None else str(v)) for v in values)


RULE = (
    f"Rule {RULE_VERSION} asks two things of each order that ends with everything random, and answers each with the "
    "95 % interval of the mean similarity to the trained network's map. With everything random, is the map still like "
    "the trained one: above what the method's maps of different pictures show among themselves (null; in older runs "
    f"what random maps show), plus a margin of {MARGIN}? With only the first stage random, is the map blind to it: "
    f"above {BLIND}? fail: yes to either; pass: no to both; inconclusive: an interval straddles its bar, too few maps "
    "could be scored, or the map is not even like itself with untouched weights. The controls show both ends: edges, "
    "an edge detector, never looks at the network; random draws new noise at every stage."
)
PAPER = """@inproceedings{adebayo2018sanity,
  author    = {Adebayo, Julius and Gilmer, Justin and Muelly, Michael and Goodfellow, Ian and Hardt, Moritz
               and Kim, Been},
  title     = {Sanity Checks for Saliency Maps},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {31},
  year      = {2018},
  note      = {arXiv:1810.03292}
}"""


def citations(header: Header) -> str:
    """BibTeX of the test's paper and of this tool, in the version that made the run."""
    version, year = header.get("saliency_sanity", "unknown"), str(header.get("started", ""))[:4]
    lines = [
        "@software{saliency_sanity,",
        "  title   = {saliency-sanity: sanity checks for saliency maps},",
        f"  version = {{{version}}},",
        *([f"  year    = {{{year}}},"] if year else []),
        f"  note    = {{protocol {header.get('protocol_version', 'unknown')}, commit"
        f" {header.get('commit') or 'not recorded'}}}",
        "}",
    ]
    return PAPER + "\n\n" + "\n".join(lines)
