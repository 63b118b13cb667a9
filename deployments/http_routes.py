"""The HTTP route table as data: what is served, and what is known and refused by name.

Paths and texts are Triton's. The infer call's POST is not here: it has a lane of its
own in `http`, which makes Starlette routes of the rest.
"""

from __future__ import annotations

MODEL = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")

# Method, path below a model (or a full path), endpoint of HttpApp; what it takes and answers is in
# `openapi_operations`.
MODEL_ROUTES = (
    ("GET", "", "model_metadata"),
    ("GET", "/ready", "model_ready"),
    ("GET", "/config", "model_config"),
    ("GET", "/stats", "statistics"),
    ("POST", "/infer", "infer_elsewhere"),
    ("POST", "/generate", "generate"),
    ("POST", "/generate_stream", "generate_stream"),
)
ROUTES = (
    ("GET", "/", "page"),
    ("GET", "/openapi.json", "openapi"),
    ("GET", "/v2", "server_metadata"),
    ("GET", "/v2/health/live", "live"),
    ("GET", "/v2/health/ready", "ready"),
    ("GET", "/v2/models/stats", "statistics"),
    ("GET POST", "/v2/logging", "logging"),
    ("GET POST", "/v2/trace/setting", "trace"),
    ("GET POST", "/v2/models/{model}/trace/setting", "trace"),
    ("GET", "/metrics", "metrics"),
    ("POST", "/v2/repository/index", "index"),
    ("POST", "/v2/repository/models/{model}/load", "load"),
    ("POST", "/v2/repository/models/{model}/unload", "unload"),
    # Paths, so that a name that has a slash in it is told what is wrong with it.
    ("POST", "/v2/repository/models/{model:path}/load", "load"),
    ("POST", "/v2/repository/models/{model:path}/unload", "unload"),
    ("GET", "/-/healthz", "healthz"),
    ("GET", "/-/routes", "routes"),
    *(
        (method, f"/v2/{kind}sharedmemory{region}/{verb}", f"memory_{verb}")
        for kind in ("system", "cuda")
        for region in ("", "/region/{region}")
        for method, verb in (("GET", "status"), ("POST", "register"), ("POST", "unregister"))
    ),
)
# In Triton's table and not done here: answered by name. Methods, path, text.
_REPOSITORY = "'repository_name' specification is not supported"
UNSUPPORTED = (
    ("POST", "/v2/repository/{repository}/models/{model}/load", _REPOSITORY),
    ("POST", "/v2/repository/{repository}/models/{model}/unload", _REPOSITORY),
    ("POST", "/v2/repository/{repository}/index", _REPOSITORY),
)
