import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sanity.report import main
from sanity.report.latex import escape, latex, number
from sanity.report.manifest import citations, facts, notes, rerun
from sanity.report.runs import differences, find, gist, leaderboard, nearest_zero, ranked, read_all, unscored
from sanity.report.tables import csv, markdown, pipes
from sanity.summary import summarize, verdicts
from tests.stored import METHODS, STAGES, header, scores, store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs, one of them of two orders, beside things that are no runs."""
    base = tmp_path_factory.mktemp("results")
    store(base / "a", "net_a")
    store(base / "deep" / "b", "net_b", ("cascading", "independent"), trained=False)
    (base / "empty").mkdir()
    (base / "README.md").write_text("old")
    return base


@pytest.fixture(scope="module")
def runs(folder):
    return read_all(find([folder])[0])


def test_runs_are_found_however_deep_and_the_rest_is_passed_over(folder):
    found, over = find(sorted(folder.iterdir()))
    assert found == [folder / "a", folder / "deep" / "b"]
    assert over == [folder / "README.md", folder / "empty"]
    assert find([folder, folder / "a"])[0] == found


def test_paths_without_a_run_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        find([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"no run in .*empty: a run's folder holds run\.json and scores\.parquet"):
        find([folder / "empty"])


def test_a_run_is_read_as_its_summary_and_verdicts(folder):
    (run,) = read_all([folder / "a"])
    rows = scores("net_a")
    pd.testing.assert_frame_equal(run.scores, rows)
    pd.testing.assert_frame_equal(run.summary, summarize(rows))
    pd.testing.assert_frame_equal(run.verdicts, verdicts(rows))
    assert run.methods == list(METHODS)


def test_verdicts_are_judged_by_the_runs_own_unrelated_maps(tmp_path):
    folder = store(tmp_path / "run")
    unrelated = scores().query("stage_index == 0").assign(value=0.85)
    unrelated.to_parquet(folder / "unrelated.parquet")
    (run,) = read_all([folder])
    pd.testing.assert_frame_equal(run.verdicts, verdicts(run.scores, unrelated))
    assert not run.verdicts["null_high"].equals(verdicts(run.scores)["null_high"])


def test_labels_tell_runs_apart(tmp_path):
    for place in ("x", "y", "deep/y"):
        store(tmp_path / place, "net")
    store(tmp_path / "z", "other", plan={"weights": "random"}, trained=False)
    labels = [run.label for run in read_all([tmp_path / p for p in ("x", "y", "deep/y", "z")])]
    assert labels[0] == "net (x)"
    assert labels[3] == "other (untrained)"
    assert len(set(labels)) == 4


def test_rows_of_older_schemas_are_read(tmp_path):
    (run,) = read_all([store(tmp_path / "old", version=None)])
    pd.testing.assert_frame_equal(run.scores, scores())


@pytest.mark.parametrize("format_", ["html", "markdown", "latex", "csv", "figure"])
def test_rows_of_newer_schemas_are_refused_politely(tmp_path, capsys, format_):
    store(tmp_path / "new", version=99)
    assert main([str(tmp_path / "new"), "--format", format_, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "scores.parquet has schema 99, newer than 1: update saliency-sanity" in said
    assert not (tmp_path / "out").exists()


def test_unfinished_and_mixed_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds an unfinished run"):
        read_all([store(tmp_path / "half", status="running")])
    both = pd.concat([scores("a"), scores("b")])
    with pytest.raises(ValueError, match="scores of one model expected, found 2"):
        read_all([store(tmp_path / "both", rows=both)])
    (tmp_path / "half" / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"its run\.json is no JSON object"):
        read_all([tmp_path / "half"])


def test_the_leaderboard_marks_those_nearest_zero_among_those_that_pass(runs):
    board = leaderboard(runs)
    assert len(board) == 2 * len(METHODS) * 2
    assert set(board["run"]) == {"net_a", "net_b (untrained)"}
    best = board[board["best"]]
    assert set(best["method"]) == {"gradient"}
    assert (board[board["method"] == "guided_backprop"]["verdict"] == "fail").all()
    assert ranked(board) == ["gradient", "mask", "guided_backprop", "random", "edges"]


def test_nearest_zero_takes_those_whose_interval_overlaps():
    rows = [(-0.3, -0.4, -0.2), (0.05, 0.01, 0.09), (0.1, 0.08, 0.12), (0.2, 0.15, 0.25), (np.nan, np.nan, np.nan)]
    part = pd.DataFrame(rows, columns=["mean", "low", "high"], index=list("abcde"))
    assert list(nearest_zero(part, "mean").index) == ["b", "c"]
    assert nearest_zero(part.loc[["e"]], "mean").empty
    alone = pd.DataFrame([(0.5, np.nan, np.nan)], columns=["mean", "low", "high"])
    assert len(nearest_zero(alone, "mean")) == 1


def test_independent_stages_alone_have_no_verdict(tmp_path):
    (run,) = read_all([store(tmp_path / "run", orders=("independent",))])
    board = leaderboard([run])
    assert board.empty
    assert ranked(board) == []
    assert gist(board).startswith("No verdicts")
    assert "there are no verdicts" in markdown([run], tmp_path, "")
    assert all(name.startswith("stages_") for name in latex([run]))


def test_the_gist_names_failures_and_passes_but_no_controls(runs):
    board = leaderboard(runs)
    said = gist(board[board["run"] == "net_a"])
    assert said == "Fail: guided_backprop (ssim, hog). Pass throughout: gradient."


def test_maps_without_a_score_are_counted_once_whatever_the_similarities(runs):
    found = unscored(runs[0].scores)
    assert list(found["stage"]) == list(STAGES[1:])
    assert set(found["method"]) == {"mask"}
    assert list(found["count"]) == [3, 3, 3]
    assert list(found["maps"]) == [4, 4, 4]


def test_notes_say_what_a_reader_must_know(runs):
    said = " ".join(notes(runs[0].header, runs[0].scores))
    assert "1 parameter in no stage, still trained at the end: norm.weight." in said
    assert "18 of 160 scores are NaN: 18 for a constant map." in said
    many = header(trained=False, unchanged_parameters={"0/cascading/1": ["a", "b"]}, skipped_images={"x.jpg": "broken"})
    said = " ".join(notes(many, scores()))
    assert "untrained" in said
    assert "2 parameters left as before by re-initialisation: a, b." in said
    assert "1 picture could not be read: x.jpg." in said
    clean = scores().query("status == 'ok'")
    assert notes(header(untouched_parameters=[]), clean) == []


def test_differences_beside_the_network_are_told(runs, tmp_path):
    assert differences(runs) == ["orders"]
    plan = header()["plan"] | {"model": "other", "samples": 7}
    pair = read_all([store(tmp_path / "x"), store(tmp_path / "y", "other", plan=plan, images_sha256="cd")])
    assert differences(pair) == ["samples", "pictures"]
    assert "differ in more than the network: samples, pictures" in markdown(pair, tmp_path, "")


PLANS = [
    {},
    {"samples": None, "mask_steps": None, "limit": 3, "skip_bad_images": True, "save_maps": True},
    {"methods": ("gradient", "smoothgrad:samples=4"), "orders": ("cascading", "independent"), "seeds": (3, 5)},
    {"stages": ("logits", "stem"), "images": "my photos/it's here", "reinit": "normal:0.01"},
    {"stages": 4, "target": "7", "hide_pictures": True, "precision": "float64"},
    {"stages": {"top": ["fc"], "bottom": ["conv1.weight"]}},
]


@pytest.mark.parametrize("changes", PLANS)
def test_the_command_to_run_again_gives_the_same_plan(changes, tmp_path, monkeypatch):
    """The shell's own parsing, the run's own parser: what comes out is the plan that went in."""
    from sanity.cli import parse, plan_of, with_preset
    from sanity.plan import Plan
    from sanity.session import parser

    plan = Plan(**changes).as_dict()
    script = rerun(header(plan=plan)).replace("python -m sanity.run", "printf '%s\\0'")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    words = done.stdout.split("\0")[:-1]
    assert words[-4:] == ["--device", "cpu", "--batch-size", "8"]
    monkeypatch.chdir(tmp_path)
    again = plan_of(parse(parser(), with_preset(words, "quick"))).as_dict()
    if isinstance(plan["stages"], dict):
        from sanity.plan import read_yaml

        again["stages"] = read_yaml(Path(again["stages"]))
    assert again == plan


def test_citations_name_the_paper_and_the_version_that_ran():
    said = citations(header())
    assert "Sanity Checks for Saliency Maps" in said
    assert "Kim, Been" in said
    assert "version = {0.1.0}" in said
    assert "year    = {2026}" in said
    assert said.count("{") == said.count("}")


def test_headers_of_other_versions_need_not_hold_everything(tmp_path):
    folder = store(tmp_path / "run")
    (folder / "run.json").write_text("{}")
    (run,) = read_all([folder])
    assert rerun(run.header) == ""
    assert dict(facts(run.header, run.scores))["Pictures"] == "4 pictures"
    assert "not recorded" in citations(run.header)
    assert run.label in markdown([run], tmp_path, "")


def tables_in(text):
    """Markdown tables, each a list of its lines' cells."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    return [
        [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        for block in blocks
    ]


