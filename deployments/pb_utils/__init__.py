"""What a TritonPythonModel imports as `triton_python_backend_utils`, one file per kind of thing.

Owns the API that Triton's Python backend documents; `surface` puts it together for one replica and
makes it importable there. Runs nothing: the model is `runtimes/python_model.py`, calls of other
models go out through `calls`.
"""
