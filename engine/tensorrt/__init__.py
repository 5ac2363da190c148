"""Backend `tensorrt`: one code path for TensorRT and TensorRT-RTX, from ONNX files to engines and their sessions."""
