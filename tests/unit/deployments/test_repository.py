"""Model repositories on disk: models, versions, files, paths that must not escape."""

from __future__ import annotations

import logging
import zipfile
from dataclasses import replace

import pytest

from configs.errors import ConfigError
from configs.model import InstanceGroup, ModelConfig, ModelOutput, VersionPolicy
from deployments.errors import Internal, InvalidArgument, Unavailable
from deployments.repository import DUPLICATE, Repository

CONFIG = """platform: "pytorch_libtorch"
input { name: "a" data_type: TYPE_FP32 dims: 4 }
output { name: "b" data_type: TYPE_FP32 dims: 4 label_filename: "labels.txt" }
"""


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def model(root):
    return _model(root, "m", 1)


def _model(root, name, *versions, config=CONFIG):
    folder = root / name
    folder.mkdir()
    (folder / "config.pbtxt").write_text(config)
    (folder / "labels.txt").write_text("cat\ndog\n")
    for version in versions:
        (folder / str(version)).mkdir()
        (folder / str(version) / "model.pt").write_bytes(b"weights")
    return folder


def test_scan_lists_models_and_versions(root, caplog):
    _model(root, "b", 2, 10, 1)
    _model(root, "a")
    for name in ("01", "0", "latest", "configs", "9" * 30):
        (root / "a" / name).mkdir()
    (root / "a" / "7").write_text("a file")
    (root / ".git").mkdir()
    (root / "README.md").write_text("")
    with caplog.at_level(logging.WARNING, "manta.repository"):
        a, b = Repository([root]).scan()
    assert (a.name, a.versions, a.error) == ("a", (), "")
    assert (b.name, b.versions, b.path) == ("b", (1, 2, 10), str(root / "b"))
    assert sorted(r.args[1] for r in caplog.records) == ["0", "01", "9" * 30, "latest"]


def test_the_same_model_in_two_repositories(root, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    _model(root, "m", 1)
    _model(other, "m", 1)
    _model(other, "n", 1)
    m, n = Repository([root, other]).scan()
    assert m.error == DUPLICATE == "model appears in two or more repositories"
    assert m.versions == ()
    assert n.error == "" and Repository([root, other]).find("n") == n


def test_find(root, model):
    repository = Repository([root])
    assert repository.find("m").versions == (1,)
    assert repository.contains("m") and not repository.contains("x")
    with pytest.raises(
        Internal, match="^failed to load 'x', failed to poll from model repository$"
    ):
        repository.find("x")
    with pytest.raises(InvalidArgument):
        repository.find("../models/m")


def test_a_repository_that_is_not_there(tmp_path):
    repository = Repository([tmp_path / "gone"])
    with pytest.raises(ConfigError, match="gone' is not a directory"):
        repository.check()
    with pytest.raises(Internal) as caught:
        repository.scan()
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (None, (4,)),
        (VersionPolicy(latest=2), (3, 4)),
        (VersionPolicy(latest=9), (1, 3, 4)),
        (VersionPolicy(all=True), (1, 3, 4)),
        (VersionPolicy(specific=(3, 1)), (1, 3)),
    ],
)
def test_version_policy(policy, expected):
    config = ModelConfig(name="m", version_policy=policy)
    assert Repository([]).select_versions(config, (1, 3, 4)) == (expected, {})


def test_versions_that_are_not_there():
    select = Repository([]).select_versions
    policy = VersionPolicy(specific=(1, 7))
    assert select(ModelConfig(name="m", version_policy=policy), (1,)) == (
        (1,),
        {7: "unable to find 'm/7' for model 'm' version 7"},
    )
    for given in (None, VersionPolicy(all=True)):
        with pytest.raises(ConfigError, match="at least one version must be available .* 'm'"):
            select(ModelConfig(name="m", version_policy=given), ())


def test_reads_the_configuration(root, model):
    repository = Repository([root])
    found = repository.find("m")
    assert repository.read_config(found).name == "m"
    (model / "config.pbtxt").write_text(CONFIG.replace("TYPE_FP32", "TYPE_FP33", 1))
    with pytest.raises(ConfigError, match=r"^m/config.pbtxt:2: input\[0\].data_type: "):
        repository.read_config(found)
    (model / "config.pbtxt").write_bytes(b"name: 'm'\n\xff")
    with pytest.raises(ConfigError, match="^m/config.pbtxt:2: the file is not UTF-8 text"):
        repository.read_config(found)
    (model / "config.pbtxt").write_bytes(b"#" * (5 << 20))
    with pytest.raises(ConfigError, match="^m/config.pbtxt: the file is larger than"):
        repository.read_config(found)


