"""API keys: made once, stored as hashes, told apart by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve import app, keys
from serve.keys import Keys


def test_a_key_is_known_by_its_hash_alone() -> None:
    one, line_one = keys.new("shop")
    two, line_two = keys.new("lab.2")
    known = Keys.parse(f"# who may\n{line_one}\n\n  {line_two}\n", "here")
    assert known.name_of(f"Bearer {one}") == "shop"
    assert known.name_of(f"bearer  {two} ") == "lab.2"
    assert one not in line_one
    assert Keys.parse(known.lines(), "again") == known
    for wrong in (
        "",
        "Bearer",
        "Bearer ",
        f"Basic {one}",
        one,
        f"Bearer {one}x",
        "Bearer \ud800",
        f"Bearer {line_one}",
    ):
        assert known.name_of(wrong) is None
    assert Keys({}).name_of(f"Bearer {one}") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("shop", "line 1 of here"),
        ("\nshop " + "0" * 63, "line 2 of here"),
        ("sh/op " + "0" * 64, "line 1"),
        ("a " + "0" * 64 + "\na " + "1" * 64, "a is given twice in here, line 2"),
    ],
)
def test_a_line_of_another_form_is_refused_without_showing_it(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        Keys.parse(text, "here")
    assert "0000" not in str(refused.value), "it may be a key that was put in place of its hash"


def test_a_file_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(keys.ENVIRONMENT, raising=False)
    assert not Keys.find(None).hashes
    monkeypatch.setenv(keys.ENVIRONMENT, keys.new("env")[1])
    assert list(Keys.find(None).hashes) == ["env"]
    file = tmp_path / "keys"
    file.write_text(keys.new("file")[1])
    assert list(Keys.find(file).hashes) == ["file"]
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        Keys.find(file)
    with pytest.raises(ValueError, match="cannot be read"):
        Keys.find(tmp_path / "nowhere")


def test_the_command_prints_the_key_apart_from_the_line_to_store(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve.keys", "new", "shop"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    key = done.stderr.split()[-1]
    assert Keys.parse(done.stdout, "stdout").name_of(f"Bearer {key}") == "shop"
    for words in ([], ["make", "shop"], ["new"], ["new", "two words"]):
        with pytest.raises(SystemExit) as stopped:
            keys.main(words)
        assert stopped.value.code == 2


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_without_keys_only_this_machine_is_served(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(keys.ENVIRONMENT, raising=False)
    with pytest.raises(SystemExit) as stopped:
        app.main(["--host", host])
    assert stopped.value.code == 2
    assert f"host: {host} lets other machines in, and there are no API keys" in capsys.readouterr().err
    monkeypatch.setenv(keys.ENVIRONMENT, keys.new("shop")[1])
    app.check(app.Options(host=host))


def test_this_machine() -> None:
    assert all(map(keys.is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]))
    assert not any(map(keys.is_loopback, ["", "0.0.0.0", "::", "10.0.0.1", "localhost.example.org"]))
