"""Everything on one page: ``python -m paper_figures.report`` writes ``paper_figures/output/report.html``.

The page holds the table of verdicts, every figure with its caption, what each verdict states and where that comes from,
and the environment of each result. It is drawn from the results store and needs no other file.
"""

import base64
import html
import importlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import tyro

from paper_figures import style
from paper_figures.__main__ import experiments_of, made, output_folder
from theorykit import results, verify
from theorykit._command_line import Preset

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>theorykit: {preset}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff }}
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: 12px; line-height: 1.4 }}
figure {{ margin: 1.5rem 0 2.5rem }}
img {{ width: 100% }}
table {{ border-collapse: collapse; font-size: 13px }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd }}
.wrong {{ color: #b00000; font-weight: bold }}
</style>
<h1>theorykit: {summary}</h1>
<p>Preset <b>{preset}</b>. A claim should be supported. A control should be refuted: it is the same check on a
measurement with one assumption broken.</p>
<h2>Verdicts</h2>
<pre>{table}</pre>
<h2>Figures</h2>
{figures}
<h2>What the verdicts state</h2>
<table><tr><th>verdict<th>role<th>outcome<th>statement<th>source</tr>
{statements}
</table>
<h2>Results and the machine they come from</h2>
<table><tr><th>result<th>seconds<th>date<th>device<th>versions</tr>
{environments}
</table>
</html>
"""


def main(
    arguments: Sequence[str] | None = None,
    *,
    package: str = "paper_figures",
    experiments: str = "experiments",
    output: Path | None = None,
) -> int:
    """Write the report and return the exit status: 0, 1 if a result is missing, 2 if the folder cannot be made.

    Parameters
    ----------
    arguments
        Words of the command line; by default those of the process.
    package, experiments
        Packages that hold the figures and the experiments.
    output
        Folder of the report; by default ``output`` in the package's folder.
    """
    home, order = importlib.import_module(package), importlib.import_module(experiments).ORDER
    folder = output_folder(package, output)

    def write(preset: Preset = "quick") -> int:
        """Write every verdict and every figure of a preset to one page."""
        if not made(folder):
            return 2
        matplotlib.use("Agg")
        style.use()
        try:
            found = {name: results.load(name, preset, package=experiments) for name in order}
        except results.EXPLAINED as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        figures = []
        for name in home.FIGURES:
            script = importlib.import_module(f"{package}.{name}")
            figures.append(_figure(name, script.draw(*(found[needed] for needed in experiments_of(script)))))
        verdicts = [verdict for result in found.values() for verdict in result.verdicts]
        page = PAGE.format(
            preset=html.escape(preset),
            summary=f"{sum(v.as_expected for v in verdicts)} of {len(verdicts)} verdicts as expected",
            table=html.escape(verify.table(verdicts)),
            figures="\n".join(figures),
            statements="\n".join(map(_statement, verdicts)),
            environments="\n".join(map(_environment, found.values())),
        )
        path = folder / "report.html"
        path.write_text(page, encoding="utf-8")
        print(path)
        return 0

    return tyro.cli(write, prog="python -m paper_figures.report", args=arguments)


def _figure(name: str, figure: plt.Figure) -> str:
    """A figure inside the page: sharp at any size, its caption also as the text that a screen reader speaks."""
    picture = io.BytesIO()
    # Glyphs as paths: the reader's machine need not have the fonts.
    with plt.rc_context({"svg.fonttype": "path"}):
        figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    data = base64.b64encode(picture.getvalue()).decode()
    words = html.escape(figure.get_label() or name, quote=True)
    return f'<figure id="{name}"><img alt="{words}" src="data:image/svg+xml;base64,{data}"></figure>'


def _statement(v: verify.Verdict) -> str:
    mark = "" if v.as_expected else ' class="wrong"'
    cells = "".join(f"<td>{html.escape(text)}" for text in (v.statement, v.source))
    return f"<tr><td{mark}>{html.escape(v.claim)}<td>{v.role}<td{mark}>{v.outcome}{cells}</tr>"


def _environment(result: results.Result) -> str:
    known = result.environment
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    device = f"{', '.join(known['devices'])}, {known['cores']} cores, {known['platform']}, Python {known['python']}"
    cells = (result.path.name, f"{known['seconds']:.1f}", known["date"], device, versions)
    return "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells) + "</tr>"


if __name__ == "__main__":
    sys.exit(main())