def test_what_a_model_may_complete_is_missing_only_where_it_must_be_there(root, model):
    (model / "config.pbtxt").write_text("input { name: 'x' }")
    repository = Repository([root])
    found = repository.find("m")
    partial = repository.read_config(found, partial=True)
    assert partial.open_batch and partial.input[0].data_type == "TYPE_INVALID"
    with pytest.raises(
        ConfigError, match="m/config.pbtxt: output: .* must contain at least one output"
    ):
        repository.read_config(found)  # as with --disable-auto-complete-config
    (model / "config.pbtxt").write_text("max_batch_size: 0 version_policy { all { } }")
    assert not repository.read_config(found, partial=True).open_batch
    assert repository.config_errors(found, partial=True) == []


def test_what_a_pt2_is_is_told_by_what_it_holds(root, model):
    (model / "config.pbtxt").unlink()
    (model / "1" / "model.pt").unlink()
    repository = Repository([root])
    for inside, platform in (
        ("models/model.json", "torch_export"),
        ("data/aotinductor/model/a.so", "torch_aoti"),
    ):
        with zipfile.ZipFile(model / "1" / "model.pt2", "w") as archive:
            archive.writestr(f"model/{inside}", "{}")
        found = repository.find("m")
        config = repository.read_config(found, partial=True)
        made = repository.version_config(found, 1, config, has_gpu=False, partial=True)
        assert (made.platform, made.default_model_filename) == (platform, "model.pt2")
        stated = config.model_copy(update={"platform": "torch_aoti"})
        made = repository.version_config(found, 1, stated, has_gpu=False, partial=True)
        assert made.platform == "torch_aoti"  # somebody has said so; loading it will tell


def test_a_missing_configuration_says_what_is_there_and_what_is_missing(root, model):
    (model / "config.pbtxt").unlink()
    repository = Repository([root])
    with pytest.raises(ConfigError) as caught:
        repository.read_config(repository.find("m"))
    assert str(caught.value) == (
        "m/config.pbtxt: the file is missing: version 1 has model.pt; "
        "model configuration must contain at least one input, none were specified"
    )


def test_later_errors_are_told_their_line(root, model):
    repository = Repository([root])
    error = repository.explain(repository.find("m"), ConfigError("no", field="output[0].dims"))
    assert str(error) == "m/config.pbtxt:3: output[0].dims: no"


def test_files_and_artifact(root, model):
    repository = Repository([root])
    found = repository.find("m")
    config = repository.read_config(found)
    (model / "1" / "model.py").mkdir()
    assert repository.version_files(found, 1) == ("model.pt",)
    assert repository.artifact(found, 1, config) == model / "1" / "model.pt"
    with pytest.raises(Unavailable, match="^unable to find 'm/9' for model 'm' version 9$"):
        repository.version_files(found, 9)
    missing = config.model_copy(update={"default_model_filename": "net.pt"})
    with pytest.raises(Unavailable) as caught:
        repository.artifact(found, 1, missing)
    assert str(caught.value) == "unable to find 'm/1/net.pt' for model 'm' version 1"


def test_files_of_compute_capabilities(root, model):
    repository = Repository([root])
    found = repository.find("m")
    read = repository.read_config(found)
    config = read.model_copy(update={"cc_model_filenames": {"9.0": "h.pt", "8.6": "sub/a.pt"}})
    (model / "1" / "sub").mkdir()
    (model / "1" / "sub" / "a.pt").write_bytes(b"weights")
    assert repository.artifact(found, 1, config, "8.6") == model / "1" / "sub" / "a.pt"
    assert repository.artifact(found, 1, config, "8.9") == model / "1" / "model.pt"
    with pytest.raises(Unavailable, match="^unable to find 'm/1/h.pt' for model 'm' version 1$"):
        repository.artifact(found, 1, config, "9.0")
    # Only an instance on a GPU knows what it needs; what none could load is refused at once.
    (model / "1" / "model.pt").unlink()
    gpu, host = (
        config.model_copy(update={"instance_group": (InstanceGroup(kind=kind),)})
        for kind in ("KIND_GPU", "KIND_CPU")
    )
    repository.check_artifacts(found, 1, gpu)
    with pytest.raises(Unavailable, match="unable to find 'm/1/model.pt' for"):
        repository.check_artifacts(found, 1, host)
    (model / "1" / "sub" / "a.pt").unlink()
    with pytest.raises(Unavailable, match="find 'm/1/model.pt' or 'm/1/h.pt' or 'm/1/sub/a.pt'"):
        repository.check_artifacts(found, 1, gpu)


