"""Options, environment and file, in this order; contradictions as sentences."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import SettingsError, load_settings


def test_option_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cmt.toml"
    file.write_text(
        'checkpoint = "from-file"\ndata_dir = "from-file"\nport = 1\ncandidates = 77\n'
        'cors_origins = ["https://desk.example"]\n'
    )
    monkeypatch.setenv("CMT_DATA_DIR", "from-environment")
    monkeypatch.setenv("CMT_PORT", "2")
    settings = load_settings(file, port=3, device=None)
    assert settings.checkpoint == Path("from-file")
    assert settings.data_dir == Path("from-environment")
    assert (settings.port, settings.candidates, settings.device) == (3, 77, "auto")
    assert settings.cors_origins == ("https://desk.example",)
    monkeypatch.setenv("CMT_CONFIG", str(file))
    assert load_settings().port == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "checkpoint is missing; give --checkpoint or CMT_CHECKPOINT"),
        ('checkpoint = "c"\ndata_dir = "d"\nportt = 1', "there is no setting portt"),
        ('checkpoint = "c"\ndata_dir = "d"\nport = 70000', "setting port"),
        ('checkpoint = "c"\ndata_dir = "d"\ncors_origins = ["*"]', "name the origins"),
        ("checkpoint = ", "no readable TOML"),
        (
            'checkpoint = "c"\ndata_dir = "d"\ndevice = "gpu1"',
            "setting device: 'gpu1' is no device",
        ),
        (
            'checkpoint = "c"\ndata_dir = "d"\ndevice = "cuda:1"\nruntime = "openvino"',
            "OpenVINO runs on the CPU",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "cmt.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=sentence) as raised:
        load_settings(file)
    assert "\n" not in str(raised.value)


def test_other_troubles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="give the path of a TOML file"):
        load_settings(tmp_path / "missing.toml")
    monkeypatch.setenv("CMT_CORS_ORIGINS", "https://desk.example")
    with pytest.raises(SettingsError, match="lists are written as JSON"):
        load_settings(checkpoint=tmp_path, data_dir=tmp_path)


def test_one_of_several_gpus_is_chosen_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMT_DEVICE", "cuda:1")
    assert load_settings(checkpoint=tmp_path, data_dir=tmp_path).device == "cuda:1"
