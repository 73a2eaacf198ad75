"""What one does with a trained model.

`pictures` turns files into aligned crops; `verify`, `embed` and `model` (the same as methods of a model) stand on it.
`graph` writes and checks ONNX, `insightface` knows what that client demands, `card` writes model cards, and `export`
puts the files together.
"""
