"""Every command with arguments that work."""

#: Arguments for each command, in a folder that holds ``dump`` and ``loads.npy``. A new command needs a line.
ARGUMENTS = {
    "summary": "dump",
    "runs": "dump",
    "layer": "1 dump",
    "ranks": "dump",
    "timeline": "dump",
    "placement": "dump",
    "experts": "dump",
    "traffic": "dump",
    "rearrangements": "dump",
    "compare": "--steps-a -11 --steps-b 12- dump",
    "replay": "--policy deepseek --interval-steps 10 --window-steps 10 dump",
    "advise": "--policy deepseek --interval-steps 10 --window-steps 10 dump",
    "postmortem": "dump",
    "report": "-o report.html --force dump",
    "check": "dump",
    "export placement": "--for json -o placement.json --force dump",
    "export loads": "--as csv -o loads.csv --force dump",
    "import": "--format array --model m --ep-size 2 --placement linear loads.npy imported",
    "copy": "dump copied",
    "compact": "dump compacted-{form}",
    "formulas": "",
    "watch": "--once dump",
    "serve-metrics": "--once dump",
    "recover": "dump",
}
