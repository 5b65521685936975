"""Makes docs/images/questions.svg, which docs/cli.md shows: `python -m scripts.pictures`."""

from __future__ import annotations

from rich.text import Text

from scripts.terminal import IMAGES, new_console, planted_incident, printed

#: The commands whose output the picture shows, and how many lines of each.
COMMANDS = [("layer 12 --step 1500", 24), ("experts --layer 12", 40), ("rearrangements", 40)]


def main() -> None:
    console = new_console()
    with planted_incident() as folder:
        for number, (command, lines) in enumerate(COMMANDS):
            prompt = f"$ eplb-analyze {command} incident"
            console.print(f"{chr(10) if number else ''}{prompt}", style="bold")
            output = printed([*command.split(), "incident"], folder, color=True)
            console.print(Text.from_ansi("\n".join(output.splitlines()[:lines])))
    svg = console.export_svg(title="eplb-analyze")
    # Use the reader's fonts: showing the picture must not download anything.
    (IMAGES / "questions.svg").write_text(strip_fonts(svg))


def strip_fonts(svg: str) -> str:
    start = svg.index("@font-face")
    end = svg.rindex("@font-face")
    end = svg.index("}", end) + 1
    return svg[:start] + svg[end:].replace("Fira Code,", "")


if __name__ == "__main__":
    main()
