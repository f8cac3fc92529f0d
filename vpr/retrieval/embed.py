"""Embedding of a catalogue of any size, in parts that are files until all are computed.

A killed job resumes at the next part. Processes of torchrun, or the workers of a Ray Data job, share the parts. A part
consists of complete batches. The vectors are therefore bit-equal however the parts were shared, on the same device and
with the same number of threads per process.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from vpr.artifacts.run_folder import atomic_save_npy, is_written, run_lock, wait_until
from vpr.artifacts.stage import Stage
from vpr.common.distributed import is_first, rank_and_world
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import load_catalog
from vpr.data.seen import read_seen
from vpr.retrieval.config import EmbedConfig
from vpr.retrieval.embed_job import EmbedJob, EmbedModel, Loader
from vpr.retrieval.embeddings import write_embeddings

log = get_logger(__name__)


def embed_with(config: EmbedConfig, load: Loader) -> Path:
    """Embed a catalogue and write the artifact, unless it is up to date.

    ``load`` reads the model artifact; worker processes must be able to import it.

    Raises:
        UserError: The split is empty, an image cannot be read, or Ray is requested but not installed.
    """
    loaded = load(config)
    read_seen(loaded.artifact)  # raises before the work if the record, which the embeddings inherit, is broken
    job = EmbedJob(config, loaded)
    # Listed before the output is checked: a first process that has finished has removed the parts.
    missing = [part for part in job.parts if not job.file(part).is_file()]
    stage = Stage(config.output, "embeddings", job.values, job.parents)
    if stage.find():
        shutil.rmtree(job.folder, ignore_errors=True)  # left by a process killed after it wrote the artifact
        return stage.path
    if not len(job.catalog):
        splits = ", ".join(sorted(set(load_catalog(config.catalog).table["split"].to_pylist())))
        raise UserError(f"split: {config.catalog} has no images in split '{config.split}', but in: {splits}.")
    with run_lock(job.folder):
        _run(job, missing, loaded, load)
    return stage.path


def _run(job: EmbedJob, missing: list[int], loaded: EmbedModel, load: Loader) -> None:
    config = job.config
    if len(missing) < len(job.parts):
        log.info(f"{config.output}: resuming, {len(job.parts) - len(missing)} of {len(job.parts)} parts are done")
    if config.ray:
        from vpr.retrieval.ray_job import compute_parts  # Ray is an optional package

        compute_parts(job, missing, load)
    else:
        _compute_local_parts(job, missing, loaded)
    if is_first():
        _merge_parts(job)
    else:
        wait_until(lambda: is_written(config.output, job.values, job.parents))


def _compute_local_parts(job: EmbedJob, missing: list[int], loaded: EmbedModel) -> None:
    """Compute this process's parts, a contiguous range so that it reads few shards."""
    rank, world = rank_and_world()
    first, last = (len(job.parts) * edge // world for edge in (rank, rank + 1))
    local_parts = [part for part in missing if first <= part < last]
    if not local_parts:
        return
    forward = loaded.open()
    for part in local_parts:
        atomic_save_npy(job.file(part), job.compute(part, forward))
        if len(job.parts) > 1:
            log.info(f"  part {part + 1}/{len(job.parts)}")


def _merge_parts(job: EmbedJob) -> None:
    """Wait for all parts, write the artifact and remove the parts."""
    for part in job.parts:
        wait_until(job.file(part).is_file)
    vectors = np.concatenate([np.load(job.file(part), allow_pickle=False) for part in job.parts])
    write_embeddings(job.config.output, vectors, job.catalog, job.model, job.values)
    shutil.rmtree(job.folder)
    log.info(f"{job.config.output}: {len(vectors)} embeddings of {vectors.shape[1]} dimensions")
