"""Ray Data job that computes the parts of an embedding; each worker loads the model once."""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpr.artifacts.run_folder import atomic_save_npy
from vpr.common.allocator import keep_freed_memory
from vpr.common.errors import UserError
from vpr.common.telemetry import disable_telemetry
from vpr.retrieval.config import EmbedConfig
from vpr.retrieval.embed_job import EmbedJob, Loader


class Worker:
    """Compute parts in a Ray process."""

    def __init__(self, config: EmbedConfig, load: Loader) -> None:
        keep_freed_memory()
        loaded = load(config)
        self._forward = loaded.open()
        self._job = EmbedJob(config, loaded)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return a batch of one ``part`` with its ``vectors`` as float32 bytes."""
        vectors = [self._job.compute(int(part), self._forward).tobytes() for part in batch["part"]]
        return {"part": batch["part"], "vectors": np.array(vectors, dtype=object)}


def compute_parts(job: EmbedJob, missing: list[int], load: Loader) -> None:
    """Compute parts with ``job.config.ray`` workers and save each part as it arrives.

    Ray starts on this machine, or joins the cluster of Ray's variable ``RAY_ADDRESS``. The machines of a cluster
    must see model, catalogue and images under the same paths. Only this process writes the output.

    Raises:
        UserError: Ray is not installed, or a worker failed.
    """
    disable_telemetry()
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError("ray: not installed. Run `pip install -r requirements-scale.txt`, or omit --ray.") from None
    if not missing:
        return
    workers = job.config.ray
    local: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}
    ray.init(log_to_driver=False, configure_logging=False, **local)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        parts = ray.data.from_items([{"part": part} for part in missing], override_num_blocks=len(missing))
        computed = parts.map_batches(
            Worker,
            fn_constructor_args=(job.config, load),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
        )
        model_dim = job.model.card.embedding.dim if job.model.card.embedding else -1
        dim = job.config.dimensions or model_dim
        for row in computed.iter_rows():
            vectors = np.frombuffer(row["vectors"], dtype=np.float32).reshape(-1, dim)
            atomic_save_npy(job.file(int(row["part"])), vectors)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1].rstrip(".")
        raise UserError(f"ray: a worker failed ({reason}). Run the command without --ray.") from None
    finally:
        ray.shutdown()
