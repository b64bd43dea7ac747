"""Real log lines of 13 systems in two files, each row with its `system`: for splits by that field.

    python -m benchmarks.real_logs FOLDER        writes FOLDER/train.jsonl and FOLDER/validation.jsonl

Needs ../shared (or MEERKAT_SHARED), which has a folder for each system. A sweep divides these rows with
`splits = [{ how = "field", field = "system" }]`, and `meerkat partition` with `--split field --field system`.
"""

import argparse
from pathlib import Path

from benchmarks.minilm_agnews import SHARED
from meerkat_mq.core.step import Row
from meerkat_mq.tasks.data import read_rows, write_rows


def lines_of(split: str) -> list[Row]:
    """The rows of all systems, by name."""
    folders = sorted((SHARED / "data/logs").iterdir())
    return [{**row, "system": folder.name} for folder in folders for row in read_rows(folder / f"{split}.jsonl")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        rows = lines_of(split)
        write_rows(folder / f"{split}.jsonl", rows)
        print(f"{folder / split}.jsonl: {len(rows)} rows of {len({row['system'] for row in rows})} systems")


if __name__ == "__main__":
    main()
