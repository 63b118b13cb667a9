"""What the source in an AOTI package tells."""

from __future__ import annotations

import zipfile

from deployments.runtimes import package
from deployments.runtimes.leaves import Size, batch, most_rows

# The forms that the compiler writes, without the rest.
SOURCE = """
AOTI_NOINLINE static void check_input_0(
    AtenTensorHandle* input_handles
) {
    int32_t x_expected_dtype = aoti_torch_dtype_bfloat16();
    auto x_size = x.sizes();
    if (x_size[0] < 2) {
    }
    if (x_size[0] > 16) {
    }
    if (4L != x_size[2]) {
    }
    if (4 != x_stride[1]) {
    }
    if (1 != x_stride[2]) {
    }
}
AOTI_NOINLINE static void check_input_1(
    AtenTensorHandle* input_handles
) {
    int32_t y_expected_dtype = aoti_torch_dtype_int64();
    auto y_size = y.sizes();
}
    in_spec_ = R"([1, "a (b)"])";
    out_spec_ = R"([1, null])";
    if (checks()) { assert_size_stride(y, {s0, s1}, {s1, 1L}, "input"); }
"""


def write(tmp_path, source, name="data/aotinductor/model/c.wrapper.cpp"):
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"model/{name}", source)
    return path


def test_what_it_tells(tmp_path):
    found = package.read(write(tmp_path, SOURCE))
    x, y = found.inputs[0], found.inputs[1]
    assert (x.torch_type, y.torch_type) == ("bfloat16", "int64")
    assert [size.shape for size in x.sizes or ()] == [-1, -1, 4]
    assert [(s.low, s.high) for s in x.sizes or ()] == [(2, 16), (0, None), (4, 4)]
    assert [size.shape for size in y.sizes or ()] == [-1, -1]  # nothing bounds them
    assert found.specs == ('[1, "a (b)"]', "[1, null]")


def test_a_package_that_tells_nothing(tmp_path):
    for source, name in (("", "data/aotinductor/model/c.wrapper.cpp"), (SOURCE, "extra/c.cpp")):
        assert package.read(write(tmp_path, source, name)) == package.Package({})


def test_a_real_one(seed_package):
    found = package.read(seed_package)
    assert len(found.inputs) == 6 and len(found.specs) == 2
    rows = batch(found.inputs.values())
    assert rows is not None and most_rows(rows) == 8


def test_sizes():
    assert Size(2, 9, "s0").misfit(1) == ""  # torch.export's own 2 means nothing
    assert Size(3, 9, "s0").misfit(2) == "expected it to be >= 3, but got: 2"
    assert Size(3, 9, "s0").misfit(10) == "expected to be <= 9, but got: 10"
    assert Size(4, 4).misfit(5) == "expected: 4, but got: 5"
    assert Size(0, None, "s0").misfit(0) == "expected it to be >= 1, but got: 0"
