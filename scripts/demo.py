"""Makes the README's demo, docs/images/demo.svg, and its before and after: `python -m scripts.demo`.

Commands print all that they show, about the planted incident, except for the comments and vLLM's log lines.
No engine ran here, so these are vLLM 0.33.0's format (`vllm/distributed/eplb/eplb_state.py`) with the figures
that vLLM would compute from the same loads.

The picture is an SVG without scripts. It plays once and stays on its last screen; a program that plays no
animation shows that screen.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from rich.text import Text

from eplb_analyze import open_run
from examples.incident import REARRANGED
from scripts.terminal import IMAGES, ROOT, WIDTH, new_console, planted_incident, printed

PICTURE, README = IMAGES / "demo.svg", ROOT / "README.md"
#: Lines of the terminal's window; the time that it plays; typing, reading, and a break, in seconds.
ROWS, SECONDS, PER_KEY, PER_LINE, BREAK = 36, 30.0, 0.04, 0.42, 0.9
MATCH = "balancedness=[0-9.]*"
LOG, SUMMARY, ADVISE = (
    f"grep '{MATCH}' vllm.log",
    "eplb-analyze summary incident",
    "eplb-analyze advise incident",
)


@dataclass(frozen=True)
class Row:
    """A line of the terminal, the second at which it appears, and whether it is typed from then on."""

    text: Text
    at: float
    typed: bool = False


def main() -> None:
    with planted_incident() as folder:
        log = log_lines(folder / "incident")
        rows = story(folder, log)
        README.write_text(renewed_readme(README.read_text(), rows))
    PICTURE.write_text(picture(rows))
    print(
        f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size:,} bytes, {rows[-1].at:.1f} s to the last line"
    )


def log_lines(dump: Path) -> list[str]:
    """What vLLM would have logged every 1,000 steps of its counter, which starts at 3/4 of the interval."""
    run = open_run(dump)
    interval = 4 * REARRANGED
    lines = []
    for step in range(0, 3000, 1000):
        tokens = np.stack(run.loads(steps=(step, step + 1), experts=False)["rank_load"].to_list())
        mean, most = float(tokens.mean(axis=1).sum()), int(tokens.max(axis=1).sum())
        counter = (step + interval - REARRANGED) % interval
        at = datetime.fromisoformat(run.clock.iso(step) or "").strftime("%m-%d %H:%M:%S")
        lines.append(
            f"INFO {at} [eplb_state.py:634] EPLB step: {counter} for model {run.info.model}: "
            f"avg_tokens={mean:.2f}, max_tokens={most}, balancedness={mean / most:.4f}, "
            f"steps until the next rearrangement: {interval - counter}"
        )
    return lines


def story(folder: Path, log: list[str]) -> list[Row]:
    """The demo: what an engineer sees without a recording, then the answer."""
    rows: list[Row] = []
    clock = 0.5

    def comment(line: str) -> None:
        nonlocal clock
        rows.append(Row(Text(f"# {line}", style="bold #ffd75f"), clock))
        clock += 2 * BREAK

    def command(line: str, output: list[Text]) -> None:
        """Paragraphs appear one after the other, so that there is time to read them."""
        nonlocal clock
        rows.append(Row(Text(f"$ {line}", style="bold"), clock, typed=True))
        clock += PER_KEY * len(line) + BREAK
        for number, text in enumerate(output):
            if number and not output[number - 1].plain:
                clock += PER_LINE * sum(row.at == clock for row in rows)
            rows.append(Row(text, clock))
        clock += PER_LINE * sum(row.at == clock for row in rows)
        rows.append(Row(Text(), clock))

    comment("03:04. Users report slow answers. Are the experts to blame?")
    command(LOG, [part for line in log for part in wrapped(line)])
    comment("One number for 58 layers. Which expert? Since when? What does it cost?")
    summary = printed(SUMMARY.split()[1:], folder, color=True)
    command(SUMMARY, [Text.from_ansi(line) for line in summary.splitlines()])
    advice = printed(ADVISE.split()[1:], folder, color=True)
    command(
        "eplb-analyze advise incident | head -2", [Text.from_ansi(line) for line in advice.splitlines()[:2]]
    )
    return rows[:-1]


def wrapped(line: str) -> list[Text]:
    """A log line on the terminal, with the match in the color of grep."""
    text = Text(line)
    text.highlight_regex(MATCH, "bold #ff5f57")
    return list(text.wrap(new_console(), WIDTH))


def before_and_after(rows: list[Row]) -> dict[str, list[str]]:
    """The lines of the demo that the README shows: the log line of the first hot step, and the answer."""
    lines = [row.text.plain.rstrip() for row in rows]
    first, hot, *_ = (number for number, line in enumerate(lines) if line.startswith("INFO"))
    paragraphs = "\n".join(lines).split("\n\n")
    incident = next(one for one in paragraphs if re.match(r"\d+ incidents?\n", one))
    return {
        "before": lines[hot : 2 * hot - first],
        "after": [f"$ {SUMMARY}", "...", *incident.splitlines(), "", *lines[-3:]],
    }


def renewed_readme(readme: str, rows: list[Row]) -> str:
    for name, lines in before_and_after(rows).items():
        start = readme.index(f"<!-- scripts/demo.py: {name} -->")
        block = re.compile(r"```text\n.*?\n```", re.DOTALL).search(readme, start)
        assert block, name
        text = "\n".join(["```text", *lines, "```"])
        readme = readme[: block.start()] + text + readme[block.end() :]
    return readme


# The picture

#: The sizes with which rich draws.
CHAR, LINE = 12.2, 24.4
DRAWN = re.compile(
    r'<text class="t-(?P<style>r\d+)" x="(?P<x>[^"]+)" y="(?P<y>[^"]+)" textLength="[^"]+" '
    r'clip-path="url\(#t-line-(?P<row>\d+)\)">(?P<text>.*?)</text>'
)


def picture(rows: list[Row]) -> str:
    console = new_console()
    for row in rows:
        console.print(row.text, no_wrap=True)
    drawn = console.export_svg(code_format="{styles}\0{matrix}", unique_id="t")
    styles, matrix = drawn.replace(".t-r", ".r").split("\0")

    def element(match: re.Match[str]) -> str:
        """A piece of a row that appears with it. Of a typed row, each character appears when it is typed."""
        row, text = rows[int(match["row"])], html.unescape(match["text"])
        pieces = list(text) if row.typed else [text]
        return "".join(
            f'<text class="{match["style"]} hidden" style="animation-duration:{row.at + PER_KEY * n:.2f}s" '
            f'x="{float(match["x"]) + n * CHAR:g}" y="{match["y"]}" textLength="{len(piece) * CHAR:g}">'
            f"{html.escape(piece, quote=False)}</text>\n"
            for n, piece in enumerate(pieces)
            if piece.strip()
        )

    width, window = WIDTH * CHAR, ROWS * LINE
    return f"""\