def test_markdown_tables_are_whole_and_links_lead_somewhere(runs, folder):
    text = markdown(runs, folder, "python -m sanity.report x")
    found = tables_in(text)
    assert len(found) == 2 + 2 * 3 + 2 + 4
    assert all(len({len(line) for line in table}) == 1 for table in found)
    links = re.findall(r"\]\(<(.*?)>\)", text)
    assert links == ["a", "deep/b"]
    assert all((folder / link).is_dir() for link in links)
    assert "| gradient | **0.02** [0.00, 0.04] ✓ pass |" in text
    assert "guided_backprop | 0.80" in text
    assert "n/a" not in found[0][1]


def test_names_cannot_break_a_markdown_table():
    assert pipes(["a"], [["x|y <b>\nz"]]) == "| a |\n| --- |\n| x\\|y &lt;b> z |"


def test_figures_are_linked_where_they_are(tmp_path):
    folder = store(tmp_path / "my run")
    (folder / "figures").mkdir()
    for name in ("curve_cascading_ssim.png", "strip_cascading_cat.png"):
        (folder / "figures" / name).touch()
    text = markdown(read_all([folder]), tmp_path, "")
    assert "![curve_cascading_ssim.png](<my run/figures/curve_cascading_ssim.png>)" in text
    assert "- [strip_cascading_cat.png](<my run/figures/strip_cascading_cat.png>)" in text


