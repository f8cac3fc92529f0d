"""The parts of an embedding as a Ray Data job: each worker loads the model once and takes part after part."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpr.artifacts.run_folder import atomic_save_npy
from vpr.common.distributed import compute_device
from vpr.common.errors import UserError
from vpr.common.telemetry import disable_telemetry
from vpr.retrieval.config import EmbedConfig
from vpr.retrieval.embed_job import EmbedJob, Loader


class Worker:
    """Computes parts in a process of Ray's.

    Args:
        config: what to embed.
        load: gives the model.
    """

    def __init__(self, config: EmbedConfig, load: Loader) -> None:
        network, model = load(config.model)
        self._network = network.to(compute_device())
        self._job = EmbedJob(config, model)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """A batch of one ``part``, to which its ``vectors`` are added as bytes of float32."""
        vectors = [self._job.compute(int(part), self._network).tobytes() for part in batch["part"]]
        return {"part": batch["part"], "vectors": np.array(vectors, dtype=object)}


def compute_parts(job: EmbedJob, absent: list[int], load: Loader) -> None:
    """Compute parts by ``job.config.ray`` workers and keep each as it comes.

    Ray starts on this machine, or joins the cluster that its own variable ``RAY_ADDRESS`` names, whose machines
    must see model, catalogue and images under the same paths; the output is written by this process alone.

    Raises:
        UserError: Ray is not installed, or a worker failed.
    """
    disable_telemetry()
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError("ray: is not installed: pip install -r requirements-scale.txt, or leave --ray out") from None
    if not absent:
        return
    workers = job.config.ray
    here: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}
    ray.init(log_to_driver=False, configure_logging=False, **here)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        parts = ray.data.from_items([{"part": part} for part in absent], override_num_blocks=len(absent))
        computed = parts.map_batches(
            Worker,
            fn_constructor_args=(job.config, load),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
        )
        dim = job.model.card.embedding.dim if job.model.card.embedding else -1
        for row in computed.iter_rows():
            vectors = np.frombuffer(row["vectors"], dtype=np.float32).reshape(-1, dim)
            atomic_save_npy(job.file(int(row["part"])), vectors)
    except ray.exceptions.RayError as error:
        raise UserError(f"ray: a worker failed: {str(error).strip().splitlines()[-1]}: run it without --ray") from None
    finally:
        ray.shutdown()