def test_sniffing_looks_at_the_first_version_by_name(root):
    folder = _model(root, "m", 2, 10)
    (folder / "10" / "model.pt2").write_text("")
    repository = Repository([root])
    assert repository.first_files(repository.find("m")) == ("model.pt", "model.pt2")


def test_labels(root, model):
    repository = Repository([root])
    found = repository.find("m")
    config = repository.read_config(found)
    assert repository.labels(found, config) == {"b": ("cat", "dog")}
    # A line ends where an editor ends it, and an empty one counts.
    (model / "labels.txt").write_bytes("a\u2028b\r\n\n\x0cc".encode())
    assert repository.labels(found, config) == {"b": ("a\u2028b", "", "\x0cc")}
    (model / "labels.txt").unlink()
    with pytest.raises(ConfigError) as caught:
        repository.labels(found, config)
    assert "output[0].label_filename: unable to find 'm/labels.txt'" in str(caught.value)
    outside = root.parent / "labels.txt"
    outside.write_text("secret")
    (model / "labels.txt").symlink_to(outside)
    with pytest.raises(ConfigError, match="leads out of the model repository"):
        repository.labels(found, config)


WARMUP = (
    CONFIG
    + """
model_warmup {
  batch_size: 1
  inputs { key: "a" value { data_type: TYPE_FP32 dims: 4 input_data_file: "raw/a" } }
}
"""
)


def test_warmup_files(root):
    model = _model(root, "m", 1, config=WARMUP)
    repository = Repository([root])
    found = repository.find("m")
    config = repository.read_config(found)

    def reason() -> str:
        with pytest.raises(ConfigError) as caught:
            repository.warmup_files(found, config)
        return str(caught.value)

    field = 'm/config.pbtxt: model_warmup[0].inputs["a"].input_data_file: '
    assert reason() == field + "unable to find 'm/warmup/raw/a'"
    (model / "warmup" / "raw").mkdir(parents=True)
    file = model / "warmup" / "raw" / "a"
    file.write_bytes(bytes(15))
    assert reason() == field + (
        "warmup setting expects 16 bytes for input 'a', but the data provided from raw/a only has "
        "15 bytes"
    )
    file.write_bytes(bytes(16))
    assert repository.warmup_files(found, config) == {"warmup/raw/a": file}
    before = repository.content_hash(found, 1, config)
    file.write_bytes(b"other data of 16")
    assert repository.content_hash(found, 1, config) != before
    file.unlink()
    file.symlink_to("/etc/hostname")
    assert "'m/warmup/raw/a' leads out of the model repository" in reason()


def test_content_hash_follows_what_is_served(root, model):
    repository = Repository([root])
    found = repository.find("m")
    config = repository.read_config(found)
    seen = {repository.content_hash(found, 1, config, with_config=True)}
    (model / "1" / "__pycache__").mkdir()
    (model / "1" / "__pycache__" / "model.pyc").write_text("x")
    (model / "2").mkdir()
    assert repository.content_hash(found, 1, config, with_config=True) in seen
    for file in ("1/model.pt", "labels.txt", "config.pbtxt", "1/extra"):
        (model / file).write_text(file)
        seen.add(repository.content_hash(found, 1, config, with_config=True))
    (model / "1" / "sub").mkdir()
    (model / "1" / "extra").rename(model / "1" / "sub" / "extra")
    seen.add(repository.content_hash(found, 1, config, with_config=True))
    assert len(seen) == 6


def test_content_hash_follows_files_of_compute_capabilities(root, model):
    """Also behind a link to a directory, where nothing else is looked at."""
    repository = Repository([root])
    found = repository.find("m")
    config = repository.read_config(found)
    config = config.model_copy(update={"cc_model_filenames": {"9.0": "far/h.pt"}})
    (root / ".far").mkdir()
    (model / "1" / "far").symlink_to("../../.far")
    before = repository.content_hash(found, 1, config)
    (root / ".far" / "other.pt").write_bytes(b"x")
    assert repository.content_hash(found, 1, config) == before
    (root / ".far" / "h.pt").write_bytes(b"x")
    assert repository.content_hash(found, 1, config) != before
    outside = config.model_copy(update={"cc_model_filenames": {"9.0": "../../../x"}})
    with pytest.raises(ConfigError, match="leads out of the model repository"):
        repository.content_hash(found, 1, outside)


