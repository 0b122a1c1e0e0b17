"""Checkpoints are read as data: code in them is named and not run, and small files do not expand to gigabytes."""

import pickle
import zipfile

import pytest
import torch
from shared_models import Attack
from test_cli import assert_refused

from bd3lm_hf.hub_upload.safe_pickle import InertObject, plain, read_checkpoint


def with_program(path, program, compression=zipfile.ZIP_STORED):
    """Write a checkpoint whose pickle is `program`."""
    torch.save({}, path.with_suffix(".tmp"))
    with zipfile.ZipFile(path.with_suffix(".tmp")) as old, zipfile.ZipFile(path, "w", compression) as new:
        for entry in old.namelist():
            new.writestr(entry, program if entry.endswith("data.pkl") else old.read(entry))
    return path


@pytest.mark.parametrize("file", ["pytorch_model.bin", "evil.ckpt"])
def test_code_in_a_checkpoint_is_named_and_not_run(bd3lm, tmp_path, file):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text('{"model_type": "bd3lm"}')
    torch.save({"state_dict": {}, "hyper_parameters": Attack(tmp_path / "was-run")}, tmp_path / "source" / file)
    source = tmp_path / "source" / (file if file.endswith(".ckpt") else "")
    assert_refused(bd3lm("convert", source, tmp_path / "target"), "system")
    # The model's own loader refuses it too, without torch's long advice.
    code, _, err = bd3lm("generate", "--model", tmp_path / "source", "--prompt", "A")
    assert code == 2 and err.count("\n") == 1 and len(err) < 600 and str(tmp_path / "source") in err
    assert not (tmp_path / "was-run").exists() and not (tmp_path / "target").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "torch.load", "functools.partial", "os.system"])
def test_functions_that_could_run_something_are_refused(tmp_path, name):
    module, _, function = name.rpartition(".")
    with pytest.raises(ValueError, match=name):
        read_checkpoint(with_program(tmp_path / "file.ckpt", f"c{module}\n{function}\n.".encode()))


def pickled_call(kind, argument):
    """A pickle that calls a type with an argument."""

    class Call:
        def __reduce__(self):
            return kind, (argument,)

    return pickle.dumps({"state_dict": Call()}, protocol=2)


@pytest.mark.parametrize("kind", [bytearray, bytes, list, int])
def test_a_call_that_would_allocate_is_only_recorded(tmp_path, kind):
    argument = 10**13 if kind in (bytearray, bytes) else "1" * 1000
    found = read_checkpoint(with_program(tmp_path / "file.ckpt", pickled_call(kind, argument)))["state_dict"]
    assert isinstance(found, InertObject) and found.arguments == (argument,)


def test_a_tensor_larger_than_its_data_is_refused(tmp_path):
    torch.save({"x": torch.zeros(1).expand(10**12)}, tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match="larger than its data"):
        read_checkpoint(tmp_path / "file.ckpt")
    # Slices and transposed views are ordinary.
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"part": whole[1:], "turned": whole.T}, tmp_path / "views.ckpt")
    assert torch.equal(read_checkpoint(tmp_path / "views.ckpt")["turned"], whole.T)


def test_a_compressed_archive_is_refused_by_its_directory(tmp_path):
    bomb = b"\x80\x02X" + (10**8).to_bytes(4, "little") + b"a" * 10**8 + b"."
    path = with_program(tmp_path / "file.ckpt", bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**6
    with pytest.raises(ValueError, match="100,0"):
        read_checkpoint(path)


def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.ckpt")
    with pytest.raises(ValueError, match="TorchScript"):
        read_checkpoint(tmp_path / "script.ckpt")


@pytest.mark.parametrize(
    "program", [b"", b"(", b"\x80\x02}q\x00.", b"P1\n.", b"\x80\x02]q\x00h\x00a."], ids=lambda program: repr(program)
)
def test_other_files_are_refused(bd3lm, tmp_path, program):
    (tmp_path / "text.ckpt").write_bytes(program)
    for path in (tmp_path / "text.ckpt", with_program(tmp_path / "file.ckpt", program)):
        assert_refused(bd3lm("convert", path, tmp_path / "target"), path.name)


def test_records_become_plain_values_unless_they_are_cyclic_or_explode():
    node, record = InertObject(), InertObject()
    node.state, record.state = {"_val": 1}, ({"_content": {"a": node, "b": [1, "x"]}}, {"slot": None})
    assert plain({"config": record}) == {"config": {"a": 1, "b": [1, "x"]}}
    cyclic: list = []
    cyclic.append(cyclic)
    laughs: list = ["ha"]
    for _ in range(40):
        laughs = [laughs, laughs]
    for hostile in (cyclic, laughs):
        with pytest.raises(ValueError, match="hyper-parameters"):
            plain(hostile)
