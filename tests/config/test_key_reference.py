"""What is said about keys: docs/configuration.md, --explain, and the keys that an unknown one may stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
from configuration_page import page
from support.tiny import flat

from reformer_dist.config import RunConfig
from reformer_dist.config.key_reference import groups, keys, nearest_keys
from reformer_dist.errors import ConfigError
from reformer_dist.run.compose import to_dict
from reformer_dist.run.explain import explain

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_page_is_that_of_the_code() -> None:
    """If not, `python tests/config/configuration_page.py > docs/configuration.md` writes the right one."""
    assert page() == PAGE.read_text()


def test_every_key_is_known_with_a_meaning_and_values() -> None:
    # flat leaves out mappings, which are empty here
    assert {key for key in keys() if "[]" not in key} - {"sweep.params"} == {
        key for key, _ in flat(to_dict(RunConfig()))
    }
    assert [key.name for key in keys().values() if not key.meaning] == []
    assert [key.name for key in keys().values() if not key.values] == ["data.path", "data.skip_steps"]
    assert [group.name for group in groups().values() if not group.meaning] == []


def test_a_key_has_its_meaning_choices_bounds_and_default() -> None:
    shown = explain("model.attention_backend", [])
    assert "auto is triton or native" in shown and "reference, torch, native or triton" in shown
    assert "default: auto" in shown and "here:" not in shown
    assert "random: Each training row from one of the strands" in explain("data.strand", [])
    assert "at least 1, at most 1024" in explain("model.n_hashes", [])
    assert "a whole number, at least 1; or null" in explain("trainer.micro_batch_size", [])
    assert "Peak learning rate of these parameters" in explain("optim.groups[].lr", [])


def test_a_key_has_its_value_on_the_command_line() -> None:
    assert "here:    2, with experiment=quickstart\n" in explain("model.n_hashes", [])
    assert "here:    8, with experiment=base model.n_hashes=8\n" in explain(
        "model.n_hashes", ["experiment=base", "model.n_hashes=8"]
    )
    assert "here:" not in explain("model.n_hashes", ["experiment=base"])


def test_a_group_lists_its_keys_and_no_name_lists_the_groups() -> None:
    assert "parallel.sequence=1\n  Ranks that share each sequence" in explain("parallel", [])
    assert "model.*\n" in explain("", []) and "output_dir\n" in explain("", [])


@pytest.mark.parametrize(
    ("name", "word"),
    [("lr", "mean optim.lr"), ("modell", "mean model"), ("qqq", "must be a key"), ("model.", "model.")],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, word: str) -> None:
    with pytest.raises(ConfigError, match=f"--explain={name}: ") as caught:
        explain(name, [])
    assert word in str(caught.value)


def test_keys_that_an_unknown_one_may_stand_for() -> None:
    assert nearest_keys("lr") == ["optim.lr"]
    assert nearest_keys("trainer.lr") == ["optim.lr"]
    assert nearest_keys("kind") == ["task.kind", "optim.kind", "tracker.kind", "launcher.kind", "sweep.kind"]
    assert nearest_keys("model.dimm") == ["model.dim"]
    assert nearest_keys("max_step") == ["trainer.max_steps"]
    assert nearest_keys("output_dirr") == ["output_dir"]
    assert nearest_keys("foo") == []
