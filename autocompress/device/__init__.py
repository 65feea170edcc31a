"""What runs beside the runtime: core, numpy, psutil and one runtime; no torch, no Optuna, no onnx."""
