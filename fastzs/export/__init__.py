"""Models as graphs that run without this package: torch.export programs, ONNX and OpenVINO."""
