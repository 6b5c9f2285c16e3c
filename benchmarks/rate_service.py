"""The whole server as `zllm serve` runs it, over rate_engine.py in place of a model's engine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.service import serve
from zllm.service.config import ServerConfig

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frontends", type=int, default=1)
    server = ServerConfig(
        port=0,
        admin_port=0,
        metrics_port=0,
        engine_timeout=60.0,
        log_level="warning",
        frontends=parser.parse_args().frontends,
    )
    model = EngineConfig(model=EMBEDDED_MODEL, served_model_name="rate")
    engine = (sys.executable, str(Path(__file__).with_name("rate_engine.py")))
    sys.exit(serve.run(server, [model], model, version="bench", command=engine))
