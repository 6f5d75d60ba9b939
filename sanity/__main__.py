"""`sanity VERB ...` and `python -m sanity VERB ...`: the verbs are the modules `python -m sanity.VERB` runs."""

from __future__ import annotations

import sys
from importlib import import_module

from sanity.registry import suggest

VERBS = {
    "run": "randomize a network, explain again, compare",
    "report": "tables, figures and a page from stored runs",
    "gate": "is it still the same explainer? for continuous integration",
    "explain": "one image, one method",
    "deletion": "delete what maps point at, ask the network again",
    "train": "the small classifiers of the published experiments",
}


def main() -> int:
    """Hand over to a verb's module; exit code 2 for an unknown one."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: sanity VERB [options]\n")
        print("\n".join(f"  {verb:<10} {words}" for verb, words in VERBS.items()))
        print("\n`sanity VERB --help` says more.")
        return 0
    verb = sys.argv[1]
    if verb not in VERBS:
        print(f"sanity: error: {suggest('verb', verb, VERBS)}", file=sys.stderr)
        return 2
    code: int = import_module(f"sanity.{verb}").main(sys.argv[2:])
    return code


if __name__ == "__main__":
    sys.exit(main())
