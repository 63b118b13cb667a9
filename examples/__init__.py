"""Example models and a client. `build.py` makes the repository, `client.py` asks a server."""
