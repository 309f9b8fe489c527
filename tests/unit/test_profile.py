"""Exit profiles are read back as they were written; anything else is refused with a message that says what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shortstack.graphs.errors import RequestError
from shortstack.runtime.calibration.profile import Point, Profile, read_profile, write_profile

PROFILE = Profile(
    name="questions",
    template="margin >= {} and patience >= 2",
    threshold=0.9,
    criterion="margin >= 0.9 and patience >= 2",
    exit_layers=(4, 8),
    delta=0.1,
    epsilon=0.05,
    prompts=150,
    loss="text",
    test="hoeffding",
    max_new_tokens=64,
    mean_loss=0.01,
    mean_exit_layer=20.5,
    exited_share=0.4,
    predicted_saving=0.3,
    grid=(1.0, 0.9, 0.8),
    weights_sha256="0a" * 32,
    precision="float32",
    shortstack="0.1.0",
    curve=(
        Point(1.0, 0.0, 0.04, True, 30.0, 0.0, 9000, None),
        Point(0.9, 0.01, 0.05, True, 20.5, 0.4, 9000, 31.5),
    ),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "exit-profile.json"
    write_profile(PROFILE, path)
    return path


def edited(file: Path, **fields: Any) -> Path:
    data = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps({k: v for k, v in data.items() if v != "absent"}), encoding="utf-8")
    return file


def test_a_profile_is_read_back_the_same_and_no_other_file_is_left(file: Path) -> None:
    assert read_profile(file) == PROFILE
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_profile_without_a_threshold_uses_the_whole_model(file: Path) -> None:
    none = replace(PROFILE, threshold=None, criterion="never")
    write_profile(none, file)
    assert read_profile(file) == none
    assert str(none.policy().criterion) == "never"


def test_the_policy_of_a_profile_is_the_one_that_was_calibrated() -> None:
    policy = PROFILE.policy(kv_policy="pipeline")
    assert (str(policy.criterion), policy.exit_layers) == (PROFILE.criterion, (4, 8))
    assert (policy.verify, policy.kv_policy) == ("none", "pipeline")


def test_a_profile_that_cannot_be_written_leaves_the_old_one(file: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_profile(replace(PROFILE, name="\ud800"), file)
    assert read_profile(file) == PROFILE
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{", b"[]", b"null", b"[" * 100_000, b'"' + b"x" * (1 << 20) + b'"']
)
def test_a_file_that_is_not_a_profile_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(RequestError, match=r"exit-profile\.json.*alibrate again"):
        read_profile(file)


def test_a_missing_profile_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        read_profile(tmp_path / "exit-profile.json")
    with pytest.raises(RequestError, match="found a folder, expected a regular file"):
        read_profile(tmp_path)


@pytest.mark.parametrize("version", [0, 2, True, "1", None, "absent"])
def test_another_version_is_refused(file: Path, version: Any) -> None:
    with pytest.raises(RequestError, match=r"format_version.*expected 1"):
        read_profile(edited(file, format_version=version))


WRONG: list[tuple[str, Any]] = [
    ("name", 3),
    ("name", "\x1b[31m"),
    ("name", "x" * 1001),
    ("template", None),
    ("threshold", "0.9"),
    ("threshold", True),
    ("threshold", float("nan")),
    ("threshold", 10**400),
    ("exit_layers", []),
    ("exit_layers", [8, 4]),
    ("exit_layers", [4, 4]),
    ("exit_layers", [0]),
    ("exit_layers", [4.0]),
    ("exit_layers", "48"),
    ("delta", 0),
    ("epsilon", 1.5),
    ("prompts", 0),
    ("prompts", True),
    ("loss", "bleu"),
    ("loss", []),
    ("test", {}),
    ("max_new_tokens", -1),
    ("mean_loss", 1.1),
    ("mean_loss", float("inf")),
    ("mean_exit_layer", -1),
    ("exited_share", None),
    ("predicted_saving", 2),
    ("grid", [1, "0.9"]),
    ("grid", [1.0] * 1001),
    ("weights_sha256", "0A" * 32),
    ("weights_sha256", "../" * 20),
    ("precision", []),
    ("shortstack", 1),
    ("curve", {}),
    ("curve", [1]),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_named_with_its_field(file: Path, name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"exit-profile\.json: field {name}: found .*expected "):
        read_profile(edited(file, **{name: value}))


@pytest.mark.parametrize("name", ["threshold", "weights_sha256", "curve"])
def test_a_missing_field_is_named(file: Path, name: str) -> None:
    with pytest.raises(RequestError, match=f"no field {name}"):
        read_profile(edited(file, **{name: "absent"}))


def test_all_problems_are_named_at_once(file: Path) -> None:
    with pytest.raises(RequestError) as caught:
        read_profile(edited(file, delta=7, loss="absent", colour="red"))
    assert all(part in str(caught.value) for part in ("field delta", "no field loss", "unknown field colour"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"p_value": 2}, r"curve\[0\]\.p_value"),
        ({"is_accepted": 1}, r"curve\[0\]\.is_accepted"),
        ({"colour": "red"}, r"unknown field curve\[0\]\.colour"),
    ],
)
def test_a_wrong_point_of_the_curve_is_named(file: Path, change: dict[str, Any], says: str) -> None:
    point = json.loads(file.read_text(encoding="utf-8"))["curve"][0] | change
    with pytest.raises(RequestError, match=says):
        read_profile(edited(file, curve=[point]))


@pytest.mark.parametrize(
    "fields",
    [
        {"threshold": 0.1},
        {"threshold": None},
        {"criterion": "always"},
        {"criterion": "margin >= 0.1 and patience >= 2"},
        {"template": "margin >= {}"},
    ],
)
def test_a_threshold_that_was_edited_is_noticed(file: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"field criterion.*edited"):
        read_profile(edited(file, **fields))


@pytest.mark.parametrize(
    "template", ["", "never", "top_prob >= {} and", "(" * 900 + "top_prob >= {}", "max_depth = {}..1"]
)
def test_a_template_that_is_not_valid_is_refused(file: Path, template: str) -> None:
    with pytest.raises(RequestError, match=r"exit-profile\.json: exit criterion"):
        read_profile(edited(file, template=template))
