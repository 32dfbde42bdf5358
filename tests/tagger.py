"""A WD14 tagger of a few tags, which looks at a picture's mean colour alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Name and category, and what the probability follows from: weights of the mean red, green, blue; bias.
TAGS: Sequence[tuple[str, int, tuple[float, float, float], float]] = (
    ("sensitive", 9, (0, 0, 0), 9),
    ("red_square", 0, (0.3, -0.15, -0.15), -4.5),
    ("green_square", 0, (-0.15, 0.3, -0.15), -4.5),
    ("blue_square", 0, (-0.15, -0.15, 0.3), -4.5),
    ("bright", 0, (0.05, 0.05, 0.05), -15),  # from a mean of 100 on
    ("^_^", 0, (0, 0, 0), -0.4),  # 0.40, whatever the picture
    ("azure_(hero)", 4, (-0.15, -0.15, 0.3), -4.5),
)


def write_tagger(
    folder: Path,
    *,
    tags: Sequence[tuple[str, int, tuple[float, float, float], float]] = TAGS,
    shape: Sequence[int | str] = ("n", 32, 32, 3),
    sigmoid: bool = True,
) -> Path:
    """model.onnx and selected_tags.csv, as SmilingWolf's are: pictures (n, side, side, 3), BGR, 0 to 255."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{number},{name},{category},1" for number, (name, category, *_) in enumerate(tags)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows, ""]))
    weights = np.array([of[::-1] for _, _, of, _ in tags], np.float32).T
    bias = np.array([of for *_, of in tags], np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["sums"]),
        helper.make_node("Add", ["sums", "bias"], ["logits"]),
        helper.make_node("Sigmoid" if sigmoid else "Identity", ["logits"], ["tags"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("tags", TensorProto.FLOAT, [shape[0], len(tags)])],
        [
            numpy_helper.from_array(np.array([1, 2] if shape[-1] == 3 else [2, 3], np.int64), "axes"),
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(bias, "bias"),
        ],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), str(folder / "model.onnx"))
    return folder