def test_links_inside_the_repository_are_followed(root, model):
    (root / ".data").mkdir()
    (model / "1" / "model.pt").rename(root / ".data" / "blob")
    (model / "1" / "model.pt").symlink_to("../../.data/blob")
    repository = Repository([root])
    (found,) = repository.scan()
    config = repository.read_config(found)
    artifact = repository.artifact(found, 1, config)
    assert artifact == model / "1" / "model.pt"
    assert artifact.read_bytes() == b"weights"


def test_links_out_of_the_repository_are_refused(root, model, tmp_path):
    outside = tmp_path / "outside"
    (outside / "1").mkdir(parents=True)
    (outside / "secret").write_text("secret")
    repository = Repository([root])
    found = repository.find("m")
    config = repository.read_config(found)

    (model / "labels.txt").unlink()
    (model / "labels.txt").symlink_to(outside / "secret")
    (model / "1" / "model.pt").unlink()
    (model / "1" / "model.pt").symlink_to(outside / "secret")
    (model / "3").symlink_to(outside / "1")
    (root / "linked").symlink_to(outside)
    attempts = [
        lambda: repository.labels(found, config),
        lambda: repository.artifact(found, 1, config),
        lambda: repository.content_hash(found, 1, config),
        lambda: repository.version_files(found, 3),
        lambda: repository.labels(
            found, ModelConfig(output=(ModelOutput(name="b", label_filename="../../x"),))
        ),
    ]
    for attempt in attempts:
        with pytest.raises(ConfigError, match=r"^'m/.*' leads out of the model repository$"):
            attempt()
    assert repository.find("linked").error == "'linked' leads out of the model repository"


def test_what_optimize_is_making_is_no_model(tmp_path):
    for name in (".optimizing.abc", ".hidden", "m"):
        (tmp_path / name / "1").mkdir(parents=True)
    found = {one.name for one in Repository((str(tmp_path),)).scan()}
    assert ".optimizing.abc" not in found and "m" in found
    assert ".hidden" in found  # the control: another hidden folder that looks like a model


def test_a_link_that_leads_nowhere_and_one_in_a_circle(root, model):
    """Neither keeps the model from being looked at."""
    (model / "1" / "nowhere").symlink_to("gone")
    (model / "1" / "circle").symlink_to("..")
    before = Repository([root]).signatures()
    assert before == Repository([root]).signatures() and list(before) == ["m"]


def test_names_are_those_on_disk_now(root, model, tmp_path):
    other = tmp_path / "other"
    repository = Repository([root, other, root])  # the same one twice is one
    other.mkdir()
    assert repository.names() == {"m": ""}
    _model(other, "m", 1)
    _model(other, "a", 1)
    assert repository.names() == {"a": "", "m": DUPLICATE}
    assert [len(one) for one in repository.signatures().values()] == [1, 2]


def test_a_configuration_of_another_name(root, model):
    text = CONFIG.replace("TYPE_FP32", "TYPE_FP16")
    (model / "configs").mkdir()
    (model / "configs" / "half.pbtxt").write_text(text)

    def datatype(name):
        repository = Repository([root], name)
        return repository.read_config(repository.find("m")).input[0].data_type

    assert [datatype(name) for name in ("", "half", "other")] == [
        "TYPE_FP32",
        "TYPE_FP16",
        "TYPE_FP32",  # not there: config.pbtxt
    ]
    (model / "configs" / "half.pbtxt").write_text(text + "max_batch_size: -1")
    with pytest.raises(ConfigError, match=r"^m/configs/half.pbtxt:4: max_batch_size: "):
        datatype("half")
    (model / "labels.txt").unlink()
    repository = Repository([root], "half")
    found = repository.find("m")
    config = Repository([root]).read_config(found)
    with pytest.raises(ConfigError, match="^m/configs/half.pbtxt: output"):
        repository.labels(found, config)


def test_a_configuration_that_was_given_stands_in_for_the_file(root, model):
    repository = Repository([root])
    found = replace(repository.find("m"), given='{"max_batch_size": 3}')
    assert repository.read_config(found, partial=True).max_batch_size == 3
    with pytest.raises(ConfigError, match="^config: input: model configuration must contain"):
        repository.read_config(found)
    error = repository.explain(found, ConfigError("no", field="output[0].dims"))
    assert str(error) == "config: output[0].dims: no"