def test_csv_holds_every_number(runs):
    texts = csv(runs)
    stages = pd.read_csv(io.StringIO(texts["stages.csv"]))
    assert list(stages["run"].unique()) == ["net_a", "net_b (untrained)"]
    want = pd.concat([run.summary for run in runs], ignore_index=True)
    np.testing.assert_allclose(stages["mean"], want["mean"], rtol=0, atol=5e-7)
    assert "NaN" in texts["stages.csv"]
    board = pd.read_csv(io.StringIO(texts["verdicts.csv"]))
    assert list(board["verdict"]) == list(leaderboard(runs)["verdict"])


def test_latex_marks_best_and_failing(runs):
    text = latex(runs)["leaderboard_cascading_ssim.tex"]
    lines = {line.split(" & ")[0]: line for line in text.splitlines() if " & " in line}
    assert r"$\mathbf{0.02}{\scriptstyle\pm.02}$" in lines["gradient"]
    assert r"\rlap{$^{\dagger}$}" in lines[r"guided\_backprop"]
    assert r"\mathbf" not in lines[r"guided\_backprop"] + lines[r"\emph{random}"]
    assert r"0.00\rlap" not in lines["mask"]
    assert r"n/a\rlap{$^{*}$}" not in lines["mask"]
    for part in (r"\toprule", r"\bottomrule", r"\caption{", r"\label{tab:leaderboard-cascading-ssim}"):
        assert part in text


def test_latex_tables_of_stages_hold_the_summary(runs):
    text = latex(runs[:1])["stages_net_a_cascading_ssim.tex"]
    rows = [line.rstrip("\\ ").split(" & ") for line in text.splitlines() if line.startswith(STAGES)]
    assert [row[0] for row in rows] == list(STAGES)
    means = [[float(re.search(r"-?\d\.\d\d", cell)[0]) for cell in row[1:]] for row in rows]
    want = runs[0].summary.query("similarity == 'ssim'").pivot(index="stage_index", columns="method", values="mean")
    np.testing.assert_allclose(means, want[list(METHODS)], rtol=0, atol=0.0051)
    assert "mask 9 of 16" in text
    assert text.count(r"\rlap{$^{*}$}") == 3


def test_many_methods_are_spread_over_tables(tmp_path):
    rows = scores(similarities=("hog",)).query("method == 'gradient'")
    parts = [rows.assign(method=f"method_{i}") for i in range(9)]
    (run,) = read_all([store(tmp_path / "many", rows=pd.concat(parts))])
    names = [name for name in latex([run]) if "stages_net_cascading_hog" in name]
    assert names == [f"stages_net_cascading_hog_{i}.tex" for i in (1, 2)]


