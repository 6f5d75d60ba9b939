"""Pictures and tables from stored runs, without torch; from the shell `python -m sanity.report RUN [RUN ...]`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sanity.report.runs import StoredRun

FORMATS = {
    "html": ("sanity_report.html", "one page that needs no network: filters, curves, maps, verdicts, manifest"),
    "markdown": ("sanity_report.md", "leaderboard and every run's verdicts, tables and reasons"),
    "latex": ("sanity_tables", "folder of booktabs tables, one file each, ready to \\input"),
    "csv": ("sanity_csv", "folder with stages.csv and verdicts.csv"),
    "figure": ("sanity_figures", "folder of curves and strips as PDF and SVG, 3.3 and 6.9 inches wide"),
}
EPILOG = """formats:
{formats}

  python -m sanity.report sanity_run
  python -m sanity.report runs/resnet50 runs/vgg16 --format latex --output paper/tables
  python -m sanity.report results/* --format markdown --output results/README.md"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage and an exit."""
        raise ValueError(message)


def parser() -> argparse.ArgumentParser:
    """Flags of `python -m sanity.report`."""
    formats = "\n".join(f"  {name:<10} {words} (default output: {place})" for name, (place, words) in FORMATS.items())
    made = _Parser(
        prog="sanity report",
        description="Tables, figures and a page from stored runs; several runs are put side by side.",
        epilog=EPILOG.format(formats=formats),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder that holds some")
    made.add_argument("--format", choices=FORMATS, default="html", help="what to write (default: html)")
    made.add_argument("--output", type=Path, metavar="PATH", help="file or folder to write; - prints Markdown")
    return made


def command(arguments: Sequence[str]) -> int:
    """Read the runs, write the report, say where."""
    values = parser().parse_args(list(arguments))
    from sanity.report.runs import find, read_all

    folders, over = find(values.runs)
    output = values.output or Path(FORMATS[values.format][0])
    for path in over:
        if path.resolve() != output.resolve():
            print(f"sanity report: note: {path} holds no run, passed over", file=sys.stderr)
    runs = read_all(folders)
    # without what was passed over, so that `results/*` says the same once the report itself lies there
    given = [str(path) for path in values.runs if path not in over]
    told = shlex.join(["python", "-m", "sanity.report", *given, "--format", values.format, "--output", str(output)])
    if values.format == "figure":
        return _figures(runs, output)
    if values.format == "markdown" and str(output) == "-":
        from sanity.report.tables import markdown

        print(markdown(runs, Path(), told), end="")
        return 0
    _save(output, _texts(values.format, runs, output, told))
    return 0


def _texts(format_: str, runs: Sequence[StoredRun], output: Path, told: str) -> str | Mapping[str, str]:
    """Text of the one file, or of each file by its name."""
    if format_ == "html":
        from sanity.report.page import html

        return html(runs)
    if format_ == "latex":
        from sanity.report.latex import latex

        return latex(runs)
    from sanity.report.tables import csv, markdown

    return csv(runs) if format_ == "csv" else markdown(runs, output.parent, told)


def _save(output: Path, texts: str | Mapping[str, str]) -> None:
    from sanity.records import write_text

    files = {output: texts} if isinstance(texts, str) else {output / name: text for name, text in texts.items()}
    if isinstance(texts, str) and output.is_dir():
        raise ValueError(f"--output {output} is a folder; name a file")
    if not isinstance(texts, str) and output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    print(f"written: {output}" + ("" if isinstance(texts, str) else f" ({len(files)} files)"))


def _figures(runs: Sequence[StoredRun], output: Path) -> int:
    from tqdm import tqdm

    from sanity.report.publication import publish

    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    with tqdm(desc="figures", unit=" figures", leave=False, mininterval=1) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        files = publish(runs, output, show)
    print(f"written: {output} ({len(files)} files)")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m sanity.report`: exit code 0, 2 for what the user must mend, 130 after Ctrl-C."""
    from sanity.command import guarded_main

    return guarded_main("sanity report", lambda: command(sys.argv[1:] if arguments is None else arguments))
