"""Programs that measure. `bench.py` compares the server with a bare one; none of this is a test."""
