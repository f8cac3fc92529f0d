"""Learning-rate schedules of a training stage, as pure functions of the step."""

import math

from teacher.config import StageConfig
from vpr.training.loop import warmup_cosine


def rate_factor(step: int, stage: StageConfig, steps: int) -> float:
    """Return the factor of the learning rates of a stage at a step, from 0.

    Args:
        step: Number of optimiser steps that the stage has taken.
        stage: Stage with its schedule.
        steps: Optimiser steps of the stage, the same number in each epoch.
    """
    warmup = stage.warmup_steps or max(1, int(stage.warmup * steps))
    if step < warmup or stage.schedule == "cosine":
        return warmup_cosine(step, steps, warmup)
    epoch = min(step * stage.epochs // steps, stage.epochs - 1)
    if stage.schedule == "epoch-cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / stage.epochs))
    return float(stage.gamma ** sum(milestone <= epoch for milestone in stage.milestones))
