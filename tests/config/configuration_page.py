"""docs/configuration.md, made of the dataclasses of the configuration and their docstrings.

PYTHONPATH=. python tests/config/configuration_page.py > docs/configuration.md
"""

from __future__ import annotations

from reformer_dist.config.key_reference import Group, Key, groups

HEAD = """# Configuration

Every key of a run, with its default. `reformer-train --explain model.n_hashes` shows a key and, if it differs, its
value on the command line; `--explain model` shows a group. Without `experiment=`, `reformer-train` starts with
`experiment=quickstart`, which sets some keys to values for a small model; `experiment=base` sets none.

The keys are defined by the dataclasses in `reformer_dist/config/`, of which `tests/config/configuration_page.py`
makes this page.
"""


def row_of(key: Key) -> str:
    choices = [f"`{name}`: {meaning}" for name, meaning in key.choices.items()]
    cells = [f"`{key.name}`", f"`{key.default}`", key.values, " ".join([key.meaning, *choices])]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"


def section_of(group: Group) -> str:
    title = f"{group.name}.*" if group.name else "Keys outside of groups"
    table = "| key | default | values | meaning |\n|---|---|---|---|\n" + "".join(map(row_of, group.keys))
    return f"\n## {title}\n\n{group.meaning}\n\n{table}"


def page() -> str:
    return HEAD + "".join(map(section_of, groups().values()))


if __name__ == "__main__":
    print(page(), end="")
