"""Run every claim of the article and rewrite the verdict table of README.md beside this file.

python benchmarks/claims/all.py                 # everything, then the table
python benchmarks/claims/all.py poisson speed   # some, then the table
python benchmarks/claims/all.py --table         # the table alone, from the recorded results
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from claim import FOLDER, ROOT, markdown, write

CLAIMS = ("function_fitting", "special_functions", "poisson", "forgetting", "speed", "local_control")
BEGIN, END = "<!-- verdicts: written by all.py -->", "<!-- end of verdicts -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("claims", nargs="*", metavar="claim", help=f"of {', '.join(CLAIMS)}; all without any")
    parser.add_argument("--table", action="store_true", help="rewrite the table from the recorded results alone")
    options = parser.parse_args()
    if unknown := set(options.claims) - set(CLAIMS):
        parser.error(f"unknown claims {sorted(unknown)}; choose among {', '.join(CLAIMS)}")
    here = Path(__file__).parent
    if not options.table:
        for name in options.claims or CLAIMS:
            print(f"\n=== {name} ===", flush=True)
            subprocess.run([sys.executable, str(here / f"{name}.py")], cwd=ROOT, check=True)
    path = here / "README.md"
    write(path, with_table(path.read_text(), table(FOLDER)))
    print(f"\n{table(FOLDER)}\n\nwritten: {path.relative_to(ROOT)}")


def table(folder: Path) -> str:
    """One row for each recorded result, in the order of CLAIMS; a claim that has none is said to have none."""
    rows = []
    for name in CLAIMS:
        path = folder / f"{name}.json"
        if not path.is_file():
            rows.append([name, "", "not recorded", "", f"`python benchmarks/claims/{name}.py`"])
            continue
        result = json.loads(path.read_text())
        link = f"[{result['verdict']}](../results/claims/{name}.md)"
        cells = (result["claim"], result["paper"], link, result["ours"], f"`{result['command']}`")
        rows.append([cell.replace("|", "\\|") for cell in cells])
    return markdown(["claim", "the article", "verdict", "here", "command"], rows)


def with_table(text: str, verdicts: str) -> str:
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md needs one line {BEGIN!r} and one {END!r}; put them where the table belongs")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{verdicts}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    main()
