"""The model repository for Triton: read by protobuf itself, held against the files, and called as Triton would."""

import sys

import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

import idlefx
from examples import triton_repository
from idlefx.deploy.inductor import open_artifact
from tests.models.small import Wrapper, build, images

onnxruntime = pytest.importorskip("onnxruntime")

# The fields that are used, as github.com/triton-inference-server/common has them in protobuf/model_config.proto.
TYPES = {
    "BOOL": 1, "UINT8": 2, "INT8": 6, "INT16": 7, "INT32": 8, "INT64": 9,
    "FP16": 10, "FP32": 11, "FP64": 12, "BF16": 14,
}  # fmt: skip
KINDS = {"AUTO": 0, "GPU": 1, "CPU": 2, "MODEL": 3}
FIELDS = {
    "Shape": "shape:1:int64*",
    "Input": "name:1:string data_type:2:DataType dims:4:int64* reshape:5:Shape",
    "Output": "name:1:string data_type:2:DataType dims:3:int64* label_filename:4:string reshape:5:Shape",
    "Group": "kind:4:Kind",
    "Batching": "preferred_batch_size:1:int32* max_queue_delay_microseconds:2:uint64",
    "Config": "name:1:string platform:2:string max_batch_size:4:int32 input:5:Input* output:6:Output* "
    "instance_group:7:Group* dynamic_batching:11:Batching",
}
CLASSES = [f"class {index}" for index in range(10)]


def schema():
    """The class of a config: Triton's own where its client is installed, else made of the fields above."""
    try:
        from tritonclient.grpc.model_config_pb2 import ModelConfig

        return ModelConfig
    except ImportError:
        pass
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="inference", syntax="proto3")
    for name, prefix, values in (("DataType", "TYPE_", {"INVALID": 0, **TYPES}), ("Kind", "KIND_", KINDS)):
        enum = file.enum_type.add(name=name)
        for value, number in values.items():
            enum.value.add(name=prefix + value, number=number)
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, of in (entry.split(":") for entry in fields.split()):
            made = message.field.add(name=field, number=int(number))
            made.label = kinds.LABEL_REPEATED if of.endswith("*") else kinds.LABEL_OPTIONAL
            of = of.rstrip("*")
            if of in FIELDS or of in ("DataType", "Kind"):
                made.type = kinds.TYPE_MESSAGE if of in FIELDS else kinds.TYPE_ENUM
                made.type_name = f".inference.{of}"
            else:
                made.type = getattr(kinds, f"TYPE_{of.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.Config"))


def parsed(folder):
    return text_format.Parse((folder / "config.pbtxt").read_text(), schema()())


def shapes(config, tensors):
    """Shapes as a request has them, -1 where they are free."""
    return {
        t.name: ([-1] if config.max_batch_size else []) + ([] if t.HasField("reshape") else list(t.dims))
        for t in tensors
    }


def check_against_session(config, session):
    """Names, types and shapes are those of the file."""
    number = {"tensor(float)": 11, "tensor(float16)": 10, "tensor(int64)": 9, "tensor(uint8)": 2}
    for told, found in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert {t.name: t.data_type for t in told} == {t.name: number[t.type] for t in found}
        assert shapes(config, told) == {t.name: [-1 if isinstance(s, str) else s for s in t.shape] for t in found}


@pytest.mark.slow
@torch.no_grad()
def test_onnx_repository_is_what_triton_reads_and_the_file_says(tmp_path, monkeypatch, capsys):
    model = build("vit", depth=2)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": CLASSES}
    idle = idlefx.convert(model, [1], 0.5)
    artifact = idlefx.package(idle, tmp_path / "vit.onnx", batch=(1, 6))
    arguments = [str(artifact), str(tmp_path / "repository"), "--name", 'a "vit"', "--delay", "200"]
    monkeypatch.setattr(sys, "argv", ["triton_repository", *arguments])
    triton_repository.main()
    folder = tmp_path / "repository" / 'a "vit"'
    assert capsys.readouterr().out == f"{folder}\n"
    config = parsed(folder)
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
    assert (config.name, config.platform, config.max_batch_size) == (folder.name, "onnxruntime_onnx", 6)
    assert config.HasField("dynamic_batching") and config.dynamic_batching.max_queue_delay_microseconds == 200
    check_against_session(config, session)
    (output,) = config.output
    assert (folder / output.label_filename).read_text().splitlines() == CLASSES

    x = images(model, config.max_batch_size)  # as Triton would join requests
    (found,) = session.run([output.name], {config.input[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), idle(x), atol=1e-4)
    with pytest.raises(idlefx.InputError, match=r"is there already"):
        triton_repository.main()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(1, 5), (2, 5), (3, 3)])
def test_only_a_batch_that_triton_can_make_up_is_joined(batch, tmp_path):
    model = Wrapper(build("vit", depth=2)).eval()
    x = (images(model.net, 3), torch.ones(3, 1, 1, 1))
    artifact = idlefx.package(idlefx.convert(model, [1], 0.5, example_inputs=x), tmp_path / "m.onnx", batch=batch)
    folder = triton_repository.write_repository(artifact, tmp_path / "repository", "m")
    config = parsed(folder)
    assert config.max_batch_size == (5 if batch == (1, 5) else 0)
    assert config.HasField("dynamic_batching") == (batch == (1, 5))
    check_against_session(config, onnxruntime.InferenceSession(artifact))
    places = next(output for output in config.output if output.name == "pair.0")
    assert places.HasField("reshape") == (batch == (1, 5)), "one number for each image, and dims may not be empty"
    assert not (folder / "labels.txt").exists()


@pytest.mark.slow
def test_compiled_files_are_called_by_the_places_of_their_tensors(tmp_path):
    model = build("vit", depth=2)
    artifact = idlefx.package(idlefx.convert(model, [1], 0.5), tmp_path / "vit.pt2", batch=(1, 6))
    config = parsed(triton_repository.write_repository(artifact, tmp_path / "repository", "vit"))
    assert (config.platform, config.max_batch_size) == ("torch_aoti", 0)
    assert shapes(config, config.input) == {"INPUT__0": [-1, 3, 48, 48]}
    assert shapes(config, config.output) == {"OUTPUT__0": [-1, 10]}
    assert [group.kind for group in config.instance_group] == [KINDS["CPU"]]
    x = images(model, 3)
    assert len(open_artifact(artifact)([x])) == len(config.output)


def test_what_is_no_artifact_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    with pytest.raises(idlefx.InputError, match=r"was not made by idlefx.package"):
        triton_repository.write_repository(tmp_path / "m.onnx", tmp_path / "repository", "m")
    assert not (tmp_path / "repository").exists()
