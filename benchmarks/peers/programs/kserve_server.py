"""KServe around torch: python kserve_server.py --http_port=... --grpc_port=..."""

import os

import grpc
import kserve  # type: ignore[import-not-found]
import torch
import uvicorn


class Loopback(uvicorn.Config):  # type: ignore[misc]
    """KServe binds every interface and has no option for it; a benchmark stays on its machine."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options | {"host": "127.0.0.1"})


class LoopbackGrpc(grpc.aio._server.Server):  # type: ignore[misc]
    def add_insecure_port(self, address: str) -> int:
        port: int = super().add_insecure_port(address.replace("[::]", "127.0.0.1"))
        return port


class Torch(kserve.Model):  # type: ignore[misc]
    def load(self) -> bool:
        torch.set_num_threads(1)
        self.model = torch.jit.load(os.environ["BENCH_FILE"]).eval()
        self.ready = True
        return True

    def predict(
        self, payload: kserve.InferRequest, headers: dict[str, str] | None = None
    ) -> kserve.InferResponse:
        array = payload.inputs[0].as_numpy()
        with torch.inference_mode():
            result = self.model(torch.from_numpy(array)).numpy()
        output = kserve.InferOutput("OUTPUT__0", list(result.shape), "FP32")
        output.set_data_from_numpy(result, binary_data=True)
        return kserve.InferResponse(payload.id or "", self.name, [output])


if __name__ == "__main__":
    uvicorn.Config = Loopback
    grpc.aio._server.Server = LoopbackGrpc
    model = Torch(os.environ["BENCH_MODEL"])
    model.load()
    kserve.ModelServer(access_log_format=None).start([model])
