"""NVIDIA's Triton Inference Server with its Python backend, out of the wheel of nvidia-pytriton.

The wheel has no libtorch backend: model.py calls torch. The backend's stub is the one for our
Python version; the server finds it beside the backend's library.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

from benchmarks.contestants import Stage
from benchmarks.peers.base import PROGRAMS, Peer
from benchmarks.servers import Launch, ServerError, free_ports

STUB = "triton_python_backend_stub"


class Triton(Peer):
    name = "triton"
    packages = ("nvidia-pytriton==0.7.0", "numpy<2")
    protocols = ("http", "grpc")
    has_statistics = True

    def launch(self, stage: Stage, folder: Path) -> Launch:
        home = self._home(folder)
        model = folder / "repository" / stage.model.name
        (model / "1").mkdir(parents=True)
        (model / "config.pbtxt").write_text(
            'backend: "python"\n' + stage.model.config(stage.delay_us)
        )
        shutil.copy(PROGRAMS / "triton_model.py", model / "1" / "model.py")
        http_port, grpc_port, metrics_port = free_ports(3)
        command = [str(home / "bin" / "tritonserver")]
        command += [f"--model-repository={model.parent}", f"--backend-directory={home}/backends"]
        command += [f"--http-port={http_port}", f"--grpc-port={grpc_port}"]
        command += [f"--metrics-port={metrics_port}", "--http-address=127.0.0.1"]
        command += ["--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1"]
        packages = self._packages()
        # The stub embeds Python: it must find its library, the wheel's and the packages.
        libraries = f"{packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
        environment = self.variables(stage) | {
            "LD_LIBRARY_PATH": libraries,
            "PYTHONPATH": str(packages),
            "PYTHONHOME": sys.base_prefix,
        }
        ports = {"http": http_port, "grpc": grpc_port}
        return Launch(tuple(command), ports, "/v2/health/ready", folder, environment)

    def _packages(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.environment / "lib" / version / "site-packages"

    def _home(self, folder: Path) -> Path:
        """The wheel's server, with the stub for this Python where the backend looks for it."""
        source = self._packages() / "pytriton" / "tritonserver"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = source / "python_backend_stubs" / version / STUB
        if not stub.is_file():
            raise ServerError(f"triton: the wheel has no stub for Python {version}")
        home = folder / "tritonserver"
        shutil.copytree(source / "backends", home / "backends")
        (home / "bin").mkdir()
        (home / "bin" / "tritonserver").symlink_to(source / "bin" / "tritonserver")
        shutil.copy(stub, home / "backends" / "python" / STUB)
        return home

    def role(self, executable: str, title: str) -> str:
        return "python stub" if STUB in title or STUB[:15] in executable else "server"
