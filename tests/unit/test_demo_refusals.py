"""What the demo refuses before it measures anything."""

from recipes import demo


def test_a_config_that_cannot_work_ends_it_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "run_measured", lambda command: 1 / 0)
    assert demo.main(["--output", str(tmp_path / "run"), "training.max_stps=5"]) == 2
    assert "unknown key 'max_stps'; did you mean 'max_steps'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