<svg viewBox="0 0 {width + 18:g} {window + 58:g}" xmlns="http://www.w3.org/2000/svg">
<style>
.matrix {{ font: 20px monospace; }}
{styles}
.hidden {{ animation: hidden linear; }}
@keyframes hidden {{ from, to {{ visibility: hidden; }} }}
{scroll(rows)}
@media (prefers-reduced-motion: reduce) {{ * {{ animation: none !important; }} }}
</style>
<clipPath id="window"><rect y="2" width="{width:g}" height="{window:g}"/></clipPath>
<rect x="1" y="1" width="{width + 16:g}" height="{window + 56:g}" rx="8" fill="#292929" stroke="#ffffff59"/>
<g transform="translate(26,22)">
<circle r="7" fill="#ff5f57"/><circle cx="22" r="7" fill="#febc2e"/><circle cx="44" r="7" fill="#28c840"/>
</g>
<g transform="translate(9,41)" clip-path="url(#window)"><g class="matrix scroll">
{re.sub(DRAWN, element, matrix)}</g></g>
</svg>
"""


def scroll(rows: list[Row]) -> str:
    """Like a terminal, the window follows the last row."""
    above = {row.at: max(0, number + 1 - ROWS) for number, row in enumerate(rows)}
    moves = {at: f"transform: translateY(-{up * LINE:g}px);" for at, up in above.items()}
    frames = " ".join(f"{100 * at / SECONDS:.2f}% {{ {move} }}" for at, move in moves.items())
    last = moves[rows[-1].at]
    return (
        f".scroll {{ {last} animation: scroll {SECONDS:g}s step-end; }}\n"
        f"@keyframes scroll {{ from {{ transform: none; }} {frames} to {{ {last} }} }}"
    )


def text_of(svg: str) -> list[str]:
    """The lines of a picture, from first to last."""
    lines: dict[float, dict[float, str]] = {}
    for x, y, text in re.findall(r'<text [^>]*x="([^"]+)" y="([^"]+)"[^>]*>(.*?)</text>', svg):
        lines.setdefault(float(y), {})[float(x)] = html.unescape(text).replace("\xa0", " ")
    rows = [""] * (round(max(lines) / LINE))
    for y, parts in lines.items():
        line = ""
        for x, part in sorted(parts.items()):
            line = line.ljust(round(x / CHAR)) + part
        rows[round((y - 20) / LINE)] = line.rstrip()
    return rows


if __name__ == "__main__":
    main()
