"""Backend `onnxruntime`: the default without a GPU. Its artefact is the exported ONNX itself."""
