"""int8 in ONNX files: products with weights, quantised as onnxruntime does it, without data to calibrate on."""

import logging
from pathlib import Path
from typing import Any

from idlefx.errors import ArtifactError, InputError, first_line


def quantise(path: Path, target: Path) -> list[str]:
    """Write a file whose products of tokens with weights are in int8, which onnxruntime runs on the CPU.

    A weight has a scale for each of its columns; what it is multiplied with has one for the whole tensor, found anew at
    each call (`onnxruntime.quantization.quantize_dynamic`). All else stays float32: the convolution that makes tokens,
    which is slower in int8; the products of attention, which hold no weight; what scores tokens, by which they are
    chosen; and heads, which see one token of an image.

    Args:
        path: A file that `write_onnx` has written.
        target: The file to write; it may be the same.

    Returns:
        The names of the nodes that were quantised.

    Raises:
        InputError: The disk is full.
        ArtifactError: There is nothing to quantise, or onnxruntime fails at it.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    turn_weights(model.graph)
    names = products_with_weights(model.graph)
    if not names:
        raise ArtifactError(
            "package: int8 finds no product of tokens with a float32 weight to quantise; leave it out, or convert and "
            "package the model in float32"
        )
    log = logging.getLogger()
    before = log.level
    log.setLevel(logging.ERROR)  # it recommends a preparation that fuses nodes for one runtime
    try:
        quantize_dynamic(model, target, ["MatMul"], True, weight_type=QuantType.QInt8, nodes_to_quantize=names)
    except OSError as error:
        raise InputError(f"package: cannot write into {target.parent}: {error.strerror}; make room there") from error
    except Exception as error:  # it raises many kinds
        raise ArtifactError(f"package: onnxruntime cannot quantise the model: {first_line(error)}") from error
    finally:
        log.setLevel(before)
    return names


def turn_weights(graph: Any) -> None:
    """Put weights in the place of their transposes, which are left to the runtime where a large one is used twice."""
    import onnx

    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        turned = onnx.numpy_helper.to_array(weights[node.input[0]]).T  # of two dimensions, there is one way
        graph.initializer.append(onnx.numpy_helper.from_array(turned.copy(), node.output[0]))
        graph.node.remove(node)


def products_with_weights(graph: Any) -> list[str]:
    """The names of the nodes of an ONNX graph that multiply what follows the inputs with a float32 weight."""
    import onnx

    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    varying, found = {given.name for given in graph.input}, []
    for node in graph.node:  # each behind those that it reads
        if not varying.isdisjoint(node.input):
            varying.update(node.output)
            if node.op_type == "MatMul" and node.input[1] in weights:
                found.append(node.name)
    return found
