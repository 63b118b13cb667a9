"""A repository in a store, here one in memory, and what is fetched of it."""

from __future__ import annotations

from importlib.util import find_spec

import fsspec
import pytest

from configs.errors import ConfigError
from configs.server import ServerSettings
from configs.stores import Store
from deployments.errors import Internal
from deployments.mirror import Mirror, mirrors, private_folder
from deployments.repository import DUPLICATE, Repository

CONFIG = b'platform: "pytorch_libtorch"'


class Bucket:
    """Files of a store, by their path below the repository."""

    def __init__(self, path):
        self.path = path
        self.filesystem = fsspec.filesystem("memory", skip_instance_cache=True)
        self.store = Store(f"s3://{path}", "memory", path, {}, "s3fs")
        self.put("m/config.pbtxt", CONFIG)
        self.put("m/1/model.pt", b"weights")

    def put(self, name, data):
        self.filesystem.pipe_file(f"/{self.path}/{name}", data)

    def remove(self, name):
        self.filesystem.rm(f"/{self.path}/{name}", recursive=True)


@pytest.fixture
def bucket(tmp_path):
    made = Bucket(f"bucket-{tmp_path.name}/models")
    yield made
    if made.filesystem.exists(f"/{made.path}"):
        made.filesystem.rm(f"/{made.path}", recursive=True)


@pytest.fixture
def mirror(bucket, tmp_path):
    folder = tmp_path / "mirror"
    folder.mkdir()
    return Mirror(bucket.store, folder, bucket.filesystem)


def files(mirror):
    found = (path for path in mirror.folder.rglob("*") if path.is_file())
    return {path.relative_to(mirror.folder).as_posix(): path.read_bytes() for path in found}


def test_only_what_is_looked_for_is_fetched(bucket, mirror):
    bucket.put("n/config.pbtxt", CONFIG)
    bucket.put("README.md", b"no model")
    mirror.check()
    assert mirror.names() == ["m", "n"] and files(mirror) == {}
    assert mirror.contains("m") and not mirror.contains("x")
    mirror.fetch("m")
    assert files(mirror) == {"m/config.pbtxt": CONFIG, "m/1/model.pt": b"weights"}


def test_what_is_the_same_is_not_fetched_again(bucket, mirror):
    mirror.fetch("m")
    model = mirror.folder / "m" / "1" / "model.pt"
    before = model.stat().st_ino
    mirror.fetch("m")
    assert model.stat().st_ino == before
    bucket.put("m/1/model.pt", b"WEIGHTS")  # as long as before
    mirror.fetch("m")
    assert model.read_bytes() == b"WEIGHTS"
    model.unlink()  # whoever did that
    mirror.fetch("m")
    assert model.read_bytes() == b"WEIGHTS"


def test_what_is_gone_goes(bucket, mirror):
    bucket.put("m/2/model.pt", b"new")
    mirror.fetch("m")
    (mirror.folder / "m" / "2" / "__pycache__").mkdir()
    (mirror.folder / "m" / "2" / "__pycache__" / "x.pyc").write_bytes(b"")
    bucket.remove("m/2")
    mirror.fetch("m")
    assert set(files(mirror)) == {"m/config.pbtxt", "m/1/model.pt"}
    assert not (mirror.folder / "m" / "2").exists()
    bucket.remove("m")
    mirror.fetch("m")
    assert not (mirror.folder / "m").exists()


def test_a_folder_that_becomes_a_file(bucket, mirror):
    bucket.put("m/1/data/part", b"x")
    mirror.fetch("m")
    bucket.remove("m/1/data")
    bucket.put("m/1/data", b"a file")
    mirror.fetch("m")
    assert (mirror.folder / "m" / "1" / "data").read_bytes() == b"a file"


def test_signatures_follow_the_store_and_fetch_nothing(bucket, mirror):
    seen = [mirror.signature("m")]
    assert mirror.signature("m") == seen[0] and files(mirror) == {}
    for name, data in (("m/1/model.pt", b"WEIGHTS"), ("m/2/model.pt", b""), ("m/labels.txt", b"x")):
        bucket.put(name, data)
        assert mirror.signature("m") not in seen
        seen.append(mirror.signature("m"))


@pytest.mark.parametrize("name", ["m/../../x", "m/1/..", "m/1\\x", "m/./x"])
def test_objects_cannot_lead_out_of_the_model(bucket, mirror, tmp_path, name):
    bucket.filesystem.store[f"/{bucket.path}/{name}"] = bucket.filesystem.store[
        f"/{bucket.path}/m/config.pbtxt"
    ]
    try:
        with pytest.raises(ConfigError, match="must be relative and must not leave"):
            mirror.fetch("m")
    finally:
        del bucket.filesystem.store[f"/{bucket.path}/{name}"]
    assert not (tmp_path / "x").exists()


class Away:
    """A store that cannot be reached, and says where it is."""

    def __getattr__(self, name):
        raise ConnectionError("cannot connect to http://internal.example:9000/secret")


def test_a_store_that_is_away_is_told_without_its_address(bucket, tmp_path):
    mirror = Mirror(bucket.store, tmp_path, Away())
    for call in (mirror.names, lambda: mirror.fetch("m"), lambda: mirror.signature("m")):
        with pytest.raises(Internal, match="^a model repository cannot be read$"):
            call()
    with pytest.raises(ConfigError, match="cannot be read: cannot connect"):
        mirror.check()  # for whoever starts the server


@pytest.mark.skipif(find_spec("adlfs") is not None, reason="it is not missing")
def test_a_package_that_is_missing_is_named(bucket, tmp_path):
    mirror = Mirror(Store("as://a/b", "abfs", "b", {}, "adlfs"), tmp_path)
    with pytest.raises(ConfigError, match=r"needs the package adlfs: pip install .*\[cloud\]"):
        mirror.check()


def test_the_repository_is_like_any_other(bucket, mirror, tmp_path):
    local = tmp_path / "local"
    (local / "l" / "1").mkdir(parents=True)
    repository = Repository([local], mirrors=[mirror])
    repository.check()
    assert repository.names() == {"l": "", "m": ""} and repository.contains("m")
    found = repository.find("m")
    assert found.versions == (1,) and found.path == str(mirror.folder / "m")
    assert repository.version_files(found, 1) == ("model.pt",)
    before = repository.signatures()["m"]
    bucket.put("m/2/model.pt", b"x")
    assert repository.signatures()["m"] != before
    assert repository.find("m").versions == (1, 2)
    (local / "m").mkdir()
    assert repository.find("m").error == DUPLICATE == repository.names()["m"]
    repository.close()
    assert not mirror.folder.exists()


def test_a_folder_of_a_mirror_is_only_ours(bucket, tmp_path):
    folder = private_folder(str(tmp_path), bucket.store, "here")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_folder(str(tmp_path), bucket.store, "here") == folder
    assert private_folder(str(tmp_path), bucket.store, "there") != folder
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="is not only ours"):
        private_folder(str(tmp_path), bucket.store, "here")
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is not only ours"):
        private_folder(str(tmp_path), bucket.store, "here")


def test_one_mirror_for_each_repository_in_a_store(tmp_path):
    urls = ("/local", "s3://b/p", "gs://b/p")
    settings = ServerSettings(model_repository=urls, remote_directory=str(tmp_path))
    made = mirrors(settings, "me")
    assert len({one.folder for one in made}) == 2 == len(list(tmp_path.iterdir()))
