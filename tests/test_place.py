"""Places for files by URI: on a disk in every run, and on a server that speaks S3 where one is installed."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from ranksearch.errors import UsageError
from ranksearch.places import place as places
from ranksearch.places.place import PlaceError, Remote, as_uri, fetch, filling, place_at, text_of
from ranksearch.trial.checkpoint import CheckpointFile
from tests.conftest import free_ports


@pytest.fixture(scope="module")
def s3():
    """The environment of a server that speaks S3 and has one bucket."""
    program = os.environ.get("MOTO_SERVER")
    if program is None:
        pytest.skip(
            "no server that speaks S3 is named: MOTO_SERVER=path of a recent moto_server (pip install 'moto[server]')"
        )
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    command = [program, "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(150):
        try:
            urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT"), timeout=5).close()
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    with pytest.MonkeyPatch.context() as patched:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patched.setenv(name, "test")
        patched.setenv("AWS_ENDPOINT_URL", url)
        yield "s3://bucket/a folder"
    server.kill()
    server.wait()


@pytest.fixture(params=["file", "s3"])
def remote(request, tmp_path):
    return Remote(as_uri(str(tmp_path / "a folder")) if request.param == "file" else request.getfixturevalue("s3"))


def test_what_was_written_is_read_and_what_was_removed_is_gone(remote):
    file = remote / "trials" / "007" / "plan.json"
    assert file.read() is None
    file.write(b"{}")
    file.write(b"{1}")
    assert place_at(text_of(file)).read() == b"{1}"
    file.remove()
    file.remove()
    assert file.read() is None
    (remote / "one").write(b"1")
    remote.remove_folder()
    assert (remote / "one").read() is None


def test_a_folder_is_filled_here_and_fetched_whole_or_not_at_all(remote, tmp_path):
    with filling(remote / "net") as folder:
        (folder / "model").write_bytes(bytes(range(256)))
        (folder / "plan.json").write_text("{}")
    home = tmp_path / "home"
    assert fetch(remote / "net", home, ("model", "plan.json"))
    assert (home / "model").read_bytes() == bytes(range(256))
    assert {path.name for path in home.iterdir()} == {"model", "plan.json"}
    assert not fetch(remote / "net", tmp_path / "nothing", ("model", "other"))
    assert not (tmp_path / "nothing").exists()
    remote.remove_folder()


def test_a_state_comes_back_and_a_damaged_one_is_none(remote):
    kept, state = CheckpointFile(remote / "checkpoints" / "a.pt", 60), {"weights": torch.arange(5), "step": 3}
    assert kept.load() is None
    kept.save(state)
    back = kept.load()
    assert back["step"] == 3
    assert torch.equal(back["weights"], state["weights"])
    whole = (remote / "checkpoints" / "a.pt").read()
    for damaged in (whole[: len(whole) // 2], b"no state", b""):
        (remote / "checkpoints" / "a.pt").write(damaged)
        assert kept.load() is None
    kept.remove()
    assert (remote / "checkpoints" / "a.pt").read() is None


def test_a_writer_that_is_killed_leaves_the_old_file_or_the_new_one(tmp_path):
    """A real SIGKILL while megabytes are written, whatever it hits; what is left beside the file goes with it."""
    file = Remote((tmp_path / "state").as_uri())
    old, new = b"o" * 8_000_000, b"n" * 8_000_000
    file.write(old)
    script = (
        "import sys; from ranksearch.places.place import Remote; print(1, flush=True)\n"
        "while True: Remote(sys.argv[1]).write(b'n' * 8_000_000)"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, file.uri], stdout=subprocess.PIPE)
    writer.stdout.readline()
    until = time.monotonic() + 30
    while file.read() == old and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert file.read() == new
    (tmp_path / "state.else-1").write_bytes(b"half")
    file.remove()
    assert not list(tmp_path.iterdir())


def test_a_state_that_a_store_refuses_stops_no_trial_but_a_net_does(tmp_path, monkeypatch):
    (tmp_path / "full").write_text("a file, where a folder is wanted")
    refusing = Remote((tmp_path / "full").as_uri())
    CheckpointFile(refusing / "a.pt", 60).save({"step": 1})
    pauses = []
    monkeypatch.setattr(places.time, "sleep", pauses.append)
    with pytest.raises(PlaceError, match="cannot be written"), filling(refusing / "net") as folder:
        (folder / "plan.json").write_text("{}")
    assert pauses == list(places.PAUSES)


def test_errors_of_a_store_are_sentences(s3, monkeypatch):
    with pytest.raises(PlaceError, match="there is no such bucket"):
        Remote("s3://another/x").write(b"")
    away = f"s3://bucket/x?endpoint_override=127.0.0.1:{free_ports(1)[0]}&scheme=http&region=us-east-1"
    with pytest.raises(PlaceError, match=r"nothing answers there.*AWS_ENDPOINT_URL"):
        Remote(away).write(b"")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("s4://bucket", "Did you mean 's3'"),
        ("s3:///path", "names no bucket"),
        ("s3://key:secret@bucket/path", "holds a password"),
    ],
)
def test_a_place_that_is_none_is_refused_and_a_secret_not_repeated(given, said):
    with pytest.raises(UsageError, match=said) as caught:
        as_uri(given)
    assert "secret" not in str(caught.value)


def test_a_path_becomes_a_uri_and_stays_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = as_uri("some folder")
    assert uri == (tmp_path / "some folder").as_uri() == as_uri(uri)
    assert (Remote(uri) / "x").uri.endswith("some%20folder/x")
    assert (Remote("s3://b/p?region=r") / "x").uri == "s3://b/p/x?region=r"
    assert place_at(text_of(Path("here"))) == tmp_path / "here"
