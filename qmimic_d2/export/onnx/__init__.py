"""ONNX: files of standard operators in float and int8, and the detector that runs them without torch."""
