"""The workshop: a trained checkpoint becomes GGUF or ONNX. The runtime never needs it."""

EDGELM_CONVERTERS = True  # the command line looks for this mark: another package of the same name exists