@pytest.mark.parametrize(
    ("mean", "low", "high", "want"),
    [
        (0.5, 0.4, 0.6, r"$0.50{\scriptstyle\pm.10}$"),
        (-0.001, -0.002, 0.0, r"$0.00{\scriptstyle\pm.00}$"),
        (0.5, np.nan, np.nan, "$0.50$"),
        (0.0, -1.0, 1.0, r"$0.00{\scriptstyle\pm1.00}$"),
    ],
)
def test_numbers_in_latex(mean, low, high, want):
    assert number(mean, low, high) == want


def test_every_special_character_is_escaped():
    assert escape(r"a_b & 5% #1 {x} ~ ^ \ $ <|>") == (
        r"a\_b \& 5\% \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$ "
        r"\textless{}\textbar{}\textgreater{}"
    )


def test_latex_compiles_without_overfull_boxes(runs, tmp_path):
    """In a column as narrow as NeurIPS's page, 5.5 inches."""
    if not (program := shutil.which("pdflatex")) or not booktabs():
        pytest.skip("no pdflatex with booktabs here")
    odd = {"gradient": "a#b$c%d&e_f{g}~^\\<>|"}
    rows = scores("net^2_ü").replace({"method": odd})
    tables = latex([*runs, *read_all([store(tmp_path / "odd", rows=rows)])])
    for name, table in tables.items():
        (tmp_path / name).write_text(table, encoding="utf-8")
    inputs = "\n".join(rf"\input{{{name}}}" for name in tables)
    (tmp_path / "paper.tex").write_text(
        r"\documentclass{article}\usepackage[textwidth=5.5in]{geometry}\usepackage[T1]{fontenc}\usepackage{booktabs}"
        f"\\begin{{document}}\n{inputs}\n\\clearpage\\end{{document}}\n",
        encoding="utf-8",
    )
    words = [program, "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, check=False, timeout=120)
    log = (tmp_path / "paper.log").read_text(errors="replace")
    assert done.returncode == 0, log[-2000:]
    assert "Overfull" not in log
    assert "multiply defined" not in log
    assert (tmp_path / "paper.pdf").stat().st_size > 10_000


def booktabs():
    search = shutil.which("kpsewhich")
    return search and subprocess.run([search, "booktabs.sty"], capture_output=True, check=False).returncode == 0


def test_the_readme_of_results_is_the_same_when_made_again(folder, capsys):
    output = folder / "README.md"
    words = ["--format", "markdown", "--output", str(output)]
    assert main([*map(str, sorted(folder.iterdir())), *words]) == 0
    first = output.read_text()
    assert "README.md holds no run" not in capsys.readouterr().err
    assert main([*map(str, sorted(folder.iterdir())), *words]) == 0
    assert output.read_text() == first
    assert first.startswith("# Sanity checks of saliency maps\n")


def test_markdown_goes_to_the_terminal(folder, capsys):
    assert main([str(folder / "a"), "--format", "markdown", "--output", "-"]) == 0
    assert capsys.readouterr().out.startswith("# Sanity checks")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: RUN"),
        (["{a}", "--format", "pdf"], "invalid choice: 'pdf'"),
        (["{a}", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["{a}/nowhere"], "nowhere does not exist"),
        (["{a}", "--output", "{a}"], "is a folder; name a file"),
        (["{a}", "--format", "latex", "--output", "{a}/run.json"], "is a file; name a folder"),
        (["{a}", "--format", "figure", "--output", "{a}/run.json"], "is a file; name a folder"),
    ],
)
def test_what_the_user_must_mend_is_one_line_and_exit_code_2(folder, capsys, words, message):
    assert main([word.format(a=folder / "a") for word in words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_reports_need_no_torch(folder, tmp_path):
    program = """
import sys
sys.modules["torch"] = None
import sanity.report.publication
from sanity.report import main
for name in ("html", "markdown", "latex", "csv"):
    assert main([sys.argv[1], "--format", name, "--output", f"{sys.argv[2]}/{name}"]) == 0, name
"""
    words = [sys.executable, "-c", program, folder / "a", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["csv", "html", "latex", "markdown"]


def test_the_module_runs_as_a_command(folder, tmp_path):
    words = [sys.executable, "-W", "error", "-m", "sanity.report", str(folder / "a"), "--format", "csv"]
    done = subprocess.run([*words, "--output", tmp_path / "c"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"written: {tmp_path / 'c'} (2 files)\n"
