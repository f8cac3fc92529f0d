"""A model of Triton's Python backend run outside Triton, with the classes that Triton gives it.

https://github.com/triton-inference-server/python_backend describes ``triton_python_backend_utils``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from google.protobuf import json_format, text_format
from numpy.typing import NDArray
from tritonclient.grpc.model_config_pb2 import ModelConfig

from vpr.common.errors import UserError


class _Tensor:
    def __init__(self, name: str, values: NDArray[Any]) -> None:
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._values


class _Error:
    def __init__(self, message: str) -> None:
        self._message = message

    def message(self) -> str:
        return self._message


def _find_tensor(request: Any, name: str) -> _Tensor:
    return next(tensor for tensor in request.inputs if tensor.name() == name)


def _utilities() -> ModuleType:
    module = ModuleType("triton_python_backend_utils")
    values = {"Tensor": _Tensor, "TritonError": _Error, "get_input_tensor_by_name": _find_tensor}
    values["InferenceResponse"] = lambda output_tensors=(), error=None: SimpleNamespace(
        output_tensors=list(output_tensors), error=error
    )
    for name, value in values.items():
        setattr(module, name, value)
    return module


class PythonModel:
    """Model of a repository's folder with ``config.pbtxt`` and ``1/model.py``."""

    def __init__(self, folder: Path) -> None:
        self.config = text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig())
        spec = importlib.util.spec_from_file_location("triton_model", folder / "1" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["triton_python_backend_utils"] = _utilities()
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules["triton_python_backend_utils"]
        self.model: Any = module.TritonPythonModel()
        values = json_format.MessageToDict(self.config, preserving_proto_field_name=True)
        self.model.initialize({"model_config": json.dumps(values)})

    def infer(self, files: Sequence[bytes]) -> NDArray[Any]:
        """Return the output for image files, one in each row of the batch; :class:`UserError` for an error response."""
        inputs = [_Tensor(self.config.input[0].name, np.array([[data] for data in files], dtype=object))]
        (response,) = self.model.execute([SimpleNamespace(inputs=inputs)])
        if response.error is not None:
            raise UserError(response.error.message())
        (output,) = response.output_tensors
        assert output.name() == self.config.output[0].name
        return output.as_numpy()
