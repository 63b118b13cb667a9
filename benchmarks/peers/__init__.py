"""Other servers, each from PyPI in an environment of its own, with the same TorchScript file.

`PEERS` is the list. What runs inside those environments is in `programs/`, and imports nothing of
ours. Used by `bench.py`.
"""

from __future__ import annotations

from benchmarks.peers.base import Peer
from benchmarks.peers.bentoml import BentoML
from benchmarks.peers.kserve import KServe
from benchmarks.peers.litserve import LitServe
from benchmarks.peers.mlserver import MLServer
from benchmarks.peers.torchserve import TorchServe
from benchmarks.peers.triton import Triton

PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Triton, MLServer, LitServe, KServe, BentoML, TorchServe)
}
