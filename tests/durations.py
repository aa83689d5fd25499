"""Print how long the tests of each file took: python tests/durations.py .cache/durations/*.xml

Reads the records that the parts of `make test` and `make test-all` leave. A fixture counts for the first test that
uses it.
"""

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree


def seconds_by_file(record: Path) -> tuple[Counter[str], Counter[str]]:
    """Return the seconds and the number of tests of each file in a JUnit record."""
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for case in ElementTree.parse(record).iter("testcase"):
        file = case.get("classname", "").replace(".", "/") + ".py"
        seconds[file] += float(case.get("time", 0))  # type: ignore[assignment]
        tests[file] += 1
    return seconds, tests


def main() -> None:
    for record in map(Path, sys.argv[1:]):
        seconds, tests = seconds_by_file(record)
        print(f"\n{record.stem}: {tests.total()} tests, {seconds.total():.0f} s\n\n| s | tests | file |\n|---|---|---|")
        for file, total in seconds.most_common():
            if total >= 1:
                print(f"| {total:.0f} | {tests[file]} | {file} |")


if __name__ == "__main__":
    main()
