"""Publishing a run to S3, whose interface moto's server offers on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finished import expected, make_run, write_manifest
from test_publish import During, stop

from corpusprep import InputError, publish
from corpusprep.commands.targets import folder

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install '.[publish]'")
pytest.importorskip("moto", reason="moto is not installed: make test-publish")

import boto3
from moto.server import ThreadedMotoServer

TARGET = "s3://bucket/mixes/first"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    made = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    host, port = made.get_host_and_port()
    yield f"http://{host}:{port}"
    made.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A client of an empty server with one bucket; the variables are those that users set."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    urllib.request.urlopen(urllib.request.Request(f"{server}/moto-api/reset", method="POST")).close()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    client.close()


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def contents(s3: Any, prefix: str = "mixes/first/") -> dict[str, bytes]:
    listed = s3.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
    found = {each["Key"]: s3.get_object(Bucket="bucket", Key=each["Key"])["Body"].read() for each in listed}
    return {key.removeprefix(prefix): content for key, content in found.items()}


def times(s3: Any) -> dict[str, Any]:
    return {each["Key"]: each["LastModified"] for each in s3.list_objects_v2(Bucket="bucket").get("Contents", [])}


def test_first_again_and_one_changed_file(s3: Any, made: Path) -> None:
    first = publish(made, TARGET, with_rejects=True)
    assert sorted(first.sent) == sorted(expected(made, with_rejects=True))
    assert contents(s3) == expected(made, with_rejects=True)
    key = "mixes/first/train-00001-of-00003.parquet"
    head = s3.head_object(Bucket="bucket", Key=key, ChecksumMode="ENABLED")
    assert head["ChecksumSHA256"]
    before = times(s3)
    assert publish(made, TARGET, with_rejects=True).sent == []
    assert times(s3) == before
    s3.put_object(Bucket="bucket", Key=key, Body=b"?" * head["ContentLength"])
    assert publish(made, TARGET, with_rejects=True).sent == ["train-00001-of-00003.parquet"]
    assert contents(s3) == expected(made, with_rejects=True)


def test_fewer_files_than_before_and_files_of_others(s3: Any, made: Path) -> None:
    publish(made, TARGET)
    s3.put_object(Bucket="bucket", Key="mixes/first/notes.txt", Body=b"ours")
    s3.put_object(Bucket="bucket", Key="mixes/first-b/train-00000-of-00003.parquet", Body=b"ours")
    make_run(made, 2, seed=2)
    assert publish(made, TARGET).removed == [f"train-{n:05d}-of-00003.parquet" for n in range(3)]
    assert contents(s3) == expected(made) | {"notes.txt": b"ours"}
    assert contents(s3, "mixes/first-b/") == {"train-00000-of-00003.parquet": b"ours"}


def test_an_interrupted_publish_goes_on(s3: Any, tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", 6, rows=300)
    size = max(path.stat().st_size for path in (made / "mix").iterdir())
    with pytest.raises(KeyboardInterrupt):
        publish(made, TARGET, progress=During(2 * size, stop))
    left = contents(s3)
    assert "SHA256SUMS.incomplete" in left
    assert "SHA256SUMS" not in left
    whole = {name for name, content in left.items() if content == expected(made).get(name)}
    assert whole
    again = publish(made, TARGET)
    assert set(again.reused) == whole
    assert contents(s3) == expected(made)


def test_large_objects_are_sent_in_parts_and_known_by_their_etag(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 5 << 20  # the least that S3 allows
    monkeypatch.setattr(folder, "_PART", part)
    made = make_run(tmp_path / "run", 1)
    with open(made / "mix" / "train-00000-of-00001.parquet", "ab") as file:
        file.write(os.urandom(2 * part + 7))
    write_manifest(made)
    publish(made, TARGET)
    head = s3.head_object(Bucket="bucket", Key="mixes/first/train-00000-of-00001.parquet")
    assert head["ETag"].endswith('-3"')
    assert publish(made, TARGET).sent == []
    # Another size of parts gives another ETag: the object is read.
    monkeypatch.setattr(folder, "_PART", part + 1)
    assert publish(made, TARGET).sent == []
    assert contents(s3) == expected(made)


def test_parts_of_an_object_that_is_given_up_are_removed(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_PART", 5 << 20)
    made = make_run(tmp_path / "run", 1)
    with open(made / "mix" / "train-00000-of-00001.parquet", "ab") as file:
        file.write(os.urandom(100 << 20))
    write_manifest(made)
    with pytest.raises(KeyboardInterrupt):
        publish(made, TARGET, progress=During(1 << 20, stop))
    assert "train-00000-of-00001.parquet" not in contents(s3)
    assert "Uploads" not in s3.list_multipart_uploads(Bucket="bucket")


@pytest.mark.parametrize("large", [False, True])
def test_an_object_that_arrives_damaged_is_named(
    s3: Any, tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_run(tmp_path / "run")
    name = "train-00002-of-00003.parquet"
    if large:
        monkeypatch.setattr(folder, "_PART", 5 << 20)
        with open(made / "mix" / name, "ab") as file:
            file.write(os.urandom(11 << 20))
        write_manifest(made)

    def spoil() -> None:
        content = (made / "mix" / name).read_bytes()
        s3.put_object(Bucket="bucket", Key=f"mixes/first/{name}", Body=content[:-1] + b"?")

    last = sum(path.stat().st_size for path in [*(made / "mix").rglob("*.*"), made / "manifest.json"])
    with pytest.raises(InputError, match=rf"{TARGET}/{name}: it has another checksum"):
        publish(made, TARGET, progress=During(last, spoil))
    assert "SHA256SUMS" not in contents(s3)
    assert publish(made, TARGET).sent == [name, "SHA256SUMS"]
    assert contents(s3) == expected(made)


def test_a_dry_run_sends_nothing(s3: Any, made: Path) -> None:
    assert sorted(publish(made, TARGET, dry_run=True).sent) == sorted(expected(made))
    assert contents(s3) == {}


def test_a_missing_bucket(s3: Any, made: Path) -> None:
    for dry_run in (False, True):
        with pytest.raises(InputError, match=r"s3://nowhere/mix: there is no bucket nowhere .*create it"):
            publish(made, "s3://nowhere/mix", dry_run=dry_run)
    assert [each["Name"] for each in s3.list_buckets()["Buckets"]] == ["bucket"]
    with pytest.raises(InputError, match="names no bucket"):
        publish(made, "s3://")


def test_denied(s3: Any, made: Path) -> None:
    statement = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:PutObject",
        "Resource": "arn:aws:s3:::bucket/mixes/*",
    }
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    s3.put_bucket_policy(Bucket="bucket", Policy=json.dumps(policy))
    with pytest.raises(InputError, match=r"access is denied .*s3:PutObject"):
        publish(made, TARGET)
    assert contents(s3) == {}


def test_no_credentials(s3: Any, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(InputError, match=r"no valid credentials .*AWS_ACCESS_KEY_ID"):
        publish(made, TARGET)
    monkeypatch.setenv("AWS_PROFILE", "unknown")
    with pytest.raises(InputError, match=r"no valid credentials .*unknown"):
        publish(made, TARGET)


def test_no_network_and_the_command(s3: Any, made: Path) -> None:
    def call(**variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "corpusprep", "publish", str(made), TARGET]
        return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)

    done = call()
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert done.stdout.startswith("7 files sent (")
    assert contents(s3) == expected(made)
    done = call(AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {TARGET}: it cannot be reached")
    assert len(done.stderr.splitlines()) == 1
